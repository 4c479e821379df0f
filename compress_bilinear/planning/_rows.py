"""Rows that layers were called with, in a file: what calibrates a checkpoint that comes without its network's code.

The file is .safetensors or .npz, of which nothing is ever unpickled. For a layer "rel" it has the tensors "rel.input1",
(..., I), and "rel.input2", (..., J): the same leading dimensions, a pair of rows for each index into them. For a layer
that is the whole checkpoint they are "input1" and "input2".
"""

import os
import pickle
import zlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TypeAlias
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError, nearest
from ..files import read_safetensors
from ..fitting import OutputError, collect_inputs

Rows: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""By the layer's name: (N, I) and (N, J)."""

_INPUTS = ("input1", "input2")
_ROWS = 256  # of a batch


def read_rows(
    path: str | os.PathLike[str],
    shapes: Mapping[str, Sequence[int]],  # (O, I, J) of every layer that the file may know
    wanted: Mapping[str, str],  # of these, the ones to be calibrated, each with the name that it is known by here
) -> Rows:
    """The rows of those that are wanted; a file need not have all. One layer of several names has the rows of all.

    Raises: CheckpointError where the file cannot be read so, has a name that is no layer's, an input without the other,
        another shape or dtype than floating rows, or no row of any layer that is wanted.
    """
    tensors = _tensors(path)
    known = {_key(layer, which): (layer, which) for layer in shapes for which in _INPUTS}
    for name in tensors:
        if name not in known:
            some = ", ".join(_key(layer, which) for layer in wanted for which in _INPUTS)
            raise CheckpointError(f"{str(path)!r} should have {some}. Found {name!r}.{nearest(name, known)}")
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for layer in dict.fromkeys(known[name][0] for name in tensors):
        keys = [_key(layer, which) for which in _INPUTS]
        for key in keys:
            if key not in tensors:
                raise CheckpointError(f"{str(path)!r} should have {' and '.join(keys)}. Found no {key}.")
        first, second = (tensors[key] for key in keys)
        for key, value, size in zip(keys, (first, second), shapes[layer][1:], strict=True):
            if value.dim() < 2 or value.shape[-1] != size or not value.is_floating_point() or not value.numel():
                raise CheckpointError(
                    f"{key!r} of {str(path)!r} should be floating rows of shape (..., {size}). "
                    f"Found {tuple(value.shape)} {value.dtype}."
                )
        if first.shape[:-1] != second.shape[:-1]:
            raise CheckpointError(
                f"{keys[0]!r} and {keys[1]!r} of {str(path)!r} should have as many rows, which belong together. "
                f"Found {tuple(first.shape[:-1])} and {tuple(second.shape[:-1])}."
            )
        if layer in wanted:
            rows.setdefault(wanted[layer], []).append((first.flatten(0, -2), second.flatten(0, -2)))
    if not rows:
        raise CheckpointError(f"{str(path)!r} should have rows of {', '.join(wanted) or '(root)'}. Found none.")
    return {name: (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])) for name, pairs in rows.items()}


def _key(layer: str, which: str) -> str:
    return f"{layer}.{which}" if layer else which


def _tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    match Path(path).suffix:
        case ".safetensors":
            return read_safetensors(path)[0]
        case ".npz":
            return _arrays(path)
    raise CheckpointError(f"A file of rows should end in .safetensors or .npz. Found {str(path)!r}.")


_UNREADABLE = (
    *(ValueError, TypeError, OSError, EOFError, AttributeError, RuntimeError),
    *(BadZipFile, zlib.error, pickle.UnpicklingError),
)  # what damaged, encrypted or otherwise packed archives raise


def _arrays(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise CheckpointError(f"{str(path)!r} should be a file. Found {'a folder' if Path(path).is_dir() else 'none'}.")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{str(path)!r} should be a whole .npz file of numbers. Found one that cannot be read: {error}"
        ) from error


def batches(rows: Rows, model: nn.Module) -> list[Rows]:
    """The rows in batches of a few hundred of each layer, on the layer's device and in its dtype; for `call`."""
    layers, split = dict(model.named_children()), {}
    for name, pair in rows.items():
        like = next(layers[name].parameters())
        split[name] = list(zip(*(value.to(like).split(_ROWS) for value in pair), strict=True))
    return [
        {name: part for name, part in zip(split, parts, strict=True) if part is not None}
        for parts in zip_longest(*split.values())
    ]


def call_rows(model: nn.Module, batch: Rows) -> list[Tensor]:
    """Each layer of a batch, which is a child of the model by its name, on its rows."""
    layers = dict(model.named_children())
    return [layers[name](*pair) for name, pair in batch.items()]


def error_on(layer: nn.Bilinear, rows: tuple[Tensor, Tensor]) -> OutputError:
    """What measures replacements of one layer: on the rows that calibration by the same file holds out."""
    model = nn.ModuleDict({"layer": layer})
    seen = collect_inputs(model, {"layer": layer}, batches({"layer": rows}, model), forward_fn=call_rows)["layer"]
    assert seen is not None  # there are rows
    return OutputError(layer, seen)
