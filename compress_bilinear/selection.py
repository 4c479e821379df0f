"""From a config to a replacement for one layer, whether it is worth making, and the record of that."""

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import assert_never

from . import decomposition as decompose
from . import ops
from .calibration import LayerInputs
from .config import Config, CPConfig, DenseConfig, MaxError, MaxSize, TuckerConfig
from .discovery import FoundLayer, is_lazy
from .errors import AmplificationWarning, InfeasibleError
from .measure import (
    Timing,
    output_error,
    parameter_count,
    stored_bytes,
    time_adapted,
    time_replacement,
    weight_error,
)
from .modules import CompressedBilinear, CPBilinear, DenseBilinear, TuckerBilinear
from .report import AS_CONFIGURED, LayerReport

_ATTEMPTS = 4  # at a target that rounding made miss
_ROUNDING = 0.011  # relative error of 8-bit factors that do not cancel


@dataclass(frozen=True, eq=False)
class Decision:
    """What becomes of a layer: its replacement, None where it is kept, and the record of it."""

    replacement: CompressedBilinear | None
    report: LayerReport


@dataclass(frozen=True, eq=False)
class Candidate:
    """A replacement that has been solved for: the module, its error as stored, and CP's amplification."""

    module: CompressedBilinear
    weight_error: float
    amplification: float | None


def solve(
    layer: nn.Bilinear,
    config: Config,
    max_seconds: float | None = None,
    progress: decompose.Progress | None = None,
) -> Candidate:
    """Build the replacement that `config` asks for; `layer` is left as it is.

    Under a `MaxError`, rounding to the stored format counts: where it makes the target missed, the decomposition is
    solved again to a tighter one, until both fit.

    Args:
        max_seconds, progress: as in `decomposition.cp`.

    Raises:
        ConfigError: the rank does not fit the layer.
        InfeasibleError: no rank meets the target, or the weight is all zero.
    """
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(config, DenseConfig):
        module = DenseBilinear.from_bilinear(layer, quantize=config.quantize)
        return Candidate(module, weight_error(weight, module), None)
    if not bool(weight.any()):
        raise InfeasibleError("its weight is all zero: nothing to decompose, and zero factors would never train")
    rank = _without_bias(config.rank, layer) if isinstance(config.rank, MaxSize) else config.rank
    begun, shown = time.perf_counter(), 0.0

    def report(done: float, error: float) -> None:
        nonlocal shown
        shown = max(shown, done)  # an attempt begins anew, a bar does not
        if progress is not None:
            progress(shown, error)

    def attempt(rank: object) -> Candidate:
        left = None if max_seconds is None else max(max_seconds - (time.perf_counter() - begun), 1e-3)
        if left is not None and isinstance(rank, MaxError):
            left /= 2  # and the rest for another attempt
        return _decompose(weight, bias, config, rank, left, report)

    if not isinstance(rank, MaxError):
        try:
            return attempt(rank)
        except InfeasibleError as error:
            raise InfeasibleError(f"{config.rank} of the layer is too small beside its bias: {error}") from error
    target = rank.error
    if config.quantize is not None:
        target = math.sqrt(max(target**2 - _ROUNDING**2, 0.7 * target**2))
    for _ in range(_ATTEMPTS):
        found = attempt(MaxError(target))
        if found.weight_error <= rank.error:
            return found
        # truncation and rounding errors add in quadrature
        rounding = max(found.weight_error**2 - target**2, 0.0)
        remaining = rank.error**2 - 1.1 * rounding
        target = min(math.sqrt(remaining), 0.98 * target) if remaining > 0 else 0.7 * target
    stored = config.quantize or str(weight.dtype).removeprefix("torch.")
    raise InfeasibleError(
        f"A relative error of {rank.error:g} is out of reach of {stored} factors: rounding alone keeps it at "
        f"{found.weight_error:.3g}."
    )


def _decompose(
    weight: Tensor,
    bias: Tensor | None,
    config: CPConfig | TuckerConfig,
    rank: object,
    max_seconds: float | None,
    progress: decompose.Progress | None,
) -> Candidate:
    module: CompressedBilinear
    asked: dict[str, Any] = {"quantize": config.quantize, "max_seconds": max_seconds, "progress": progress}
    match config:
        case CPConfig():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AmplificationWarning)  # the report says it, of what is really used
                cp = decompose.cp(weight, rank, seed=config.seed, **asked)  # type: ignore[arg-type]
            module = CPBilinear.from_decomposition(cp, bias, quantize=config.quantize)
            return Candidate(module, weight_error(weight, module), cp.amplification)
        case TuckerConfig():
            tucker = decompose.tucker(weight, rank, cost=config.cost, **asked)  # type: ignore[arg-type]
            module = TuckerBilinear.from_decomposition(tucker, bias, quantize=config.quantize)
            return Candidate(module, weight_error(weight, module), None)
        case _:
            assert_never(config)


def _without_bias(target: MaxSize, layer: nn.Bilinear) -> MaxSize:
    """A layer's budget as a fraction of its weight: the bias is stored as it was, and the weight has what is left."""
    weight, total = layer.weight.numel() * layer.weight.element_size(), stored_bytes(layer)
    left = target.fraction * total - (total - weight)
    if left <= 0:
        raise InfeasibleError(
            f"The bias alone takes {total - weight} bytes. MaxSize({target.fraction:g}) of the layer's {total} bytes "
            f"allows {int(target.fraction * total)}."
        )
    return MaxSize(left / weight)


