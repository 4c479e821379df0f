"""Checkpoints without their network's code: find what may be bilinear weights, compress them, compare two files."""

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import CheckpointError, MatchError
from ..files import LayerDescription, by_layer, describe, filled, read_state
from ..fitting import environment
from ..modules import FoundLayer, place
from ..report import Report
from ._api import Plan, plan
from ._rows import batches, call_rows, error_on, read_rows
from ._verdict import compare_layers

_TIMED_ROWS = 256  # of a call, whatever a file of rows holds
_LONGEST_KERNEL = 16  # a last dimension below this may well be a convolution's kernel


def stored_weights(state: Mapping[str, Tensor]) -> list[FoundLayer]:
    """All weights "....weight" that may be an `nn.Bilinear`'s, as such layers in the state's memory, in its order.

    They have three dimensions, are floating, and stand alone or with a bias. One layer under several names comes once:
    weight and bias are in the same memory. The name of a bare "weight" is "".
    """
    parts: dict[str, set[str]] = {}  # of each module, the names of its tensors and submodules
    for key in state:
        path = key.split(".")
        for count in range(len(path)):
            parts.setdefault(".".join(path[:count]), set()).add(path[count])
    layers: dict[Hashable, tuple[list[str], nn.Bilinear]] = {}
    for key, weight in _three_dimensional(state).items():
        name, _, last = key.rpartition(".")
        bias = state.get(f"{name}.bias" if name else "bias")
        fits = bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype)
        if last == "weight" and fits and parts[name] <= {"weight", "bias"}:  # an nn.Bilinear holds nothing else
            out, in1, in2 = weight.shape
            layer = nn.Bilinear(in1, in2, out, bias is not None, device="meta", dtype=weight.dtype)
            layer.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})}, assign=True)
            where = place(weight), bias if bias is None else place(bias)
            layers.setdefault(where, ([], layer))[0].append(name)
    return [FoundLayer(tuple(names), layer) for names, layer in layers.values()]


def _three_dimensional(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: x for key, x in state.items() if x.dim() == 3 and x.is_floating_point() and x.numel()}


def maybe_convolution(found: FoundLayer) -> bool:
    """Whether the last dimension is short enough for a one-dimensional convolution's kernel."""
    return found.layer.in2_features < _LONGEST_KERNEL


def unknown_weights(state: Mapping[str, Tensor]) -> str:
    """A sentence about three-dimensional tensors that other modules may hold, or nothing."""
    known = {name for found in stored_weights(state) for name in found.parameter_names()}
    shapes = {key: "x".join(map(str, value.shape)) for key, value in _three_dimensional(state).items()}
    others = [f"{key} ({shape})" for key, shape in shapes.items() if key not in known]
    may_be = " may be a bilinear weight in another form, which needs the network's code: cb.compress."
    return f" {', '.join(others)}{may_be}" if others else ""


def choose_weights(state: Mapping[str, Tensor], globs: Sequence[str]) -> list[FoundLayer]:
    """The weights that the globs name, or without globs the only one there is, where it is unambiguous.

    Raises: MatchError where a glob matches nothing, or there is no glob and a weight may be a convolution's.
    """
    weights = stored_weights(state)
    if not weights:
        required = "The file should hold the three-dimensional weight (out, in1, in2) of an nn.Bilinear. Found none."
        raise MatchError(required + unknown_weights(state))
    listing = ", ".join(
        f"{' = '.join(stored.labels)} ({'x'.join(map(str, stored.layer.weight.shape))}"
        f"{', conv1d?' if maybe_convolution(stored) else ''})"
        for stored in weights
    )
    for glob in globs:
        if not any(stored.matches(glob) for stored in weights):
            raise MatchError(f"--layers {glob!r} should match a three-dimensional weight. Found: {listing}.")
    if globs:
        return [stored for stored in weights if any(stored.matches(glob) for glob in globs)]
    if len(weights) == 1 and not maybe_convolution(weights[0]):
        return weights
    raise MatchError(
        "--layers PATTERN is needed: a three-dimensional weight may be an nn.Bilinear's (out, in1, in2) or a "
        f"convolution's (out, in, kernel). Found: {listing}."
    )


