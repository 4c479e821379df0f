"""Whether a replacement is worth making, and the record of that."""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .. import decomposition as decompose
from .. import ops
from ..config import AutoConfig, Config, CPConfig, DenseConfig, LayerConfig, MaxError, MaxSize, TuckerConfig
from ..fitting import (
    Candidate,
    OutputError,
    Timing,
    parameter_count,
    stored_bytes,
    time_adapted,
    time_replacement,
    weight_error,
)
from ..modules import CompressedBilinear, FoundLayer, is_lazy
from ..report import AS_CONFIGURED, LayerReport, Note, Spectrum


@dataclass(frozen=True, eq=False)
class Decision:
    """What becomes of a layer: its replacement, None where it is kept, the record of it, and whose the bias is."""

    replacement: CompressedBilinear | None
    report: LayerReport
    own_bias: bool = False


def objection(layer: nn.Bilinear, candidate: Candidate, config: LayerConfig) -> Note | None:
    """Why a candidate is worse than the layer it would replace, or None: it must work, be smaller, and meet its target.

    An exact dense layer has the same bytes; whether it is faster is for `slowness` to say, after measuring.
    """
    if not math.isfinite(candidate.weight_error):
        why = f"its factors leave the range of {_dtype(layer)}: the weight error is {candidate.weight_error}"
        return Note("not_finite", why)
    lost, what = candidate.weight_error, "weight"
    if candidate.output_error is not None:
        lost, what = candidate.output_error, "outputs"
    if not lost < 1:
        return Note("keeps_nothing", f"it keeps nothing of the {what}: their error is {lost:.3g}")
    if isinstance(config, DenseConfig) and config.quantize is None:
        return None
    before, after = stored_bytes(layer), stored_bytes(candidate.module)
    if after >= before:
        return Note("not_smaller", f"it is not smaller: it would store {after} bytes, the layer has {before}")
    rank = None if isinstance(config, DenseConfig) else config.rank
    if isinstance(rank, MaxError):
        found = candidate.weight_error if rank.on == "weight" else candidate.output_error
        if found is not None and found > rank.error:
            return Note("misses_target", f"its {rank.on} error {found:.4g} misses the target {rank.error:g}")
    if isinstance(rank, MaxSize) and after > rank.fraction * before:
        return Note("misses_target", f"its {after} bytes miss the target of {rank.fraction:g} x {before}")
    return None


def slowness(timing: Timing | None, form: str = "nn.Bilinear") -> Note | None:
    """Why an exact dense layer is not worth making, or None: it must be faster beyond the spread of the blocks."""
    if timing is None:
        return Note("not_faster", "whether it is faster has not been measured")
    if timing.after.upper < timing.before.lower:
        return None
    return Note(
        "not_faster",
        "it is not faster here beyond the spread: "
        f"{timing.after.median:.3g} ms (upper quartile {timing.after.upper:.3g}), "
        f"{form} {timing.before.median:.3g} ms (lower quartile {timing.before.lower:.3g})",
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


def keep(found: FoundLayer, config: Config, note: Note, **known: Any) -> Decision:
    """The record of a layer that stays as it is; `known` are the figures of a candidate that was turned down."""
    basics = _basics(found, config)
    same = {f"{what}_after": basics.get(f"{what}_before") for what in ("params", "bytes", "flops")}
    return Decision(None, LayerReport(**{**basics, **same, "decision": "kept", "notes": (note,), **known}))


def cancelling(amplification: float | None) -> list[Note]:
    """What is to be said of a CP whose components cancel; nothing of others."""
    if amplification is None or amplification <= decompose.AMPLIFICATION_LIMIT:
        return []
    return [Note("cancelling", f"its components cancel (amplification {amplification:.2g})")]


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
    known |= candidate.storage
    known["spectra"] = tuple(Spectrum(**one._asdict()) for one in decompose.spectra(layer.weight))
    if measured is not None:
        known["output_error"] = measured.of(module)
        known["calibration_rows"] = measured.rows
    against = objection(layer, candidate, config)
    found_error = known.get("output_error")
    if against is None and found_error is not None and not math.isfinite(found_error):
        against = Note("not_finite", f"its outputs leave the range of {_dtype(layer)} on the calibration rows")
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
    notes = [AS_CONFIGURED if against is None else Note("forced", f"forced, although {against.text}")]
    if timing is not None and timing.speedup < 1:
        notes.append(Note("slower", f"slower here than {found.form} ({timing.speedup:.2f}x)"))
    notes += cancelling(candidate.amplification)
    if candidate.note is not None:
        notes.append(Note("fitted_to_weight", candidate.note))
    if unreached:
        notes.append(Note("unreached", "no calibration row reached it, so its output error is unknown"))
    known |= {"decision": "replaced", "notes": tuple(notes)}
    known |= {"params_after": parameter_count(module), "bytes_after": stored_bytes(module)}
    known |= {"flops_after": module.flops_per_row} | _timing(timing)
    report = LayerReport(**(_basics(found, config) | known))
    return Decision(module, report, candidate.own_bias)


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


def compare_layers(
    name: str,
    layer: nn.Bilinear,
    module: CompressedBilinear,
    batch_size: int | None,
    measured: OutputError | None = None,
) -> LayerReport:
    """The report on a replacement that has been made already, say in a checkpoint; `measured` as in `judge`."""
    wanted: LayerConfig
    match module.rank:
        case None:
            wanted = DenseConfig(quantize=module.quantize)
        case int(rank):
            wanted = CPConfig(rank=rank, quantize=module.quantize)
        case triple:
            wanted = TuckerConfig(rank=triple, quantize=module.quantize)
    candidate = Candidate(module, weight_error(layer.weight.detach(), module), None)
    decision = judge(FoundLayer((name,), layer), wanted, candidate, measured, False, batch_size, True)
    against = objection(layer, candidate, wanted)  # it is there already, so it was not forced
    notes = tuple(against if note.code == "forced" and against is not None else note for note in decision.report.notes)
    return replace(decision.report, notes=notes)
