"""Compressed layers in another storage format: floating point to be fine-tuned, 8 or 4 bits; and how they compute."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import nn

from . import discovery
from .config import Compute, Quantize, check_quantize
from .errors import CompressionError, ConfigError, MatchError
from .measure import Latency, latencies, resident_bytes, stored_bytes
from .modules import CompressedBilinear, stored_as

MODES = ("fastest", *get_args(Compute))

_Model = TypeVar("_Model", bound=nn.Module)


def dequantize(model: _Model, *, dtype: torch.dtype | None = None, inplace: bool = False) -> _Model:
    """Store the quantized layers in floating point, as parameters that can be fine-tuned.

    They have the same function, up to rounding in `dtype`, and take inputs of that dtype alone, as plain layers do.
    Afterwards `cb.quantize(model)` rounds them again.

    Args:
        model: any module; a compressed layer itself too.
        dtype: of the factors. None takes that of each layer's bias; without one, of the model's first floating
            parameter; without one, float32.
        inplace: False leaves the model as it is and returns a copy.

    Returns:
        The model, its quantized layers in floating point. New factors require gradients; a bias keeps its flag.

    Raises:
        MatchError: no layer is quantized; the message lists what there is.
        ConfigError: `dtype` is not floating.
        CompressionError: a layer has hooks or wrapped inner layers, which would be lost; or `inplace=True` where the
            model is itself the layer. The model is left exactly as it was.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"`dtype` should be a floating torch.dtype or None. Found {dtype!r}.")
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def convert(layer: CompressedBilinear) -> CompressedBilinear:
        bias = layer.bias
        kept = bias.dtype if isinstance(bias, torch.Tensor) else first
        return stored_as(layer, None, dtype or kept)

    return _converted(model, lambda layer: layer.quantize is not None, "that is quantized", convert, inplace)


def quantize(model: _Model, quantize: Quantize = "int8", *, inplace: bool = False) -> _Model:
    """Store compressed layers that are in floating point in 8 or 4 bits: the way back from `dequantize`.

    It rounds what `CPBilinear`, `TuckerBilinear` and `DenseBilinear` hold, value by value. For an `nn.Bilinear`, see
    `compress`, which also fits factors to how others were rounded, and measures what that costs.

    Args:
        model: any module; a compressed layer itself too.
        quantize: the storage format, "int8" or "nf4".
        inplace: False leaves the model as it is and returns a copy.

    Raises:
        MatchError: no compressed layer is in floating point; the message lists what there is.
        ConfigError: another `quantize`.
        CompressionError: as for `dequantize`; or factors are not finite.
    """
    check_quantize(quantize)
    if quantize is None:
        raise ConfigError("`quantize` should name a storage format. Found None: `dequantize` gives floating point.")

    def convert(layer: CompressedBilinear) -> CompressedBilinear:
        return stored_as(layer, quantize, torch.float64)

    return _converted(model, lambda layer: layer.quantize is None, "in floating point", convert, inplace)


@dataclass(frozen=True, kw_only=True)
class ComputeChoice:
    """How a quantized layer computes from now on, and what that was chosen by.

    Attributes:
        compute: "on_the_fly", "resident" or "int8".
        stored_bytes: what a file of it takes.
        resident_bytes: what it takes in memory: those, and what is kept de-quantized.
        latencies: of a call in each mode that was measured; empty where the mode was given.
    """

    compute: Compute
    stored_bytes: int
    resident_bytes: int
    latencies: Mapping[str, Latency]

    def __str__(self) -> str:
        timed = ", ".join(f"{mode} {latency.median:.3g} ms" for mode, latency in self.latencies.items())
        held = f"stores {self.stored_bytes} bytes, holds {self.resident_bytes}"
        return f"{self.compute} ({held}{'; ' if timed else ''}{timed})"


