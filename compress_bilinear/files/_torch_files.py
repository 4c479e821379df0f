"""Reading state dicts from files, without running code that is in them."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch
from torch import Tensor

from ..errors import CheckpointError
from ._container import LayerDescription, check_is_file, read_safetensors


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], tuple[LayerDescription, ...]]:
    """The tensors of a .safetensors file, or of a .pt file, which is read with `weights_only=True`.

    With them the replaced layers among them, where `save` wrote the file.

    A .pt file may hold the state dict itself or have it under one key (as {"model": ..., "epoch": ...}).

    Raises: CheckpointError where the file cannot be read so, or holds no state dict or several.
    """
    check_is_file(path)
    with open(path, "rb") as file:
        start = file.read(9)
    if Path(path).suffix == ".safetensors" or start[8:] == b"{":  # eight bytes of header length, then JSON
        tensors, layers = read_safetensors(path)
        return tensors, layers or ()
    if start[:1] != b"\x80" and not is_zipfile(path):  # a zip archive, or the older format's pickle
        raise CheckpointError(
            f"{str(path)!r} should be a .safetensors file or one that torch.save wrote. "
            "Found neither, or a damaged one."
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError, BadZipFile) as error:
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise CheckpointError(
                f"{str(path)!r} should hold a state dict. Found pickled Python objects, which are not loaded because "
                "that runs code: save model.state_dict() instead."
            ) from error
        raise CheckpointError(f"{str(path)!r} should be a whole file of torch.save's. Found a damaged one.") from error
    state = _state_dict(loaded, str(path))
    for name, value in state.items():
        if value.layout != torch.strided:
            raise CheckpointError(f"Tensor {name!r} of {str(path)!r} should be dense. Found {value.layout}.")
    return state, ()


def _state_dict(loaded: Any, path: str) -> dict[str, Tensor]:
    """The state dict that a loaded file is, or has under one of its keys."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path!r} should hold a state dict. Found a {type(loaded).__name__}.")
    inner = [value for value in loaded.values() if isinstance(value, Mapping) and value and _tensors(value) == value]
    if len(inner) == 1:
        return dict(inner[0])
    tensors = _tensors(loaded)
    if inner or not tensors:
        keys = ", ".join(repr(key) for key in loaded)
        raise CheckpointError(f"{path!r} should hold one state dict. Found {len(inner)} under the keys {keys}.")
    lost = [key for key in loaded if isinstance(key, str) and key.endswith("_extra_state") and key not in tensors]
    if lost:
        raise CheckpointError(f"{path!r} should hold tensors only. Found {', '.join(lost)}, which would be lost.")
    return tensors


def _tensors(values: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)}
