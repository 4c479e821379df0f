"""Checkpoints: our file format, `save` and `load`, and PyTorch's files read without running their code."""

from ._checkpoint import by_layer, describe, filled, load, save
from ._container import LayerDescription, files_of, read_safetensors, written
from ._pretrained import PretrainedMixin
from ._torch_files import read_state
