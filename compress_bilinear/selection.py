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
from .automatic import Chooser, without_bias
from .calibration import FEWEST_ROWS
from .config import AutoConfig, Config, CPConfig, DenseConfig, LayerConfig, MaxError, MaxSize, TuckerConfig
from .decomposition import CPDecomposition
from .discovery import FoundLayer, is_lazy
from .errors import AmplificationWarning, InfeasibleError
from .fitting import Fitted, Fitting
from .measure import OutputError, Timing, parameter_count, stored_bytes, time_replacement, weight_error
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
    """A replacement that has been solved for: the module, its error as stored, and CP's amplification.

    Attributes:
        output_error: on held-out rows, where it was fitted to others.
        own_bias: whether its bias was corrected, and is no longer the layer's.
        remark: what the report should say of how it was found; empty for nothing.
    """

    module: CompressedBilinear
    weight_error: float
    amplification: float | None
    output_error: float | None = None
    own_bias: bool = False
    remark: str = ""


def solve(
    layer: nn.Bilinear,
    config: LayerConfig,
    max_seconds: float | None = None,
    progress: decompose.Progress | None = None,
    fitting: Fitting | None = None,
) -> Candidate:
    """Build the replacement that `config` asks for; `layer` is left as it is.

    Under a `MaxError`, rounding to the stored format counts: where it makes the target missed, the decomposition is
    solved again to a tighter one, until both fit.

    Args:
        max_seconds, progress: as in `decomposition.cp`.
        fitting: of the layer's outputs, where there are rows to fit to.

    Raises:
        ConfigError: the rank does not fit the layer.
        InfeasibleError: no rank meets the target, or the weight is all zero.
    """
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(config, DenseConfig):
        if fitting is not None and config.quantize is not None:
            return as_candidate(layer, fitting.dense(config))
        module = DenseBilinear.from_bilinear(layer, quantize=config.quantize)
        return Candidate(module, weight_error(weight, module), None)
    if not bool(weight.any()):
        raise InfeasibleError("its weight is all zero: nothing to decompose, and zero factors would never train")
    on_output = isinstance(config.rank, MaxError) and config.rank.on == "output"
    if on_output and fitting is None:
        raise InfeasibleError(
            f"{config.rank} needs calibration rows of the layer, at least {FEWEST_ROWS}. Found too few or none."
        )
    if fitting is not None and (on_output or (config.fit == "output" and not isinstance(config.rank, MaxError))):
        return _fitted(layer, config, max_seconds, progress, fitting)
    rank = without_bias(config.rank, layer) if isinstance(config.rank, MaxSize) else config.rank
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


def _fitted(
    layer: nn.Bilinear,
    config: CPConfig | TuckerConfig,
    max_seconds: float | None,
    progress: decompose.Progress | None,
    fitting: Fitting,
) -> Candidate:
    """The replacement that loses least of the layer's outputs, on rows that it was not fitted to."""
    if not isinstance(config.rank, MaxError):
        rank = without_bias(config.rank, layer) if isinstance(config.rank, MaxSize) else config.rank
        try:
            return as_candidate(layer, fitting.at(config, rank, seconds=max_seconds, progress=progress))
        except InfeasibleError as error:
            raise InfeasibleError(f"{config.rank} of the layer is too small beside its bias: {error}") from error
    fits = Chooser(layer, fitting, max_seconds, progress).smallest(config, config.rank.error)
    met = [fit for fit in fits if fit.error <= config.rank.error]
    if not met:
        lowest = min((fit.error for fit in fits), default=math.inf)
        raise InfeasibleError(
            f"An output error of {config.rank.error:g} is out of reach of a {_method(config)} that is smaller than the "
            f"layer, or was not met in time: the lowest that was found is {lowest:.3g}."
        )
    return as_candidate(layer, min(met, key=lambda fit: stored_bytes(fit.module)))