def objection(layer: nn.Bilinear, candidate: Candidate, config: Config) -> str | None:
    """Why a candidate is worse than the layer it would replace, or None: it must work, be smaller, and meet its target.

    An exact dense layer has the same bytes; whether it is faster is for `slowness` to say, after measuring.
    """
    if not math.isfinite(candidate.weight_error):
        return f"its factors leave the range of {_dtype(layer)}: the weight error is {candidate.weight_error}"
    if candidate.weight_error >= 1:
        return f"it keeps nothing of the weight: the weight error is {candidate.weight_error:.3g}"
    if isinstance(config, DenseConfig) and config.quantize is None:
        return None
    before, after = stored_bytes(layer), stored_bytes(candidate.module)
    if after >= before:
        return f"it is not smaller: it would store {after} bytes, the layer has {before}"
    rank = None if isinstance(config, DenseConfig) else config.rank
    if isinstance(rank, MaxError) and candidate.weight_error > rank.error:
        return f"its weight error {candidate.weight_error:.4g} misses the target {rank.error:g}"
    if isinstance(rank, MaxSize) and after > rank.fraction * before:
        return f"its {after} bytes miss the target of {rank.fraction:g} x {before}"
    return None


def slowness(timing: Timing | None, form: str = "nn.Bilinear") -> str | None:
    """Why an exact dense layer is not worth making, or None: it must be faster beyond the spread of the blocks."""
    if timing is None:
        return "whether it is faster has not been measured"
    if timing.after.upper < timing.before.lower:
        return None
    return (
        "it is not faster here beyond the spread: "
        f"{timing.after.median:.3g} ms (upper quartile {timing.after.upper:.3g}), "
        f"{form} {timing.before.median:.3g} ms (lower quartile {timing.before.lower:.3g})"
    )


def _dtype(layer: nn.Bilinear) -> str:
    return str(layer.weight.dtype).removeprefix("torch.")


def _method(config: Config) -> str:
    match config:
        case CPConfig():
            return "cp"
        case TuckerConfig():
            return "tucker"
        case DenseConfig():
            return "dense"


def _basics(found: FoundLayer, config: Config) -> dict[str, Any]:
    """What is known of a layer before anything is solved."""
    layer = found.layer
    known: dict[str, Any] = {
        "name": found.names[0],
        "aliases": tuple(found.names[1:]),
        "method": _method(config),
        "quantize": config.quantize,
        "form": found.form,
        "shape": None,
        "params_before": 0,
        "bytes_before": 0,
    }
    if not is_lazy(layer):
        shape = (layer.out_features, layer.in1_features, layer.in2_features)
        known |= {"shape": shape, "flops_before": ops.dense_flops(shape)}
        known |= {"params_before": parameter_count(layer), "bytes_before": stored_bytes(layer)}
    return known


def keep(found: FoundLayer, config: Config, reason: str, **known: Any) -> Decision:
    """The record of a layer that stays as it is; `known` are the figures of a candidate that was turned down."""
    basics = _basics(found, config)
    same = {f"{what}_after": basics.get(f"{what}_before") for what in ("params", "bytes", "flops")}
    return Decision(None, LayerReport(**{**basics, **same, "decision": "kept", "reason": reason, **known}))


def judge(
    found: FoundLayer,
    config: Config,
    candidate: Candidate,
    inputs: LayerInputs | None,
    unreached: bool,
    time_rows: int | None,
    force: bool,
) -> Decision:
    """Measure a candidate and decide.

    Args:
        inputs: rows to measure the output error on, where there are any; `unreached` says that calibration found none.
        time_rows: rows in a timed call; None measures no latency.
        force: replace whatever speaks against it.
    """
    layer, module = found.layer, candidate.module.train(found.layer.training)
    known: dict[str, Any] = {"rank": module.rank, "weight_error": candidate.weight_error}
    known["amplification"] = candidate.amplification
    if inputs is not None:
        known["output_error"] = output_error(layer, module, inputs)
        known["calibration_rows"] = len(inputs.input1)
    against = objection(layer, candidate, config)
    found_error = known.get("output_error")
    if against is None and found_error is not None and not math.isfinite(found_error):
        against = f"its outputs leave the range of {_dtype(layer)} on the calibration rows"
    if against is not None and not force:
        return keep(found, config, against, **known)
    timing = None
    if time_rows is not None and found.adapted is not None:
        timing = time_adapted(found.adapted, module)
    elif time_rows is not None:
        timing = time_replacement(layer, module, time_rows)
    if against is None and isinstance(config, DenseConfig) and config.quantize is None:
        against = slowness(timing, found.form)
        if against is not None and not force:
            return keep(found, config, against, **known, **_timing(timing))
    reason = AS_CONFIGURED if against is None else f"forced, although {against}"
    reasons = [reason]
    if timing is not None and timing.speedup < 1:
        reasons.append(f"slower here than {found.form} ({timing.speedup:.2f}x)")
    if candidate.amplification is not None and candidate.amplification > decompose.AMPLIFICATION_LIMIT:
        reasons.append(f"its components cancel (amplification {candidate.amplification:.2g})")
    if unreached:
        reasons.append("no calibration row reached it, so its output error is unknown")
    known |= {"decision": "replaced", "reason": "; ".join(reasons), "backend": "torch"}
    known |= {"params_after": parameter_count(module), "bytes_after": stored_bytes(module)}
    known |= {"flops_after": module.flops_per_row} | _timing(timing)
    report = LayerReport(**(_basics(found, config) | known))
    return Decision(module, report)


def _timing(timing: Timing | None) -> dict[str, Any]:
    if timing is None:
        return {}
    known: dict[str, Any] = {"speedup": timing.speedup, "speedup_vs_dense": timing.speedup_vs_dense}
    known |= {"batch_size": timing.batch_size, "dense_order": timing.dense_order}
    for what in ("before", "after", "dense"):
        latency = getattr(timing, what)
        known[f"latency_{what}_ms"] = latency.median
        known[f"latency_{what}_quartiles_ms"] = (latency.lower, latency.upper)
    return known