def set_compute(
    model: nn.Module,
    compute: Compute | Literal["fastest"] = "fastest",
    *,
    rows: int = 64,
    dtype: torch.dtype | None = None,
) -> dict[str, ComputeChoice]:
    """Choose how the quantized layers of a model compute, in place. Neither values nor files change.

    Args:
        model: any module; a compressed layer itself too.
        compute: a mode for each layer that has it (see `CompressedBilinear.set_compute`); others compute on the fly.
            "fastest" times every mode of each layer side by side, without gradients, and leaves "on_the_fly" only for
            one that is faster beyond the spread: its upper quartile below the other's lower one.
        rows: of a timed call.
        dtype: of the inputs, which resident weights are for. None takes each layer's bias's; without one, float32.

    Returns:
        For each layer's name what was chosen, with bytes and latencies.

    Raises:
        MatchError: no layer is quantized; the message lists what there is.
        ConfigError: another `compute`, no positive number of rows, or a mode that none of the layers has.
    """
    if compute not in MODES:
        raise ConfigError(f"`compute` should be one of {MODES}. Found {compute!r}.")
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"`rows` should be a positive int. Found {rows!r}.")
    found = discovery.find_compressed(model)
    layers = {name: layer for name, layer in found.items() if layer.quantize is not None}
    if not layers:
        there = ", ".join(f"{name or '(root)'} ({layer.method})" for name, layer in found.items())
        raise MatchError(f"The model should contain a quantized layer. Found {there or 'no compressed layer'}.")
    if compute != "fastest" and not any(compute in layer.computes for layer in layers.values()):
        raise ConfigError(f"A layer should have the mode {compute!r}, which is for those in int8. Found none.")
    choices = {}
    for name, layer in layers.items():
        bias = layer.bias
        wanted = dtype or (bias.dtype if isinstance(bias, torch.Tensor) else torch.float32)
        timed = _timed(layer, rows, wanted) if compute == "fastest" else {}
        mode: Compute = "on_the_fly"
        if compute == "fastest":
            base = timed["on_the_fly"]
            faster = [other for other in layer.computes if timed[other].upper < base.lower]
            mode = min(faster, key=lambda other: timed[other].median, default=mode)
        elif compute in layer.computes:
            mode = compute
        layer.set_compute(mode, wanted)
        sizes = {"stored_bytes": stored_bytes(layer), "resident_bytes": resident_bytes(layer)}
        choices[name] = ComputeChoice(compute=mode, latencies=timed, **sizes)
    return choices


def _timed(layer: CompressedBilinear, rows: int, dtype: torch.dtype) -> dict[str, Latency]:
    """Latencies of a copy of the layer in each of its modes."""
    device = next(layer.buffers()).device
    generator = torch.Generator().manual_seed(0)
    sizes = (layer.in1_features, layer.in2_features)
    input1, input2 = (torch.randn(rows, size, generator=generator).to(device, dtype) for size in sizes)

    def call(mode: Compute) -> Callable[[], object]:
        copied = copy.deepcopy(layer)
        copied.set_compute(mode, dtype)
        return lambda: copied(input1, input2)

    with torch.no_grad():
        return latencies({mode: call(mode) for mode in layer.computes}, device)


def _converted(
    model: _Model,
    wanted: Callable[[CompressedBilinear], bool],
    what: str,
    convert: Callable[[CompressedBilinear], CompressedBilinear],
    inplace: bool,
) -> _Model:
    layers = discovery.find_compressed(model)
    names = [name for name, layer in layers.items() if wanted(layer)]
    if not names:
        there = ", ".join(f"{name or '(root)'} ({layer.method}, {layer.quantize})" for name, layer in layers.items())
        raise MatchError(f"The model should contain a compressed layer {what}. Found {there or 'no compressed layer'}.")
    if inplace and names == [""]:
        raise CompressionError(
            "`inplace=True` needs a model that contains the layer. Found a model that is itself the "
            f"{type(model).__name__}: use what `inplace=False` returns."
        )
    for name in names:
        hooked = discovery.hooked(layers[name])
        if hooked is not None:
            raise CompressionError(f"Layer {name or '(root)'!r} cannot be stored otherwise: {hooked}.")
    target = model if inplace else copy.deepcopy(model)
    found = discovery.find_compressed(target)
    new = {id(found[name]): convert(found[name]) for name in names}
    if names == [""]:
        return new[id(target)]  # type: ignore[return-value]
    discovery.swap(target, new)
    return target