def as_candidate(layer: nn.Bilinear, found: Fitted) -> Candidate:
    """With the error of its weight."""
    amplification = found.decomposition.amplification if isinstance(found.decomposition, CPDecomposition) else None
    error = weight_error(layer.weight.detach(), found.module)
    return Candidate(found.module, error, amplification, found.error if found.on_output else None, found.own_bias)


def objection(layer: nn.Bilinear, candidate: Candidate, config: LayerConfig) -> str | None:
    """Why a candidate is worse than the layer it would replace, or None: it must work, be smaller, and meet its target.

    An exact dense layer has the same bytes; whether it is faster is for `slowness` to say, after measuring.
    """
    if not math.isfinite(candidate.weight_error):
        return f"its factors leave the range of {_dtype(layer)}: the weight error is {candidate.weight_error}"
    lost, what = candidate.weight_error, "weight"
    if candidate.output_error is not None:
        lost, what = candidate.output_error, "outputs"
    if not lost < 1:
        return f"it keeps nothing of the {what}: their error is {lost:.3g}"
    if isinstance(config, DenseConfig) and config.quantize is None:
        return None
    before, after = stored_bytes(layer), stored_bytes(candidate.module)
    if after >= before:
        return f"it is not smaller: it would store {after} bytes, the layer has {before}"
    rank = None if isinstance(config, DenseConfig) else config.rank
    if isinstance(rank, MaxError):
        found = candidate.weight_error if rank.on == "weight" else candidate.output_error
        if found is not None and found > rank.error:
            return f"its {rank.on} error {found:.4g} misses the target {rank.error:g}"
    if isinstance(rank, MaxSize) and after > rank.fraction * before:
        return f"its {after} bytes miss the target of {rank.fraction:g} x {before}"
    return None


def slowness(timing: Timing | None) -> str | None:
    """Why an exact dense layer is not worth making, or None: it must be faster beyond the spread of the blocks."""
    if timing is None:
        return "whether it is faster has not been measured"
    if timing.after.upper < timing.before.lower:
        return None
    return (
        "it is not faster here beyond the spread: "
        f"{timing.after.median:.3g} ms (upper quartile {timing.after.upper:.3g}), "
        f"nn.Bilinear {timing.before.median:.3g} ms (lower quartile {timing.before.lower:.3g})"
    )


def _dtype(layer: nn.Bilinear) -> str:
    return str(layer.weight.dtype).removeprefix("torch.")


def _method(config: Config) -> str:
    match config:
        case AutoConfig():
            return "auto"
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
        "quantize": None if isinstance(config, AutoConfig) else config.quantize,
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
    config: LayerConfig,
    candidate: Candidate,
    measured: OutputError | None,
    unreached: bool,
    time_rows: int | None,
    force: bool,
) -> Decision:
    """Measure a candidate and decide.

    Args:
        measured: the error on held-out rows, where there are any; `unreached` says that calibration found none.
        time_rows: rows in a timed call; None measures no latency.
        force: replace whatever speaks against it.
    """
    layer, module = found.layer, candidate.module.train(found.layer.training)
    known: dict[str, Any] = {"rank": module.rank, "weight_error": candidate.weight_error}
    known["amplification"] = candidate.amplification
    if measured is not None:
        known["output_error"] = measured.of(module)
        known["calibration_rows"] = measured.rows
    against = objection(layer, candidate, config)
    found_error = known.get("output_error")
    if against is None and found_error is not None and not math.isfinite(found_error):
        against = f"its outputs leave the range of {_dtype(layer)} on the calibration rows"
    if against is not None and not force:
        return keep(found, config, against, **known)
    timing = time_replacement(layer, module, time_rows) if time_rows is not None else None
    if against is None and isinstance(config, DenseConfig) and config.quantize is None:
        against = slowness(timing)
        if against is not None and not force:
            return keep(found, config, against, **known, **_timing(timing))
    reason = AS_CONFIGURED if against is None else f"forced, although {against}"
    reasons = [reason]
    if timing is not None and timing.speedup < 1:
        reasons.append(f"slower here than nn.Bilinear ({timing.speedup:.2f}x)")
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
