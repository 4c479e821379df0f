"""The stages of a plan, in their order: find, calibrate, fit, choose, judge, distil. Each adds its part to the jobs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ..config import AutoConfig, Config, DenseConfig, PlanOptions
from ..decomposition import Budget
from ..errors import CompressionError, ConfigError
from ..fitting import (
    Candidate,
    Job,
    Search,
    aim,
    collect_inputs,
    expected_error_seconds,
    expected_seconds,
    fit,
    judging_works,
    solving_work,
    weight_error,
)
from ..modules import (
    METHODS,
    AdaptedModule,
    CompressedBilinear,
    WeightReads,
    fingerprint,
    observing,
    parameter_owners,
    reason_against,
    select,
)
from ..report import LayerReport, Note
from ._distill import DEFAULT_SECONDS, BatchSample, Distilled, check_distillable, distil
from ._progress import ProgressBars
from ._rows import call_rows
from ._verdict import amplification, cancelling, judge

_REPORTED = 1.25  # between two predicted sizes in a report
_PREDICT = 0.3  # of the time for an `AutoConfig`
_MOST_JUDGING = 0.25  # of the time


def find_jobs(
    model: nn.Module, configs: Mapping[str, Config | None], calibrated: bool
) -> tuple[list[Job], tuple[str, ...]]:
    """A job for each layer that a config is meant for, with the reason against it, if any.

    Returns: also sentences on other modules that may hold a bilinear weight.

    Raises: MatchError where a pattern matches nothing; ConfigError where a limit on outputs has no calibration.
    """
    owners = parameter_owners(model)
    jobs = []
    selected, unknown = select(model, configs)
    for found, config in selected:
        reason = reason_against(found, owners)
        bias = found.layer.bias
        job = Job(found=found, config=config, calibrated=calibrated)
        job.reason = None if reason is None else Note("not_replaceable", reason)
        job.tied_bias = bool(set(owners.get(id(bias), ())) - found.parameter_names())
        if job.limit is not None and job.limit.on == "output" and not calibrated:
            raise ConfigError(f"{job.limit} needs `calibration`: inputs whose outputs can be compared. Found none.")
        jobs.append(job)
    return jobs, tuple(unknown)


def calibrate(
    model: nn.Module, jobs: Sequence[Job], options: PlanOptions, bars: ProgressBars
) -> tuple[list[Any], list[Any]]:
    """Take what the open jobs' layers see while the model runs.

    Returns: the first batch, to see whether the compressed network calls its replacements; a sample for distilling.

    Raises: CompressionError: there is no batch, or the model fails on one; as `check_distillable`.
    """
    open_ = {job.label: job for job in jobs if job.is_open}
    calibration, forward_fn, sample = options["calibration"], options["forward_fn"], BatchSample()
    if calibration is None or not open_:
        return [], []
    batches = bars.track(calibration, description="Calibrating")
    first: list[Any] = []
    watched = _noting_first(batches if options["refine"] is None else sample.watch(batches), first)
    plain = [each for job in open_.values() if job.found.adapted is None for each in job.found.modules]
    with observing(job.found.adapted for job in open_.values()), WeightReads(model, plain) as reads:
        layers = {label: job.found.rows for label, job in open_.items()}
        twins = [(label, twin) for label, job in open_.items() for twin in job.found.twins]
        whole = forward_fn is not call_rows  # which are the rows of one file
        loss_fn = options["loss_fn"]
        inputs = collect_inputs(
            model, layers, watched, forward_fn=forward_fn, loss_fn=loss_fn, whole_batches=whole, twins=twins
        )
    for label, job in open_.items():
        job.inputs = inputs[label]
        if operation := reads.found.get(id(job.layer.weight)):
            text = f"its weight is read outside its own forward ({operation}), and a replacement has none to read"
            job.reason = Note("weight_read", text)
    if options["refine"] is not None:
        check_distillable(
            model, [each for job in open_.values() for each in job.found.modules], sample.batches, forward_fn
        )
    return first, sample.batches


def _noting_first(batches: Iterable[Any], first: list[Any]) -> Iterator[Any]:
    for batch in batches:
        first += [] if first else [batch]
        yield batch


def fit_all(jobs: Sequence[Job], options: PlanOptions, budget: Budget, bars: ProgressBars) -> dict[Job, Search]:
    """Candidates for every open job, each in its part of the time. Returns the searches of the `AutoConfig`s.

    Raises: ConfigError where a config's rank fits none of the layers that it is meant for.
    """
    searches: dict[Job, Search] = {}
    misfits: dict[Job, ConfigError] = {}
    verified: set[AdaptedModule] = set()  # one may hold several weights
    open_ = [job for job in jobs if job.is_open]
    takes_time = [job.calibrated or not isinstance(job.config, DenseConfig) for job in open_]
    sizes = [job.layer.weight.numel() * takes for job, takes in zip(open_, takes_time, strict=True)]
    works = [solving_work(job.layer, job.config) for job in open_]
    auto = any(isinstance(job.config, AutoConfig) for job in open_)  # what is chosen tells how much work is left
    later = None if auto else sum(judging_works(jobs, options["measure_latency"]))
    progress = bars.parts("Predicting" if auto else "Solving", works, later, known=not auto)
    for number, job in enumerate(open_):
        share = _PREDICT if isinstance(job.config, AutoConfig) else 1.0
        part = budget.part(sizes[number], sum(sizes[number:]), progress(number, job.label)).child(share)
        try:
            if job.found.adapted is not None and job.found.adapted not in verified:
                job.found.adapted.verify()
                verified.add(job.found.adapted)
            job.fingerprint = fingerprint(job.found.current())
            if (search := fit(job, part, options)) is not None:
                searches[job] = search
        except ConfigError as error:
            misfits[job], job.reason = error, Note("misfit", str(error))
        except CompressionError as error:
            job.reason = Note("infeasible", str(error))
    for job, misfit in misfits.items():
        if all(other in misfits for other in open_ if other.config is job.config):
            raise misfit
    return searches


class Times(NamedTuple):
    """The time for a plan; without distilling; that without judging; and each open job's share of judging, by label."""

    whole: Budget
    judged: Budget
    solving: Budget
    shares: Mapping[str, float]

    @classmethod
    def of(cls, whole: Budget, jobs: Sequence[Job], options: PlanOptions) -> "Times":
        """Divide what is left of a time."""
        shares = {job.label: _judging_seconds(job, options) for job in jobs if job.is_open and whole.limited}
        judged = whole.child(1.0 if options["refine"] is None else 0.5)
        return cls(whole, judged, judged.child(1 - min(sum(shares.values()) / judged.left(), _MOST_JUDGING)), shares)