def compress_state(
    state: Mapping[str, Tensor],
    chosen: Sequence[FoundLayer],
    config: Config | Mapping[str, Config | None],
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    calibration: str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[Plan[nn.Module], dict[str, Tensor], list[LayerDescription]]:
    """Plan the compression of the chosen weights: the plan, and the state and descriptions for `written`.

    A weight that the file has under two names stays under both.

    Args:
        device: where to solve and measure; only the chosen weights are moved there.
        dtype: what the whole state is converted to first, as by `model.to(dtype)`; None leaves it as it is stored.
        calibration: a file of rows; see `read_rows`.
        options: those of `plan`.
    """
    stored_dtype = chosen[0].layer.weight.dtype
    if dtype is not None:
        state, names = _cast(state, dtype), {stored.names for stored in chosen}
        chosen = [stored for stored in stored_weights(state) if stored.names in names]
    model = _model_of(chosen)
    model = model if device is None else model.to(device)
    if calibration is not None:
        selected = {name: stored.names[0] for stored in chosen for name in stored.names}
        rows = read_rows(calibration, _shapes(state), selected)
        options = {"batch_size": _TIMED_ROWS, **options, "calibration": batches(rows, model), "forward_fn": call_rows}
    planned = plan(model, config, **options)
    compressed, _ = planned.apply()
    result, descriptions = dict(state), describe(compressed)
    modules = dict(compressed.named_modules(remove_duplicate=False))
    for description in descriptions:
        for name in description.names:
            prefix = f"{name}." if name else ""
            for key in ("weight", "bias"):
                result.pop(prefix + key, None)
            result |= {prefix + key: value for key, value in modules[name].state_dict().items()}
    report, total = planned.report, _bytes(state)
    converted = {"converted": f"from {str(stored_dtype).removeprefix('torch.')} before anything was measured"}
    planned.report = replace(
        report,
        model_bytes_before=total,
        model_bytes_after=total - (report.model_bytes_before - report.model_bytes_after),
        environment={**report.environment, **(converted if dtype not in (None, stored_dtype) else {})},
    )
    return planned, result, descriptions


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state with its floating tensors in another dtype; those that were one stay one."""
    cast = {place(value): value.to(dtype) for value in state.values() if value.is_floating_point()}
    return {name: cast.get(place(value), value) for name, value in state.items()}


def _bytes(state: Mapping[str, Tensor]) -> int:
    """Of all tensors of a state, those that share their memory once."""
    unique = {place(value) if value.numel() else id(value): value for value in state.values()}
    return sum(value.numel() * value.element_size() for value in unique.values())


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """(O, I, J) of each weight, by all its names."""
    return {name: stored.layer.weight.shape for stored in stored_weights(state) for name in stored.names}


def _model_of(chosen: Sequence[FoundLayer]) -> nn.Module:
    """A module that holds an `nn.Bilinear` under all names of each weight; the layer itself if it is the whole file."""
    model = nn.Module()
    for stored in chosen:
        if stored.names == ("",):
            return stored.layer
        for name in stored.names:
            model._modules[name] = stored.layer  # not add_module, which refuses dots and the names of methods
    return model


def compare_files(
    original: str | os.PathLike[str],
    compressed: str | os.PathLike[str],
    batch_size: int | None = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    calibration: str | os.PathLike[str] | None = None,
    key: str | None = None,
) -> Report:
    """The report on a compressed file against the original checkpoint, measured here and now.

    Args:
        batch_size: rows in a timed call; None times none.
        device: where to measure.
        dtype: what the original is converted to first; None leaves it as it is stored.
        calibration: a file of rows to measure output errors on; None measures none.
        key: of the state dict in the original; see `read_state`.

    Raises: CheckpointError where a file cannot be read, or the original lacks a layer or has it otherwise.
    """
    before, _ = read_state(original, key)
    before = before if dtype is None else _cast(before, dtype)
    after, descriptions = read_state(compressed)
    if not descriptions:
        raise CheckpointError(f"{str(compressed)!r} should hold replaced layers. Found none.")
    names = {name: description.name for description in descriptions for name in description.names}
    rows = {} if calibration is None else read_rows(calibration, _shapes(before), names)
    own, _ = by_layer(after, descriptions)
    layers = []
    for description in descriptions:
        layer = _original_layer(before, description, original, compressed)
        module = filled(description, own[description.name], device)
        for other in {parameter.dtype for parameter in module.parameters()} - {layer.weight.dtype}:
            raise CheckpointError(
                f"{str(original)!r} should hold layer {description.label!r} in {other}, as {str(compressed)!r} does. "
                f"Found {layer.weight.dtype}: --dtype converts it."
            )
        layer = layer if device is None else layer.to(device)
        held_out = error_on(layer, rows[description.name]) if description.name in rows else None
        entry = compare_layers(description.name, layer, module, batch_size, held_out)
        layers.append(replace(entry, aliases=description.names[1:]))
    return Report(
        layers=tuple(layers),
        model_bytes_before=_bytes(before),
        model_bytes_after=_bytes(after),
        environment=environment(device or torch.device("cpu"), layer.weight.dtype),
    )


def _original_layer(
    state: Mapping[str, Tensor],
    description: LayerDescription,
    original: str | os.PathLike[str],
    compressed: str | os.PathLike[str],
) -> nn.Bilinear:
    """The layer that a description of the compressed file is for, from the original's state."""
    if description.adapter is not None:
        raise CheckpointError(
            f"{str(compressed)!r} should hold layers that were nn.Bilinear, to be compared without the network's "
            f"code. Found {description.label!r}, which was of the form {description.adapter!r}."
        )
    layer = next((one.layer for one in stored_weights(state) if description.name in one.names), None)
    if layer is None or layer.weight.shape != description.shape or (layer.bias is not None) != description.bias:
        parts = {} if layer is None else dict(layer.named_parameters())
        found = ", ".join(f"{name} {tuple(part.shape)}" for name, part in parts.items())
        raise CheckpointError(
            f"{str(original)!r} should hold the weight of {description.label!r} of shape {description.shape}"
            f"{' and a bias' if description.bias else ''}. Found {found or 'none'}."
        )
    return layer
