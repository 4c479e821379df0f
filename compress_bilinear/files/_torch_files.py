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
from ._container import read_safetensors


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pt file, which is read with `weights_only=True`.

    A .pt file may hold the state dict itself or have it under one key (as {"model": ..., "epoch": ...}).

    Raises: CheckpointError where the file cannot be read so, or holds no state dict or several.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{str(path)!r} should be a file. Found {'a folder' if Path(path).is_dir() else 'none'}.")
    if _is_safetensors(path):
        return read_safetensors(path)[0]
    if not _is_torch_file(path):
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
    return _state_dict(loaded, str(path))


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    """By content: eight bytes of header length, then JSON."""
    if Path(path).suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        return file.read(9)[8:9] == b"{"


def _is_torch_file(path: str | os.PathLike[str]) -> bool:
    """By content: a zip archive, or the older format's pickle."""
    with open(path, "rb") as file:
        start = file.read(1)
        return start == b"\x80" or is_zipfile(file)


def _state_dict(loaded: Any, path: str) -> dict[str, Tensor]:
    if isinstance(loaded, Mapping):
        inner = {
            key: value
            for key, value in loaded.items()
            if isinstance(value, Mapping)
            and value
            and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
        }
        if len(inner) == 1:
            return _dense_tensors(dict(next(iter(inner.values()))), path)
        tensors = {key: value for key, value in loaded.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors and not inner:
            lost = [key for key in loaded if isinstance(key, str) and key.endswith("_extra_state")]
            if lost and len(tensors) < len(loaded):
                raise CheckpointError(
                    f"{path!r} should hold tensors only. Found {', '.join(lost)}, which would be lost."
                )
            return _dense_tensors(tensors, path)
        keys = ", ".join(repr(key) for key in loaded)
        raise CheckpointError(f"{path!r} should hold one state dict. Found {len(inner)} under the keys {keys}.")
    raise CheckpointError(f"{path!r} should hold a state dict. Found a {type(loaded).__name__}.")


def _dense_tensors(state: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    for name, value in state.items():
        if value.layout != torch.strided:
            raise CheckpointError(f"Tensor {name!r} of {path!r} should be dense. Found {value.layout}.")
    return state
