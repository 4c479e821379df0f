"""Checkpoints without their network's code: find what may be bilinear weights, compress them, compare two files."""

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import CheckpointError, CompressionError, MatchError
from ..files import (
    METADATA_KEY,
    LayerDescription,
    describe,
    filled,
    place,
    read_container,
    read_safetensors,
    read_state,
    settle,
)
from ..fitting import environment
from ..report import Report
from ._api import Plan, plan
from ._rows import batches, call_rows, error_on, read_rows
from ._verdict import compare_layers

_ROOT = "(root)"  # the name here of a layer that is the whole network
_TIMED_ROWS = 256  # of a call, whatever a file of rows holds
_LONGEST_KERNEL = 16  # a last dimension below this may well be a convolution's kernel


@dataclass(frozen=True, eq=False)
class Candidate:
    """A three-dimensional floating "....weight", which may be an `nn.Bilinear`'s (O, I, J).

    Attributes:
        name: of the layer: the key without ".weight"; "" for a bare "weight".
        weight: (O, I, J).
        bias: (O,), or None where the file has none.
    """

    name: str
    weight: Tensor
    bias: Tensor | None

    @property
    def place(self) -> Hashable:
        """Where weight and bias are in memory: equal for one layer under two names."""
        return place(self.weight), self.bias if self.bias is None else place(self.bias)

    @property
    def maybe_convolution(self) -> bool:
        """Whether the last dimension is short enough for a one-dimensional convolution's kernel."""
        return self.weight.shape[2] < _LONGEST_KERNEL


def candidates(state: Mapping[str, Tensor]) -> list[Candidate]:
    """All three-dimensional floating weights, in the file's order."""
    found = []
    for key, value in state.items():
        name = key.removesuffix("weight").removesuffix(".")
        if key not in ("weight", f"{name}.weight") or value.dim() != 3 or not value.is_floating_point():
            continue
        prefix = f"{name}." if name else ""
        bias = state.get(f"{prefix}bias")
        own = {other.removeprefix(prefix) for other in state if other.startswith(prefix)}
        fits = bias is None or (bias.shape == value.shape[:1] and bias.dtype == value.dtype)
        if fits and own <= {"weight", "bias"}:  # an nn.Bilinear holds these and nothing else
            found.append(Candidate(name, value, bias))
    return found


def other_forms(state: Mapping[str, Tensor]) -> str:
    """A sentence about three-dimensional tensors that are no candidates, or nothing: another module may hold them."""
    known = {f"{c.name}.weight" if c.name else "weight" for c in candidates(state)}
    found = [
        f"{key} ({'x'.join(map(str, value.shape))})"
        for key, value in state.items()
        if value.dim() == 3 and value.is_floating_point() and key not in known
    ]
    if not found:
        return ""
    return f" {', '.join(found)} may be a bilinear weight in another form, which needs the network's code: cb.compress."


def choose(state: Mapping[str, Tensor], patterns: Sequence[str]) -> list[Candidate]:
    """The candidates that the patterns name, or without patterns the only one there is, where it is unambiguous.

    Raises: MatchError where a pattern matches nothing, or there is no pattern and a weight may be a convolution's.
    """
    found = candidates(state)
    if not found:
        required = "The file should hold the three-dimensional weight (out, in1, in2) of an nn.Bilinear. Found none."
        raise MatchError(required + other_forms(state))
    listing = ", ".join(
        f"{c.name or _ROOT} ({'x'.join(map(str, c.weight.shape))}{', conv1d?' if c.maybe_convolution else ''})"
        for c in found
    )
    if patterns:
        for pattern in patterns:
            if not matching(found, pattern):
                raise MatchError(
                    f"--layers {pattern!r} should match a three-dimensional weight. Found: {listing}."
                    f"{other_forms(state)}"
                )
        named = {c.place for pattern in patterns for c in matching(found, pattern)}
        return [c for c in found if c.place in named]  # a shared layer under all its names
    if len(found) == 1 and not found[0].maybe_convolution:
        return found
    raise MatchError(
        "--layers PATTERN is needed: a three-dimensional weight may be an nn.Bilinear's (out, in1, in2) or a "
        f"convolution's (out, in, kernel). Found: {listing}."
    )


