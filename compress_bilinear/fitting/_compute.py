"""How a quantized layer computes, chosen by measurement: what each mode takes, holds and changes."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..config import AutoConfig, Compute, Config, MaxError
from ..errors import ConfigError
from ..modules import CompressedBilinear
from ..report import ComputeMode
from ._calibrate import LayerInputs
from ._measure import Latency, OutputError, latencies, resident_bytes, stored_bytes

ComputeAsked: TypeAlias = Compute | Literal["fastest"]
MODES = ("fastest", *get_args(Compute))

Inputs: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ComputeChoice:
    """How a quantized layer computes from now on, and what that was chosen by.

    Attributes:
        compute: "on_the_fly", "resident", "int8" or "bitsandbytes".
        stored_bytes: what a file of it takes.
        resident_bytes: what it takes in memory: those, and what is kept de-quantized.
        latencies: of a call in each mode that was measured; empty where the mode was given.
        modes: the same as a report has it, with what each mode changes, and why those that are missing are.
    """

    compute: Compute
    stored_bytes: int
    resident_bytes: int
    latencies: Mapping[str, Latency]
    modes: tuple[ComputeMode, ...] = ()

    def __str__(self) -> str:
        timed = ", ".join(f"{mode} {latency.median:.3g} ms" for mode, latency in self.latencies.items())
        held = f"stores {self.stored_bytes} bytes, holds {self.resident_bytes}"
        return f"{self.compute} ({held}{'; ' if timed else ''}{timed})"


def check_compute(compute: object) -> None:
    """Raise ConfigError unless it is "fastest" or a mode."""
    if compute not in MODES:
        raise ConfigError(f"`compute` should be one of {MODES}. Found {compute!r}.")


def check_asked(compute: object, configs: Iterable[Config], measure_latency: bool) -> None:
    """Raise ConfigError as `check_compute`, and where a mode could hold for no layer, or could not be chosen."""
    check_compute(compute)
    if compute == "fastest" and not measure_latency:
        raise ConfigError("`compute='fastest'` is chosen by latencies. Found `measure_latency=False`.")
    formats = [isinstance(config, AutoConfig) or config.quantize is not None for config in configs]
    if compute != "on_the_fly" and not any(formats):
        raise ConfigError(f"`compute={compute!r}` needs a config with `quantize`. Found none.")


def choose_compute(
    layer: CompressedBilinear,
    asked: ComputeAsked,
    inputs: Inputs,
    *,
    timed: bool = True,
    objection: Callable[[CompressedBilinear], str | None] = lambda _: None,
    strict: bool = False,
) -> ComputeChoice:
    """Set a quantized layer's mode, and say what that was chosen by.

    "fastest" leaves "on_the_fly" only for a mode that is faster beyond the spread: its upper quartile below the other's
    lower one. A mode that the layer does not have gives "on_the_fly".

    Args:
        inputs: (N, I) and (N, J), of a timed call, in the dtype that resident weights are for.
        timed: whether to time the modes; "fastest" does in any case. Else "bitsandbytes" is told of only if asked for.
        objection: why a layer in some mode should not be chosen by "fastest", or None.
        strict: whether that also stands against a mode that was asked for.
    """
    device, dtype = inputs[0].device, inputs[0].dtype
    timed = timed or asked == "fastest"
    # bitsandbytes takes seconds to be imported, which nothing is to wait for that neither times nor wants it
    told = [mode for mode in get_args(Compute) if timed or mode in (asked, "on_the_fly", "resident", "int8")]
    reasons: dict[Compute, str | None] = {mode: layer.refused_compute(mode) for mode in told}
    layers: dict[Compute, CompressedBilinear] = {}
    for mode in [mode for mode in told if timed and reasons[mode] is None]:
        layers[mode] = copy.deepcopy(layer)
        layers[mode].set_compute(mode, dtype)
    if asked == "fastest":
        reasons |= {mode: objection(copied) for mode, copied in layers.items() if mode != "on_the_fly"}

    def call(module: CompressedBilinear) -> Callable[[], object]:
        return lambda: module(*inputs)

    with torch.no_grad():
        found = latencies({mode: call(copied) for mode, copied in layers.items()}, device) if layers else {}
        changes = {mode: _change(layers["on_the_fly"], copied, inputs) for mode, copied in layers.items()}
    chosen: Compute = "on_the_fly"
    if asked == "fastest":
        faster = [other for other in layers if found[other].upper < found[chosen].lower and reasons[other] is None]
        chosen = min(faster, key=lambda other: found[other].median, default=chosen)
    elif reasons[asked] is None:
        if strict and asked != "on_the_fly":
            so = copy.deepcopy(layer)
            so.set_compute(asked, dtype)
            reasons[asked] = objection(so)
        chosen = chosen if reasons[asked] else asked
    layer.set_compute(chosen, dtype)
    modes = tuple(
        ComputeMode(
            mode=other,
            chosen=other == chosen,
            latency_ms=found[other].median if other in found else None,
            latency_quartiles_ms=(found[other].lower, found[other].upper) if other in found else None,
            resident_bytes=resident_bytes(layers[other]) if other in layers else None,
            output_change=changes.get(other),
            refused=reason,
        )
        for other, reason in reasons.items()
    )
    sizes = {"stored_bytes": stored_bytes(layer), "resident_bytes": resident_bytes(layer)}
    return ComputeChoice(compute=chosen, latencies=found, modes=modes, **sizes)


def _change(base: CompressedBilinear, other: CompressedBilinear, inputs: Inputs) -> float | None:
    """‖y − y'‖ / ‖y − b‖ of the outputs in two modes; None where nothing but the bias comes out."""
    outputs, changed = base(*inputs).double(), other(*inputs).double()
    bias = base.bias
    total = outputs - bias.double() if isinstance(bias, Tensor) else outputs
    return float((outputs - changed).norm() / total.norm()) if bool(total.any()) else None


def random_rows(layer: CompressedBilinear | nn.Bilinear, rows: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Gaussian inputs of a layer, the same each time."""
    generator = torch.Generator().manual_seed(0)
    sizes = (layer.in1_features, layer.in2_features)
    first, second = (torch.randn(rows, size, generator=generator).to(device, dtype) for size in sizes)
    return first, second


def seen_rows(layer: nn.Bilinear, seen: LayerInputs | None, rows: int) -> Inputs:
    """Rows for a timed call such as the layer saw, over and over where they are too few; Gaussian ones without."""
    weight = layer.weight
    if seen is None or len(seen.input1) == 0:
        return random_rows(layer, rows, weight.device, weight.dtype)
    index = torch.arange(rows, device=seen.input1.device) % len(seen.input1)
    first, second = (value[index].to(weight.device, weight.dtype) for value in (seen.input1, seen.input2))
    return first, second


def misses(limit: MaxError | None, measured: OutputError | None) -> Callable[[CompressedBilinear], str | None]:
    """Why a layer is not to compute with rounded inputs: its output error is above what is allowed."""

    def objection(layer: CompressedBilinear) -> str | None:
        if layer.compute != "int8" or limit is None or limit.on != "output" or measured is None:
            return None
        error = measured.of(layer)
        return None if error is None or error <= limit.error else f"its output error {error:.4g} misses {limit.error:g}"

    return objection
