"""Checkpoints: our container, `save` and `load`, and PyTorch's files read without their code."""

from ._checkpoint import describe, filled, load, save, settle
from ._container import METADATA_KEY, LayerDescription, place, read_container, read_safetensors, write_container
from ._torch_files import read_state

__all__ = [
    "METADATA_KEY",
    "LayerDescription",
    "describe",
    "filled",
    "load",
    "place",
    "read_container",
    "read_safetensors",
    "read_state",
    "save",
    "settle",
    "write_container",
]