def _judging_seconds(job: Job, options: PlanOptions) -> float:
    """What judging will take, about."""
    timing = 1 + expected_seconds(job.layer, job.rows(options["batch_size"]))
    return expected_error_seconds(job.layer) + timing * options["measure_latency"]


def aim_all(searches: Mapping[Job, Search], budget: Budget, bars: ProgressBars) -> None:
    """Predict for the targets of the jobs' configs, from what has been solved for others."""
    sizes = [job.layer.weight.numel() for job in searches]
    progress = bars.parts("Predicting", sizes, known=False)
    for number, (job, search) in enumerate(searches.items()):
        search.budget = budget.part(sizes[number], sum(sizes[number:]), progress(number, job.label)).child(_PREDICT)
        aim(search, job)


def judge_all(jobs: Sequence[Job], options: PlanOptions, times: Times, bars: ProgressBars) -> None:
    """Decide on each chosen candidate, and record that in `job.report`."""
    progress = bars.parts("Judging", judging_works(jobs, options["measure_latency"]), 0.0)
    for number, job in enumerate(jobs):
        shares = [times.shares.get(each.label, 0.0) for each in jobs[number:]]
        part = times.judged.part(shares[0], sum(shares), progress(number, job.label))
        shown = job.chosen or (job.candidates[0] if job.candidates else None)
        report = judge(job, options, budget=part)
        if isinstance(job.config, AutoConfig) and job.candidates:
            on_output = any(candidate.on_output for candidate in job.candidates)
            order = sorted(job.candidates, key=lambda candidate: (candidate.bytes, candidate.error))
            points = tuple(each.point(on_output, each is shown) for each in _sparse(order))
            job.report = replace(report, front=points)


