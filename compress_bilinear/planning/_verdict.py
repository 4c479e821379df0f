"""Whether a candidate is worth the replacement, and the record of that."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import decomposition as decompose
from .. import ops
from ..config import LayerConfig, MaxError, MaxSize, PlanOptions
from ..decomposition import Budget
from ..fitting import (
    FEWEST_GROUPS,
    FEWEST_ROWS,
    Candidate,
    Job,
    OutputError,
    Timing,
    expected_error_seconds,
    expected_seconds,
    parameter_count,
    stored_bytes,
    time_adapted,
    time_replacement,
)
from ..modules import METHODS, CompressedBilinear, CPBilinear, FoundLayer, is_lazy, method_name
from ..report import AS_CONFIGURED, LayerReport, Note, Spectrum

_PARTS = 3  # times as long as the error itself takes what judging finds where there is time


def judge(job: Job, options: PlanOptions, made: bool = False, budget: Budget | None = None) -> LayerReport:
    """Measure the chosen candidate and decide: fill `job.report`, and take `job.chosen` away where the layer is kept.

    `options["force"]` makes the replacement whatever the reasons against it. `made` says that it has been made
    already, so that nothing is forced. What the budget has no time for is not timed, and figures on which nothing
    depends are left out: spectra, and the parts of an error.
    """
    candidate = job.chosen
    if job.reason is not None or candidate is None or candidate.module is None:
        job.chosen = None
        job.report = kept(job, job.reason or Note("not_replaceable", "it was not chosen"))
        return job.report
    module, force = candidate.module.train(job.layer.training), options["force"]
    budget = budget or Budget()
    known = _measured(job, candidate, module, budget)
    against = reason_against(job, candidate, known)
    timing, unreached = None, job.calibrated and job.inputs is None  # what was never called has no speed
    if options["measure_latency"] and not unreached and (against is None or force):
        timing = _timed(job, module, job.rows(options["batch_size"]), budget)
        known |= {} if timing is None else _latencies(timing)
    if against is None and _is_exact(module):
        against = slowness(timing, job.found.form)
    shaky = _shaky(job, candidate)
    if against is not None and not force:
        report = kept(job, against, **known)
        job.chosen, job.report = None, replace(report, notes=(*report.notes, *shaky))
        return job.report
    known |= {"params_after": parameter_count(module), "bytes_after": candidate.bytes}
    if against is not None and not made:
        against = Note("forced", f"forced, although {against.text}")
    notes = [against or AS_CONFIGURED, *(() if timing is None else _slower(timing, job.found.form, _is_exact(module)))]
    notes += [*cancelling(known["amplification"]), *candidate.notes, *job.notes, *shaky]
    if options["measure_latency"] and timing is None and not unreached:
        notes.append(Note("not_timed", "no time was left to measure its latency"))
    if unreached:
        notes.append(Note("unreached", "no calibration row reached it: its output error and speed are unknown"))
    known |= {"flops_after": module.flops_per_row, "notes": tuple(notes)}
    job.report = LayerReport(**(_basics(job, candidate.config) | known | {"decision": "replaced"}))
    return job.report


def kept(job: Job, reason: Note, **known: Any) -> LayerReport:
    """The record of a layer that stays as it is; `known` are the figures of a candidate that was turned down."""
    basics = _basics(job, None if job.chosen is None else job.chosen.config)
    same = {f"{what}_after": basics.get(f"{what}_before") for what in ("params", "bytes", "flops")}
    return LayerReport(**{**basics, **same, "decision": "kept", "notes": (reason,), **known})


def reason_against(job: Job, candidate: Candidate, known: dict[str, Any]) -> Note | None:
    """Why a candidate is worse than the layer, or None: it has to work, be smaller, and meet its target.

    An exact dense layer has the same bytes. Whether it is faster, `slowness` says after measuring. `known` has the
    candidate's `weight_error` and, where there are rows, `output_error`.
    """
    dtype = str(job.layer.weight.dtype).removeprefix("torch.")
    weight, output = known["weight_error"], known.get("output_error")
    if not math.isfinite(weight):
        return Note("not_finite", f"its factors leave the range of {dtype}: the weight error is {weight}")
    if output is not None and not math.isfinite(output):
        return Note("not_finite", f"its outputs leave the range of {dtype} on the calibration rows")
    error, what = (output, "outputs") if candidate.on_output and output is not None else (weight, "weight")
    if not error < 1:
        return Note("keeps_nothing", f"it keeps nothing of the {what}: their error is {error:.3g}")
    if candidate.module is not None and _is_exact(candidate.module):
        return None
    before = stored_bytes(job.layer)
    if candidate.bytes >= before:
        return Note("not_smaller", f"it is not smaller: it would store {candidate.bytes} bytes, the layer has {before}")
    target = getattr(job.config, "rank", None)
    if isinstance(target, MaxError):
        missed = known.get(f"{target.on}_error")
        if missed is not None and missed > target.error:
            return Note("misses_target", f"its {target.on} error {missed:.4g} misses the target {target.error:g}")
    if isinstance(target, MaxSize) and candidate.bytes > target.fraction * before:
        return Note("misses_target", f"its {candidate.bytes} bytes miss the target of {target.fraction:g} x {before}")
    return None


def slowness(timing: Timing | None, form: str = "nn.Bilinear") -> Note | None:
    """Why an exact dense layer is not worth making, or None: it has to be faster beyond the spread of the blocks."""
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


def _slower(timing: Timing, form: str, exact: bool) -> list[Note]:
    """Notes on a replacement that is slower than the layer, or than the same weight in the best order."""
    found = []
    if timing.speedup < 1:
        found.append(Note("slower", f"slower here than {form}: {timing.speedup:.2f}x its speed"))
    if not exact and timing.speedup_vs_dense < 1 and timing.dense_order != "nn.Bilinear":
        dense, after = timing.dense.median, timing.after.median
        found.append(Note("slower", f"`DenseConfig()` is faster here, in {dense:.3g} ms for {after:.3g} ms"))
    return found


def amplification(module: CompressedBilinear) -> float | None:
    """By how much a CP's components cancel, as they are stored; None of other methods."""
    return module.to_decomposition().amplification if isinstance(module, CPBilinear) else None