def matching(found: Sequence[Candidate], pattern: str) -> list[Candidate]:
    """The candidates that a glob names, one that is the whole file as "(root)"."""
    return [c for c in found if fnmatchcase(c.name or _ROOT, pattern) or fnmatchcase(c.name, pattern)]


def compress_state(
    state: Mapping[str, Tensor],
    chosen: Sequence[Candidate],
    config: Config | Mapping[str, Config | None],
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    calibration: str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[Plan[nn.Module], dict[str, Tensor], list[LayerDescription]]:
    """Plan the compression of the chosen weights: the plan, and the state and description for `write`.

    `options` are those of `plan`. A weight that the file has under two names stays under both. On another
    `device` only the chosen weights are moved; in another `dtype` the whole state is taken, as by `model.to(dtype)`.
    `calibration` is a `rows_file`.
    """
    stored = chosen[0].weight.dtype
    if dtype is not None:
        state, names = _cast(state, dtype), {c.name for c in chosen}
        chosen = [candidate for candidate in candidates(state) if candidate.name in names]
    firsts: dict[Hashable, Candidate] = {}
    aliases: dict[str, list[str]] = {}
    for candidate in chosen:
        first = firsts.setdefault(candidate.place, candidate)
        if first is not candidate:
            aliases.setdefault(first.name, []).append(candidate.name)
    skeleton = _skeleton(list(firsts.values()))
    skeleton = skeleton if device is None else skeleton.to(device)
    if calibration is not None:
        wanted = {c.name: firsts[c.place].name or _ROOT for c in chosen}
        rows = read_rows(calibration, {c.name: c.weight.shape for c in candidates(state)}, wanted)
        options = {"batch_size": _TIMED_ROWS, **options, "calibration": batches(rows, skeleton)}
        options["forward_fn"] = call_rows
    planned = plan(skeleton, config, **options)
    compressed, _ = planned.apply()
    result = dict(state)
    descriptions = []
    for found in describe(compressed):
        name = "" if found.name == _ROOT else found.name
        description = replace(found, names=(name, *aliases.get(name, ())))
        descriptions.append(description)
        new = dict(compressed.named_children())[found.name]
        for name in description.names:
            prefix = f"{name}." if name else ""
            for key in ("weight", "bias"):
                result.pop(prefix + key, None)
            result |= {prefix + key: value for key, value in new.state_dict().items()}
    total = sum(value.numel() * value.element_size() for value in _unique(state))
    saved = planned.report.model_bytes_before - planned.report.model_bytes_after
    own = {layer: "" if layer.name == _ROOT else layer.name for layer in planned.report.layers}
    layers = tuple(replace(layer, name=n, aliases=tuple(aliases.get(n, ()))) for layer, n in own.items())
    known = dict(planned.report.environment)
    if dtype not in (None, stored):
        known["converted"] = f"from {str(stored).removeprefix('torch.')} before anything was measured"
    planned.report = replace(planned.report, layers=layers, environment=known)
    planned.report = replace(planned.report, model_bytes_before=total, model_bytes_after=total - saved)
    return planned, result, descriptions


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating tensors in another dtype; those that were one go on being one."""
    done: dict[Hashable, Tensor] = {}
    for value in state.values():
        if value.is_floating_point() and place(value) not in done:
            done[place(value)] = value.to(dtype)
    return {name: done.get(place(value), value) for name, value in state.items()}


def _unique(state: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of a state, those that share their memory once."""
    return list({place(v) if v.numel() else id(v): v for v in state.values()}.values())


def _skeleton(chosen: Sequence[Candidate]) -> nn.Module:
    """A module that holds an `nn.Bilinear` under each candidate's name, dots and all."""
    skeleton = nn.Module()
    for candidate in chosen:  # not add_module, which refuses dots and the names of methods
        skeleton._modules[candidate.name or _ROOT] = _bilinear(candidate.weight, candidate.bias)
    return skeleton


def _bilinear(weight: Tensor, bias: Tensor | None) -> nn.Bilinear:
    out, in1, in2 = weight.shape
    if weight.numel() == 0:
        raise CheckpointError(f"A weight should have no dimension of size 0. Found shape {tuple(weight.shape)}.")
    layer = nn.Bilinear(in1, in2, out, bias is not None, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def compare(
    original: str | os.PathLike[str],
    compressed: str | os.PathLike[str],
    batch_size: int | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    calibration: str | os.PathLike[str] | None = None,
) -> Report:
    """The report on a compressed file against the original checkpoint, measured here and now.

    Args:
        batch_size: rows in a timed call; None times none.
        device: where to measure.
        dtype: what the original is taken in; None as it is stored.
        calibration: a `rows_file` to measure output errors on; None measures none.

    Raises: CheckpointError where a file cannot be read, or the original lacks a layer or has it otherwise.
    """
    before = read_state(original) if dtype is None else _cast(read_state(original), dtype)
    after, descriptions = read_container(compressed)
    if not descriptions:
        raise CheckpointError(f"{str(compressed)!r} should hold replaced layers. Found none.")
    names = {name: description.name for description in descriptions for name in description.names}
    shapes = {c.name: c.weight.shape for c in candidates(before)}
    rows = {} if calibration is None else read_rows(calibration, shapes, names)
    layers = []
    for description in descriptions:
        if description.adapter is not None:
            raise CheckpointError(
                f"{str(compressed)!r} should hold layers that were nn.Bilinear, to be compared without the network's "
                f"code. Found {description.name!r}, which was of the form {description.adapter!r}."
            )
        prefix = f"{description.name}." if description.name else ""
        weight, bias = before.get(f"{prefix}weight"), before.get(f"{prefix}bias")
        shape = (description.out_features, description.in1_features, description.in2_features)
        if (
            weight is None
            or not weight.is_floating_point()
            or tuple(weight.shape) != shape
            or (bias is not None) != description.bias
            or (bias is not None and bias.shape != weight.shape[:1])
        ):
            found = (
                "none"
                if weight is None
                else f"{tuple(weight.shape)} {weight.dtype}{'' if bias is None else f' and a bias {tuple(bias.shape)}'}"
            )
            raise CheckpointError(
                f"{str(original)!r} should hold {prefix}weight of shape {shape}"
                f"{' and a bias' if description.bias else ''}. Found {found}."
            )
        module = filled(description, after)
        for other in {parameter.dtype for parameter in module.parameters()} - {weight.dtype}:
            raise CheckpointError(
                f"{str(original)!r} should hold {prefix}weight in {other}, as {str(compressed)!r} does. "
                f"Found {weight.dtype}: --dtype converts it."
            )
        layer = _bilinear(weight, bias)
        if device is not None:
            layer, module = layer.to(device), module.to(device)
        settle(module)
        measured = error_on(layer, rows[description.name]) if description.name in rows else None
        entry = compare_layers(description.name, layer, module, batch_size, measured)
        layers.append(replace(entry, aliases=description.names[1:]))
    return Report(
        layers=tuple(layers),
        model_bytes_before=sum(v.numel() * v.element_size() for v in _unique(before)),
        model_bytes_after=sum(v.numel() * v.element_size() for v in _unique(after)),
        environment=environment(device or torch.device("cpu"), before[f"{prefix}weight"].dtype),
    )


def descriptions(path: str | os.PathLike[str]) -> list[LayerDescription]:
    """The replaced layers where the file is one of ours, none where it is any other."""
    try:
        metadata = read_safetensors(path)[1]
    except CompressionError:
        return []
    return read_container(path)[1] if METADATA_KEY in metadata else []
