"""A file of rows that layers were called with: it calibrates a checkpoint without its network's code.

It is a .safetensors file. For a layer "rel" it has the tensors "rel.input1", (..., I), and "rel.input2", (..., J), with
the same leading dimensions: a pair of rows for each index into them. For a layer that is the whole checkpoint they are
"input1" and "input2".
"""

import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TypeAlias

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
    selected: Mapping[str, str],  # of these, the ones to calibrate, each with the first name of the same layer
) -> Rows:
    """The rows of the selected layers; a file need not have all. A layer of several names has the rows of all.

    Raises: CheckpointError where the file is no safetensors, has a name that is no layer's, an input without the other,
        another shape or dtype than floating rows, or no row of any selected layer.
    """
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(
            f"A file of rows should end in .safetensors. Found {str(path)!r}. To convert a .npz file: "
            "safetensors.numpy.save_file(dict(numpy.load(file)), 'rows.safetensors')."
        )
    tensors, _ = read_safetensors(path)
    known = {_key(layer, which): layer for layer in shapes for which in _INPUTS}
    for name in tensors:
        if name not in known:
            some = ", ".join(_key(layer, which) for layer in selected for which in _INPUTS)
            raise CheckpointError(f"{str(path)!r} should have {some}. Found {name!r}.{nearest(name, known)}")
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for layer in dict.fromkeys(known[name] for name in tensors):
        pair = _pair(tensors, layer, shapes[layer], str(path))
        if layer in selected:
            pairs.setdefault(selected[layer], []).append(pair)
    if not pairs:
        raise CheckpointError(f"{str(path)!r} should have rows of {', '.join(selected) or '(root)'}. Found none.")
    return {name: (torch.cat([x for x, _ in some]), torch.cat([y for _, y in some])) for name, some in pairs.items()}


def _pair(tensors: Mapping[str, Tensor], layer: str, shape: Sequence[int], path: str) -> tuple[Tensor, Tensor]:
    """The two inputs of a layer in a file: (N, I) and (N, J)."""
    keys = [_key(layer, which) for which in _INPUTS]
    for key, size in zip(keys, shape[1:], strict=True):
        if key not in tensors:
            raise CheckpointError(f"{path!r} should have {' and '.join(keys)}. Found no {key}.")
        value = tensors[key]
        if value.dim() < 2 or value.shape[-1] != size or not value.is_floating_point() or not value.numel():
            raise CheckpointError(
                f"{key!r} of {path!r} should be floating rows of shape (..., {size}). "
                f"Found {tuple(value.shape)} {value.dtype}."
            )
    first, second = (tensors[key] for key in keys)
    if first.shape[:-1] != second.shape[:-1]:
        found = f"Found {tuple(first.shape[:-1])} and {tuple(second.shape[:-1])}."
        raise CheckpointError(
            f"{' and '.join(keys)} of {path!r} should have as many rows, which belong together. {found}"
        )
    return first.flatten(0, -2), second.flatten(0, -2)


def _key(layer: str, which: str) -> str:
    return f"{layer}.{which}" if layer else which


def batches(rows: Rows, model: nn.Module) -> list[Rows]:
    """The rows in batches of a few hundred for each layer, on its device and in its dtype; for `call_rows`."""
    layers, split = dict(model.named_modules(remove_duplicate=False)), {}
    for name, pair in rows.items():
        like = next(layers[name].parameters())
        split[name] = list(zip(*(value.to(like).split(_ROWS) for value in pair), strict=True))
    return [
        {name: part for name, part in zip(split, parts, strict=True) if part is not None}
        for parts in zip_longest(*split.values())
    ]


def call_rows(model: nn.Module, batch: Rows) -> list[Tensor]:
    """Each layer of a batch, by its name in the model, on its rows."""
    layers = dict(model.named_modules(remove_duplicate=False))
    return [layers[name](*pair) for name, pair in batch.items()]


def error_on(layer: nn.Bilinear, rows: tuple[Tensor, Tensor]) -> OutputError:
    """What measures replacements of one layer, on the rows that calibration by the same file holds out."""
    cut = batches({"": rows}, layer)
    inputs = collect_inputs(layer, {"": layer}, cut, forward_fn=call_rows, whole_batches=False)[""]
    assert inputs is not None  # there are rows
    return OutputError(layer, inputs)