def cancelling(amplification: float | None) -> tuple[Note, ...]:
    """A note on a CP whose components cancel; none on others."""
    if amplification is None or amplification <= decompose.AMPLIFICATION_LIMIT:
        return ()
    return (Note("cancelling", f"its components cancel (amplification {amplification:.2g})"),)


def _shaky(job: Job, candidate: Candidate) -> tuple[Note, ...]:
    """A note where the calibration says too little of the candidate; none otherwise."""
    if job.held_out is None or candidate.module is None or _is_exact(candidate.module):
        return ()
    if job.inputs is not None and not job.has_rows and getattr(candidate.config, "fit", "output") == "output":
        text = f"{len(job.inputs.input1)} calibration rows reach it, too few or too much alike to fit to"
        return (Note("few_rows", f"fitted to the weight, for only {text} (at least {FEWEST_ROWS})"),)
    if (groups := job.held_out.groups) >= FEWEST_GROUPS:
        return ()
    text = f"its output error rests on {groups} independent group{'s' * (groups != 1)} of rows"
    return (Note("few_groups", f"{text}: more batches, or others that share no input, would make it surer"),)


def _timed(job: Job, module: CompressedBilinear, rows: int, budget: Budget) -> Timing | None:
    """The latencies, in a second and in what the budget leaves; None where that is too short."""
    spare = budget.left() - (expected_seconds(job.layer, rows) if budget.limited else 0.0)
    if spare <= 0:
        return None
    if job.found.adapted is not None:
        return time_adapted(job.found.adapted, job.found.key, module, seconds=min(spare, 1.0))
    return time_replacement(job.layer, module, rows, seconds=min(spare, 1.0))