def _sparse(candidates: Sequence[Candidate]) -> list[Candidate]:
    """What was made, and of what is predicted some at growing sizes: a report has no use for hundreds of sizes."""
    last: dict[object, int] = {}
    found = []
    for each in candidates:
        if each.predicted:
            if each.bytes < _REPORTED * last.get(each.kind, 0):
                continue
            last[each.kind] = each.bytes
        found.append(each)
    return found


def distil_all(
    model: nn.Module, jobs: Sequence[Job], batches: list[Any], options: PlanOptions, times: Times, bars: ProgressBars
) -> None:
    """Train all replacements together to give the network's outputs; keep what is better; renew the reports."""
    replaced = {id(job.layer): job for job in jobs if job.module is not None}
    modules = {id(job.layer): job.module for job in jobs if job.module is not None}
    if not replaced:
        return

    def accept(changed: Mapping[int, CompressedBilinear]) -> bool:
        return options["force"] or all(_within_limit(replaced[key], module) for key, module in changed.items())

    found = distil(
        model,
        modules,
        batches,
        trained_bias=[key for key, job in replaced.items() if job.chosen and job.chosen.bias_corrected],
        adapted={id(job.layer): job.found for job in jobs if job.found.adapted is not None or job.found.twins},
        forward_fn=options["forward_fn"],
        seconds=max(times.whole.left(), 1e-3) if times.whole.limited else DEFAULT_SECONDS,
        progress=bars.parts("Distilling", [1.0])(0, "the network"),
        accept=accept,
    )
    for key, job in replaced.items():
        _record_distilled(job, found.modules[key].train(job.layer.training), found)


def _within_limit(job: Job, module: CompressedBilinear) -> bool:
    """Whether a replacement is within the error that its config allows, if any."""
    if job.limit is None:
        return True
    if job.limit.on == "weight" or job.held_out is None:
        return weight_error(job.layer.weight.detach(), module) <= job.limit.error
    error = job.held_out.of(module)
    return error is None or error <= job.limit.error


def _record_distilled(job: Job, module: CompressedBilinear, found: Distilled) -> None:
    """The job with its distilled module, and what that changes in its report."""
    assert job.chosen is not None
    assert job.report is not None
    known: dict[str, Any] = {}
    code, text = "not_refined", "not refined, for it is dense"
    if module is not job.module:
        code = "refined"
        text = f"refined: the network's error on held-out batches fell from {found.before:.3g} to {found.after:.3g}"
        known = _errors_of_distilled(job, module, job.report)
        job.chosen = replace(job.chosen, module=module, fitted=None, unwhiten=None, on_output=False)
    elif METHODS[module.method].solve is not None:
        text = f"not refined: the network's error on held-out batches did not fall from {found.before:.3g}"
    notes = [each for each in job.report.notes if each.code not in ("as_configured", "cancelling")]
    notes += cancelling(known.get("amplification", job.report.amplification))
    job.report = replace(job.report, **known, notes=(*notes, Note(code, text)))


def _errors_of_distilled(job: Job, module: CompressedBilinear, report: LayerReport) -> dict[str, Any]:
    """The figures of a report that new factors change."""
    known: dict[str, Any] = {
        "weight_error": weight_error(job.layer.weight.detach(), module),
        "output_error": None if job.held_out is None else job.held_out.of(module),
    }
    front = []
    for point in report.front:
        errors = {name: value for name, value in known.items() if getattr(point, name) is not None}
        front.append(replace(point, **errors) if point.chosen else point)
    known["amplification"] = amplification(module)
    # the parts of the former error
    return known | {"front": tuple(front), "truncation_error": None, "quantization_error": None}
