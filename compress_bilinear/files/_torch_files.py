"""Reading state dicts from files, without running code that is in them."""

import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from ..errors import CheckpointError
from ._container import FileDescription, LayerDescription, aligned, check_is_file, read_file, read_safetensors
from ._unpickler import Placeholder, load_with_placeholders

_PICKLED = "a pickled {}, which is not loaded because that runs code: save model.state_dict() alone"


def read_state(
    path: str | os.PathLike[str], key: str | None = None, verify: bool = True
) -> tuple[dict[str, Tensor], tuple[LayerDescription, ...]]:
    """The tensors of a .safetensors file, or of a .pt file, of which no code is run.

    They are views of the file, whose values are read where they are used. With them come the replaced layers, where
    `save` wrote the file. Of a network in several files, `path` is their folder or its `model.safetensors.index.json`
    or `pytorch_model.bin.index.json`.

    A .pt file may be the state dict itself, or have it under keys, as {"checkpoint": {"model": ..., "epoch": 3}}.

    Args:
        key: of the state dict in a .pt file, say "checkpoint.model", or of a part of one: the entries whose names begin
            with it, without that. None takes the only one that may be meant: that with a weight of three axes.
        verify: read all of a file that `save` wrote, to see that it is whole.

    Raises: CheckpointError where the file cannot be read so, or holds no state dict or several.
    """
    tensors, description = read_safetensors(path, verify, partial(_read, key=key))
    return tensors, description.layers if description else ()


def _read(path: Path, verify: bool, key: str | None) -> tuple[dict[str, Tensor], FileDescription | None]:
    """One file of either kind."""
    check_is_file(path)
    with open(path, "rb") as file:
        start = file.read(24)
    if start[8:9] == b"{":  # eight bytes of header length, then JSON
        if key is not None:
            raise CheckpointError(f"--key should be one of a .pt file with several state dicts. Found {str(path)!r}.")
        return read_file(path, verify)
    written = start[:1] == b"\x80" or is_zipfile(path)  # the older format's pickle, or a zip archive
    if path.suffix == ".safetensors" or not written:
        raise CheckpointError(
            f"{str(path)!r} should be a .safetensors file or one that torch.save wrote. Found {path.stat().st_size} "
            f"bytes that begin with {start!r}: unpack, download or save it again."
        )
    return _state_dict(_loaded(path), str(path), key), None


def _loaded(path: Path) -> Any:
    """What torch.save wrote; objects that are no tensors or containers are placeholders, and no code of them is run."""
    try:
        entries = ZipFile(path).infolist() if is_zipfile(path) else []
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise CheckpointError(
                f"{str(path)!r} should be a file that torch.save wrote of a state dict. Found a TorchScript archive: "
                "save torch.jit.load(path).state_dict() alone."
            )
        # the values lie there as they are, but in a file that was compressed, or in torch's older format
        mapped = bool(entries) and not any(entry.compress_type for entry in entries)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError:
            return load_with_placeholders(path, mapped)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or forged pickle fails in any way
        raise CheckpointError(
            f"{str(path)!r} should be a file that torch.save wrote of a state dict. Found a damaged or another one: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error


def _state_dict(loaded: Any, path: str, key: str | None) -> dict[str, Tensor]:
    """The state dict that a loaded file is, or holds: that of this key, or the only one with a weight of three axes."""
    if not isinstance(loaded, Mapping) or (isinstance(loaded, Placeholder) and not loaded):
        raise CheckpointError(f"{path!r} should hold a state dict. Found {_described(loaded)}.")
    try:
        states = list(_states(loaded, ""))
    except RecursionError as error:
        raise CheckpointError(f"{path!r} should hold dicts of tensors. Found one that holds itself.") from error
    best = max((_likelihood(state) for _, state in states), default=0)
    chosen = [pair for pair in states if (pair[0] == key if key is not None else _likelihood(pair[1]) == best)]
    if key is not None and not chosen:
        chosen = list(_parts(states, f"{key}."))
    if len(chosen) != 1:
        listed = ", ".join(f"{name or '(top)'!r} ({len(_tensors(state))} tensors)" for name, state in chosen or states)
        what = "one state dict" if key is None else f"one state dict under {key!r}"
        choose = ": choose one by --key" if len(states) > 1 else ""
        kinds: dict[str, Any] = {}
        for name, value in loaded.items():
            kinds.setdefault(_described(value), name)  # each once
        under = "; ".join(f"under {name!r} {kind}" for kind, name in kinds.items())
        found = listed or f"none{under and ', but '}{under}"
        raise CheckpointError(f"{path!r} should hold {what}. Found {found}{choose}.")
    [(_, state)] = chosen
    for name, value in state.items():
        if name.endswith("_extra_state") and not isinstance(value, (Tensor, Placeholder)) and value:
            raise CheckpointError(f"{path!r} should hold tensors. Found {name}, which would be lost: use cb.compress.")
        if isinstance(value, Placeholder):
            raise CheckpointError(f"Entry {name!r} of {path!r} should be a tensor. Found {_PICKLED.format(value)}.")
        if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
            found = "none" if value.is_meta else f"{value.layout}: save its to_dense()"
            raise CheckpointError(f"Tensor {name!r} of {path!r} should be dense, with values. Found {found}.")
    return {name: aligned(value) for name, value in _tensors(state).items()}


def _described(value: Any) -> str:
    """What is found instead of tensors, with the way out."""
    if isinstance(value, Placeholder):
        return _PICKLED.format(value)
    hint = ": save the one of them that is meant by itself" if isinstance(value, (list, tuple)) else ""
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}{hint}"


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _likelihood(state: Mapping[str, Any]) -> int:
    """How likely the network's: 2 with a bilinear weight by its name, 1 by its shape alone, as optimizers have it."""
    cubes = [key for key, value in _tensors(state).items() if value.dim() == 3 and value.is_floating_point()]
    return max((1 + key.endswith("weight") for key in cubes), default=0)


def _states(values: Mapping[Any, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All dicts with tensors in nested dicts of a file, by their keys joined with dots; "" is the file itself."""
    named = {key: value for key, value in values.items() if isinstance(key, str)}
    if _tensors(named):
        yield name, named
    for key, value in named.items():
        if isinstance(value, Mapping):
            yield from _states(value, f"{name}.{key}" if name else key)


def _parts(states: Iterable[tuple[str, Mapping[str, Any]]], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of each state dict whose names begin with a path, or with its rest within the state dict."""
    for name, state in states:
        start = path.removeprefix(f"{name}." if name else "")
        part = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        if part:
            yield path[:-1], part