def _measured(job: Job, candidate: Candidate, module: CompressedBilinear, budget: Budget) -> dict[str, Any]:
    """The figures of a candidate, but for its sizes and latencies."""
    weight = job.layer.weight.detach()
    over = budget.limited and budget.left() <= _PARTS * expected_error_seconds(job.layer)
    known = _factor_errors(weight, candidate, module, over) | {"rank": module.rank}
    known["spectra"] = () if over else tuple(Spectrum(**one._asdict()) for one in decompose.spectra(weight))
    if job.held_out is not None:
        known["output_error"] = job.held_out.of(module)
        known |= {"calibration_rows": job.held_out.rows, "calibration_groups": job.held_out.groups}
    return known


def _factor_errors(
    weight: Tensor, candidate: Candidate, module: CompressedBilinear, over: bool = False
) -> dict[str, Any]:
    """The report's figures on what the candidate stores, against the weight.

    Of a quantized one also the parts of its error, unless the time is nearly `over`: of the decomposition in floating
    point, and how far what is stored is from that, both relative to the weight's norm.
    """
    floating = None if over else candidate.decomposition
    parts = [module] if floating is None or module.quantize is None else [module, floating]
    with torch.no_grad():
        total, *others = decompose.relative_errors(weight, *(part.dense_rows for part in parts))
    known: dict[str, Any] = {"weight_error": total, "amplification": amplification(module)}
    if module.quantize is None:
        return known
    known["compute"], known["compute_modes"] = module.compute, candidate.compute_modes
    if METHODS[module.method].solve is None:
        return known | {"truncation_error": 0.0, "quantization_error": total}
    return known | dict(zip(("truncation_error", "quantization_error"), others, strict=False))


def _is_exact(module: CompressedBilinear) -> bool:
    """Whether it stores the weight itself, every bit of it."""
    return module.quantize is None and METHODS[module.method].solve is None


def _basics(job: Job, config: LayerConfig | None) -> dict[str, Any]:
    """What is known of a layer before anything is solved; `config` asks for what was chosen."""
    layer, asked = job.layer, config or job.config
    known: dict[str, Any] = {
        "name": job.found.paths[0],
        "aliases": job.found.paths[1:],
        "method": method_name(asked),
        "quantize": getattr(asked, "quantize", None),
        "form": job.found.form,
    }
    if is_lazy(layer):
        return known | {"shape": None, "params_before": 0, "bytes_before": 0}
    shape = (layer.out_features, layer.in1_features, layer.in2_features)
    known |= {"shape": shape, "flops_before": ops.dense_flops(shape)}
    return known | {"params_before": parameter_count(layer), "bytes_before": stored_bytes(layer)}


def _latencies(timing: Timing) -> dict[str, Any]:
    known: dict[str, Any] = {"speedup": timing.speedup, "speedup_vs_dense": timing.speedup_vs_dense}
    known |= {"batch_size": timing.batch_size, "dense_order": timing.dense_order}
    for what in ("before", "after", "dense"):
        latency = getattr(timing, what)
        known[f"latency_{what}_ms"] = latency.median
        known[f"latency_{what}_quartiles_ms"] = (latency.lower, latency.upper)
    return known


def compare_layers(
    name: str, layer: nn.Bilinear, module: CompressedBilinear, batch_size: int | None, held_out: OutputError | None
) -> LayerReport:
    """The report on a replacement that has been made already, say in a checkpoint; `batch_size` None times nothing."""
    config = METHODS[module.method].configure(module.rank, module.quantize, 0)
    job = Job(found=FoundLayer((name,), layer), config=config, chosen=Candidate.of(config, module, math.nan))
    job.held_out = held_out
    options: PlanOptions = {"measure_latency": batch_size is not None, "batch_size": batch_size, "force": True}
    return judge(job, options, made=True)
