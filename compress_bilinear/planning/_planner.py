"""The stages of a plan, in their order: find, calibrate, fit, choose, judge, distil. Each adds its part to the jobs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from ..config import AutoConfig, Config, DenseConfig, PlanOptions
from ..decomposition import Budget
from ..errors import CompressionError, ConfigError, InfeasibleError
from ..fitting import (
    Candidate,
    Job,
    Search,
    choose_compute,
    collect_inputs,
    expected_seconds,
    fit,
    reason_against_rounded_inputs,
    settle,
    timing_inputs,
    weight_error,
)
from ..modules import (
    METHODS,
    CompressedBilinear,
    CPBilinear,
    fingerprint,
    observing,
    parameter_owners,
    reason_against,
    select,
)
from ..report import LayerReport, Note
from ._allocate import allocate, best_within, just_above
from ._distill import BatchSample, Distilled, check_distillable, distil
from ._progress import ProgressBars
from ._rows import call_rows
from ._verdict import cancelling, judge

_REPORTED = 1.25  # between two predicted sizes in a report
_PREDICT, _VERIFY = 0.3, 0.6  # of the time for an `AutoConfig`: to predict, and of what is left to make candidates


def find_jobs(model: nn.Module, configs: Mapping[str, Config | None], calibrated: bool) -> list[Job]:
    """A job for each layer that a config is meant for, with the reason against it, if any.

    Raises: MatchError where a pattern matches nothing; ConfigError where a limit on outputs has no calibration.
    """
    owners = parameter_owners(model)
    jobs = []
    for found, config in select(model, configs):
        reason = reason_against(found, owners)
        bias = found.layer.bias
        job = Job(found=found, config=config, calibrated=calibrated)
        job.reason = None if reason is None else Note("not_replaceable", reason)
        job.tied_bias = bias is not None and len(owners.get(id(bias), ())) > 1
        if job.limit is not None and job.limit.on == "output" and not calibrated:
            raise ConfigError(f"{job.limit} needs `calibration`: inputs whose outputs can be compared. Found none.")
        jobs.append(job)
    return jobs


def calibrate(model: nn.Module, jobs: Sequence[Job], options: PlanOptions, bars: ProgressBars) -> list[Any]:
    """Take what the open jobs' layers see while the model runs. Returns a sample of the batches for distilling.

    Raises: CompressionError: there is no batch, or the model fails on one; as `check_distillable`.
    """
    open_ = {job.label: job for job in jobs if job.is_open}
    calibration, forward_fn, sample = options["calibration"], options["forward_fn"], BatchSample()
    if calibration is None or not open_:
        return []
    batches = bars.track(calibration, description="Calibrating")
    watched = batches if options["refine"] is None else sample.watch(batches)
    with observing(job.found.adapted for job in open_.values()):
        layers = {label: job.found.rows for label, job in open_.items()}
        whole = forward_fn is not call_rows  # which are the rows of one file
        loss_fn = options["loss_fn"]
        inputs = collect_inputs(model, layers, watched, forward_fn=forward_fn, loss_fn=loss_fn, whole_batches=whole)
    for label, job in open_.items():
        job.inputs = inputs[label]
    if options["refine"] is not None:
        check_distillable(model, [job.found.module for job in open_.values()], sample.batches, forward_fn)
    return sample.batches


def fit_all(jobs: Sequence[Job], options: PlanOptions, budget: Budget, bars: ProgressBars) -> dict[Job, Search]:
    """Candidates for every open job, each in its part of the time. Returns the searches of the `AutoConfig`s.

    Raises: ConfigError where a config's rank fits none of the layers that it is meant for.
    """
    searches: dict[Job, Search] = {}
    misfits: dict[Job, ConfigError] = {}
    open_ = [job for job in jobs if job.is_open]
    takes_time = [job.calibrated or not isinstance(job.config, DenseConfig) for job in open_]
    sizes = [job.layer.weight.numel() * takes for job, takes in zip(open_, takes_time, strict=True)]
    progress = bars.parts("Solving", len(open_))
    for number, job in enumerate(open_):
        share = _PREDICT if isinstance(job.config, AutoConfig) else 1.0
        part = _part(budget, sizes[number], sum(sizes[number:]), progress(number, job.label)).child(share)
        try:
            if job.found.adapted is not None:
                job.found.adapted.verify()
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


def choose(
    jobs: Sequence[Job], searches: Mapping[Job, Search], options: PlanOptions, budget: Budget, bars: ProgressBars
) -> None:
    """One candidate for each open job, in the compute mode that was asked for."""
    waiting = list(searches)
    while waiting:
        group = [job for job in waiting if job.config is waiting[0].config]
        sizes = [sum(job.layer.weight.numel() for job in some) for some in (group, waiting)]
        part = _part(budget, sizes[0], sizes[1], budget.report)
        _choose_together(group, searches, group[0].config, options, part, bars)
        waiting = [job for job in waiting if job not in group]
    for job in jobs:
        if job.is_open and not isinstance(job.config, AutoConfig):
            job.chosen = job.candidates[0]
        if job.is_open and job.chosen is not None:
            place = job.candidates.index(job.chosen)
            job.candidates[place] = job.chosen = _in_compute_mode(job, job.chosen, options)


def judging_seconds(jobs: Sequence[Job], options: PlanOptions) -> dict[Job, float]:
    """What `judge_all` will take for each open job, about: a weight is measured like some calls of many rows."""
    found = {}
    for job in jobs:
        if job.is_open:
            timing = 1 + expected_seconds(job.layer, job.rows(options["batch_size"]))
            found[job] = expected_seconds(job.layer, 256) / 3 + timing * options["measure_latency"]
    return found


def judge_all(
    jobs: Sequence[Job], options: PlanOptions, budget: Budget, shares: Mapping[Job, float], bars: ProgressBars
) -> None:
    """Decide on each chosen candidate, and record that in `job.report`; the time is divided by these shares."""
    progress = bars.parts("Judging", len(jobs))
    for number, job in enumerate(jobs):
        rest = sum(shares.get(each, 0.0) for each in jobs[number:])
        part = _part(budget, shares.get(job, 0.0), rest, progress(number, job.label))
        shown = job.chosen or (job.candidates[0] if job.candidates else None)
        report = judge(job, options, budget=part)
        if isinstance(job.config, AutoConfig) and job.candidates:
            on_output = any(candidate.on_output for candidate in job.candidates)
            order = sorted(job.candidates, key=lambda candidate: (candidate.bytes, candidate.error))
            points = tuple(each.point(on_output, each is shown) for each in _sparse(order))
            job.report = replace(report, front=points)
        if job.chosen is not None:
            job.fingerprint = fingerprint(job.found.current())


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
    model: nn.Module, jobs: Sequence[Job], batches: list[Any], options: PlanOptions, seconds: float, bars: ProgressBars
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
        adapted={id(job.layer): job.found.adapted for job in jobs if job.found.adapted is not None},
        forward_fn=options["forward_fn"],
        seconds=max(seconds, 1e-3),
        progress=bars.parts("Distilling", 1)(0, "the network"),
        accept=accept,
    )
    for key, job in replaced.items():
        _record_distilled(job, found.modules[key].train(job.layer.training), found)


def _part(budget: Budget, size: float, rest: float, progress: Callable[[float, float], None]) -> Budget:
    """The part of the time left that a layer of this size gets, of layers of `rest` in all; with its own bar."""
    return Budget(max(budget.left() * size / (rest or 1), 1e-3) if budget.limited else None, progress)


def _choose_together(
    jobs: Sequence[Job],
    searches: Mapping[Job, Search],
    config: Config,
    options: PlanOptions,
    budget: Budget,
    bars: ProgressBars,
) -> None:
    """One candidate for each of these jobs, which have an `AutoConfig` in common; made, measured and polished."""
    assert isinstance(config, AutoConfig)
    own = [searches[job] for job in jobs]
    for search in own:
        search.budget = budget.child(_VERIFY)
    pick = partial(_picked, jobs, config)
    try:
        chosen = settle(own, pick)
        if config.prefer == "speed":
            chosen = _fastest(jobs, own, chosen, pick, options)
    except InfeasibleError as error:
        for job in jobs:
            job.reason, job.candidates = Note("out_of_reach", str(error)), searches[job].candidates
        return
    if config.fraction is not None:
        fronts = {job.label: search.made for job, search in zip(jobs, own, strict=True)}
        labelled = {job.label: candidate for job, candidate in zip(jobs, chosen, strict=True)}
        above = just_above(fronts, _allowed(config, [search.candidates for search in own]), config.prefer, labelled)
        for job in jobs:
            job.notes = above.get(job.label, ())
    progress = bars.parts("Polishing", len(jobs))
    for number, (job, search, candidate) in enumerate(zip(jobs, own, chosen, strict=True)):
        if config.fraction is not None and options["measure_latency"]:
            candidate = search.quickest_as_good(candidate, job.rows(options["batch_size"]))
        sizes = [other.layer.weight.numel() for other in jobs[number:]]
        part = _part(budget, sizes[0], sum(sizes), progress(number, job.label))
        job.chosen = search.polish(candidate, part)
        job.candidates = search.candidates
        if job.chosen.module is None:
            what = "faster" if config.prefer == "speed" else "smaller"
            code, why = "out_of_reach", f"no {what} replacement meets the target"
            if config.fraction is not None:
                code, why = "within_size", "the size allows to keep it"
            job.reason = Note(code, f"{why} of {len(search.made) - 1} that were tried")


def _picked(jobs: Sequence[Job], config: AutoConfig, lists: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """The best candidates of each list under the config. Raises: InfeasibleError where its size is out of reach."""
    if config.fraction is None:
        limits = [job.limit.error if job.limit is not None else 0.0 for job in jobs]
        return [best_within(each, limit, config.prefer) for each, limit in zip(lists, limits, strict=True)]
    fronts = {str(number): candidates for number, candidates in enumerate(lists)}
    chosen = allocate(fronts, _allowed(config, lists), config.prefer)
    return [chosen[name] for name in fronts]


def _allowed(config: AutoConfig, lists: Sequence[Sequence[Candidate]]) -> int:
    """The bytes that a size allows for all layers together; the first candidate of each keeps it."""
    return int((config.fraction or 1.0) * sum(candidates[0].bytes for candidates in lists))


def _fastest(
    jobs: Sequence[Job],
    searches: Sequence[Search],
    chosen: Sequence[Candidate],
    pick: Callable[[list[list[Candidate]]], list[Candidate]],
    options: PlanOptions,
) -> list[Candidate]:
    """The pick among measured latencies: of every method and format, what needs least work is made and timed too."""
    for job, search, candidate in zip(jobs, searches, chosen, strict=True):
        search.build_quickest(candidate, None if job.limit is None else job.limit.error)
        search.time(job.rows(options["batch_size"]))
    return pick([search.made for search in searches])


def _in_compute_mode(job: Job, candidate: Candidate, options: PlanOptions) -> Candidate:
    """In the compute mode that was asked for, chosen on rows that the layer saw; the output error is of that mode."""
    module, wanted = candidate.module, options["compute"]
    if module is None or module.quantize is None or wanted == "on_the_fly":
        return candidate
    choice = choose_compute(
        module,
        wanted,
        timing_inputs(job.layer, job.rows(options["batch_size"]), job.inputs),
        timed=options["measure_latency"],
        reason_against=partial(reason_against_rounded_inputs, limit=job.limit, held_out=job.held_out),
        # what a config of one rank misses is kept as it is; what was chosen to meet the limit goes on meeting it
        strict=isinstance(job.config, AutoConfig),
    )
    error = candidate.error
    if choice.compute == "int8" and candidate.on_output and job.held_out is not None:
        error = job.held_out.of(module) or error
    return replace(candidate, compute_modes=choice.modes, error=error)


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
        job.chosen = replace(job.chosen, module=module, decomposition=None, on_output=False)
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
    if isinstance(module, CPBilinear):
        known["amplification"] = module.to_decomposition().amplification
    # the parts of the former error
    return known | {"front": tuple(front), "truncation_error": None, "quantization_error": None}
