"""How a quantized layer computes: chosen by measured latency, memory and change of the outputs."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from ..config import COMPUTE_ERROR, Compute, ComputeAsked, MaxError
from ..modules import CompressedBilinear
from ..report import ComputeMode
from ._latency import Latency, latencies
from ._measure import OutputError, stored_bytes

Inputs: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class ComputeChoice:
    """How a quantized layer computes from now on, and what that was chosen by.

    Attributes:
        compute: "on_the_fly", "bfloat16", "int8" or "bitsandbytes".
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
    asked: ComputeAsked | None,
    inputs: Inputs,
    *,
    timed: bool = True,
    reason_against: Callable[[CompressedBilinear], str | None] = lambda _: None,
    most_change: float = COMPUTE_ERROR,
    strict: bool = False,
    seconds: float = 1.0,
) -> ComputeChoice:
    """Set a quantized layer's mode, and say what that was chosen by.

    "fastest" leaves "on_the_fly" only for a mode that is faster beyond the spread: its upper quartile is below the
    lower one on the fly. It takes the mode from the fewest rows on for which that holds, and changes nothing below.
    A mode that the layer does not have gives "on_the_fly".

    Args:
        asked: None is "fastest" without bitsandbytes.
        inputs: (N, I) and (N, J), of a timed call.
        timed: whether to time the modes; "fastest" does in any case.
        reason_against: why a layer in some mode should not be chosen by "fastest", or None.
        most_change: ‖y − ŷ‖/‖ŷ − b‖ of outputs above which a mode is not chosen by "fastest".
        strict: whether `reason_against` also stands against a mode that was asked for.
        seconds: about how long to time the modes.
    """
    given = None if asked == "fastest" else asked
    timed = timed or given is None
    # importing bitsandbytes takes seconds: only who wants it waits for that
    modes: list[Compute] = [mode for mode in get_args(Compute) if mode != "bitsandbytes" or asked in (mode, "fastest")]
    reasons: dict[Compute, str | None] = {mode: layer.refused_compute(mode) for mode in modes}
    layers = {mode: _in_mode(layer, mode) for mode, reason in reasons.items() if timed and reason is None}
    if given is None:
        reasons |= {mode: reason_against(copied) for mode, copied in layers.items() if mode != "on_the_fly"}
    elif strict and given != "on_the_fly" and reasons[given] is None:
        reasons[given] = reason_against(_in_mode(layer, given))
    measured = _timed(layers, inputs, seconds)
    changes = _changes(layers, inputs)
    chosen: Compute = "on_the_fly"
    rows = 1
    if given is None:
        for mode, change in changes.items():
            if change is not None and change > most_change and reasons[mode] is None:
                reasons[mode] = f"it changes the outputs by {change:.2g}, and {most_change:g} is allowed"
        faster = [mode for mode in layers if reasons[mode] is None and measured[mode].upper < measured[chosen].lower]
        chosen = min(faster, key=lambda mode: measured[mode].median, default=chosen)
        rows = _fewest_rows(layers["on_the_fly"], layers[chosen], inputs, seconds)
    elif reasons[given] is None:
        chosen = given
    layer.set_compute(chosen, rows)
    found = []
    for mode, reason in reasons.items():
        known = measured.get(mode)
        facts: dict[str, Any] = {} if known is None else {"latency_ms": known.median, "output_change": changes[mode]}
        facts |= {} if known is None else {"latency_quartiles_ms": (known.lower, known.upper)}
        facts |= {"chosen": mode == chosen, "rows": rows if mode == chosen else 1}
        found.append(ComputeMode(mode=mode, refused=reason, **facts))
    return ComputeChoice(compute=chosen, modes=tuple(found), stored_bytes=stored_bytes(layer))


def _in_mode(layer: CompressedBilinear, mode: Compute) -> CompressedBilinear:
    """A copy in a mode, which shares all tensors."""
    copied = copy.deepcopy(layer, {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())})
    copied.set_compute(mode)
    return copied


def _timed(layers: Mapping[Compute, CompressedBilinear], inputs: Inputs, seconds: float) -> dict[str, Latency]:
    calls: dict[str, Callable[[], object]] = {mode: partial(layer, *inputs) for mode, layer in layers.items()}
    with torch.no_grad():
        return latencies(calls, inputs[0].device, seconds) if calls else {}


@torch.no_grad()
def _changes(layers: Mapping[Compute, CompressedBilinear], inputs: Inputs) -> dict[Compute, float | None]:
    """‖y − y'‖/‖y − b‖ of the outputs on the fly and in each mode: None where only the bias comes out."""
    if not layers:
        return {}
    base = layers["on_the_fly"]
    outputs = base(*inputs).double()
    total = (outputs - base.bias.double() if isinstance(base.bias, Tensor) else outputs).norm()
    found: dict[Compute, float | None] = {"on_the_fly": 0.0 if total else None}
    for mode, layer in layers.items():
        if mode != "on_the_fly":
            found[mode] = float((outputs - layer(*inputs).double()).norm() / total) if total else None
    return found


def _fewest_rows(base: CompressedBilinear, faster: CompressedBilinear, inputs: Inputs, seconds: float) -> int:
    """The fewest rows, by factors of four, from which the one is faster than the other, as far as the time allows."""
    if base is faster:
        return 1
    rows, end = max(1, len(inputs[0])), time.perf_counter() + seconds
    while rows > 1 and time.perf_counter() < end:
        first, second = (value[: -(-rows // 4)] for value in inputs)
        measured = _timed({"on_the_fly": base, faster.compute: faster}, (first, second), seconds / 4)
        if measured[faster.compute].upper >= measured["on_the_fly"].lower:
            break
        rows = len(first)
    return rows


def reason_against_rounded_inputs(
    layer: CompressedBilinear, limit: MaxError | None, held_out: OutputError | None
) -> str | None:
    """Why a layer that rounds its inputs should not be used: its output error is above the limit."""
    if layer.compute not in ("bfloat16", "int8") or limit is None or limit.on != "output" or held_out is None:
        return None
    error = held_out.of(layer)
    return None if error is None or error <= limit.error else f"its output error {error:.4g} misses {limit.error:g}"
