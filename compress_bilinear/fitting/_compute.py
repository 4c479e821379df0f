"""How a quantized layer computes: chosen by measured latency, memory and change of the outputs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from ..config import Compute, ComputeAsked, MaxError
from ..modules import CompressedBilinear
from ..report import ComputeMode
from ._latency import Latency, latencies
from ._measure import OutputError, stored_bytes

Inputs: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ComputeChoice:
    """How a quantized layer computes from now on, and what that was chosen by.

    Attributes:
        compute: "on_the_fly", "int8" or "bitsandbytes".
        stored_bytes: what a file of it takes.
        modes: each mode as it was measured, with the reason against it, if any.
    """

    compute: Compute
    stored_bytes: int
    modes: tuple[ComputeMode, ...] = ()

    @property
    def latencies(self) -> dict[str, float]:
        """Median milliseconds of a call in each mode that was measured; empty where the mode was given."""
        return {mode.mode: mode.latency_ms for mode in self.modes if mode.latency_ms is not None}

    def __str__(self) -> str:
        timed = ", ".join(f"{mode} {latency:.3g} ms" for mode, latency in self.latencies.items())
        return f"{self.compute} (stores {self.stored_bytes} bytes{'; ' if timed else ''}{timed})"


def choose_compute(
    layer: CompressedBilinear,
    asked: ComputeAsked,
    inputs: Inputs,
    *,
    timed: bool = True,
    reason_against: Callable[[CompressedBilinear], str | None] = lambda _: None,
    strict: bool = False,
    seconds: float = 1.0,
) -> ComputeChoice:
    """Set a quantized layer's mode, and say what that was chosen by.

    "fastest" leaves "on_the_fly" only for a mode that is faster beyond the spread: its upper quartile is below the
    lower one on the fly. A mode that the layer does not have gives "on_the_fly".

    Args:
        inputs: (N, I) and (N, J), of a timed call.
        timed: whether to time the modes; "fastest" does in any case.
        reason_against: why a layer in some mode should not be chosen by "fastest", or None.
        strict: whether that also stands against a mode that was asked for.
        seconds: about how long to time the modes.
    """
    timed = timed or asked == "fastest"
    # importing bitsandbytes takes seconds: only who times it or wants it waits for that
    modes: list[Compute] = [mode for mode in get_args(Compute) if timed or mode == asked or mode != "bitsandbytes"]
    reasons: dict[Compute, str | None] = {mode: layer.refused_compute(mode) for mode in modes}
    layers = {mode: _in_mode(layer, mode) for mode, reason in reasons.items() if timed and reason is None}
    if asked == "fastest":
        reasons |= {mode: reason_against(copied) for mode, copied in layers.items() if mode != "on_the_fly"}
    elif strict and asked != "on_the_fly" and reasons[asked] is None:
        reasons[asked] = reason_against(_in_mode(layer, asked))
    calls: dict[str, Callable[[], object]] = {mode: partial(copied, *inputs) for mode, copied in layers.items()}
    with torch.no_grad():
        measured = latencies(calls, inputs[0].device, seconds) if calls else {}
        facts = {mode: _facts(measured[mode], layers["on_the_fly"], copied, inputs) for mode, copied in layers.items()}
    chosen: Compute = "on_the_fly"
    if asked == "fastest":
        faster = [mode for mode in layers if reasons[mode] is None and measured[mode].upper < measured[chosen].lower]
        chosen = min(faster, key=lambda mode: measured[mode].median, default=chosen)
    elif reasons[asked] is None:
        chosen = asked
    layer.set_compute(chosen)
    found = [
        ComputeMode(mode=mode, chosen=mode == chosen, refused=reason, **facts.get(mode, {}))
        for mode, reason in reasons.items()
    ]
    return ComputeChoice(compute=chosen, modes=tuple(found), stored_bytes=stored_bytes(layer))


def _in_mode(layer: CompressedBilinear, mode: Compute) -> CompressedBilinear:
    copied = copy.deepcopy(layer)
    copied.set_compute(mode)
    return copied


def _facts(latency: Latency, base: CompressedBilinear, other: CompressedBilinear, inputs: Inputs) -> dict[str, Any]:
    """The figures of a mode. ‖y − y'‖/‖y − b‖ is of the outputs in two modes: None where only the bias comes out."""
    outputs, changed = base(*inputs).double(), other(*inputs).double()
    total = outputs - base.bias.double() if isinstance(base.bias, Tensor) else outputs
    change = float((outputs - changed).norm() / total.norm()) if bool(total.any()) else None
    quartiles = (latency.lower, latency.upper)
    return {"latency_ms": latency.median, "latency_quartiles_ms": quartiles, "output_change": change}


def reason_against_rounded_inputs(
    layer: CompressedBilinear, limit: MaxError | None, held_out: OutputError | None
) -> str | None:
    """Why a layer that rounds its inputs should not be used: its output error is above the limit."""
    if layer.compute != "int8" or limit is None or limit.on != "output" or held_out is None:
        return None
    error = held_out.of(layer)
    return None if error is None or error <= limit.error else f"its output error {error:.4g} misses {limit.error:g}"
