"""The stage that chooses one candidate for each layer: what is picked is made and measured, and then polished."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from torch import nn

from ..config import AutoConfig, PlanOptions
from ..decomposition import Budget, Progress
from ..errors import InfeasibleError
from ..fitting import (
    Candidate,
    Job,
    Search,
    choose_compute,
    expected_seconds,
    judging_works,
    making_is_all,
    making_work,
    reason_against_rounded_inputs,
    settle,
    timing_inputs,
)
from ..report import Note
from ._allocate import allocate, best_within, just_above
from ._metric_drop import TaskMetric
from ._progress import ProgressBars

_VERIFY = 0.6  # of the time, to make candidates; what is left polishes the chosen ones
_MODES = 0.05  # of it, to measure the compute modes of these; as much where solving has used up all
_TIMED = 0.3  # seconds to measure modes that nobody asked for
_MADE = 0.5  # of the work on a candidate until it is made; the rest polishes it


def choose(
    model: nn.Module,
    jobs: Sequence[Job],
    searches: Mapping[Job, Search],
    options: PlanOptions,
    budget: Budget,
    bars: ProgressBars,
) -> None:
    """One candidate for each open job, in the compute mode that was asked for. An `AutoConfig` is for all its jobs."""
    for job in jobs:
        if job.is_open and job not in searches:
            job.chosen = job.candidates[0]
    groups: dict[int, list[Job]] = {}
    for job in searches:
        groups.setdefault(id(job.config), []).append(job)
    waiting = sum(job.layer.weight.numel() for job in searches)
    timed = options["compute"] == "fastest" or (options["compute"] is None and options["measure_latency"])
    solving = budget.child(1 - _MODES if timed else 1.0)
    later = sum(judging_works(jobs, options["measure_latency"]))
    # a metric is of the whole network, with what the other configs give
    for group in sorted(groups.values(), key=lambda group: _auto(group).metric_drop is not None):
        size = sum(job.layer.weight.numel() for job in group)
        part = solving.part(size, waiting, budget.report)
        _choose_together(model, jobs, group, searches, options, part, bars, later)
        waiting -= size
    chosen = [job for job in jobs if job.is_open and job.chosen is not None]
    for number, job in enumerate(chosen):
        assert job.chosen is not None
        place = job.candidates.index(job.chosen)
        left = budget.left() if options["compute"] is None else max(budget.left(), _MODES * budget.max_seconds)
        job.candidates[place] = job.chosen = _in_compute_mode(job, job.chosen, options, left / (len(chosen) - number))


def _choose_together(
    model: nn.Module,
    jobs: Sequence[Job],
    group: Sequence[Job],
    searches: Mapping[Job, Search],
    options: PlanOptions,
    budget: Budget,
    bars: ProgressBars,
    later: float,
) -> None:
    """One candidate for each job of a group, which have an `AutoConfig` in common; made, measured and polished.

    `later` is the work that follows.
    """
    config, own = _auto(group), [searches[job] for job in group]
    for search in own:
        search.budget = budget.child(_VERIFY)
    metric = None if config.metric_drop is None else TaskMetric(model, jobs, options["evaluate"], config.metric_drop)
    try:
        if metric is not None:
            config = replace(config, metric_drop=None, size=_least_size(metric, group, own, bars))
        pick = partial(_picked, group, config)
        progress = _progress(group, pick([search.candidates for search in own]), bars, later)
        chosen = settle(own, pick, _time_giver(group, own, budget, progress))
        if config.prefer == "speed":
            chosen = _fastest(group, own, chosen, pick, options)
    except InfeasibleError as error:
        for job in group:
            job.reason, job.candidates = Note("out_of_reach", str(error)), searches[job].candidates
        return
    if config.fraction is not None and metric is None:
        fronts = {
            job.label: [each for each in search.candidates if not each.predicted or each.kind[0] == "dense"]
            for job, search in zip(group, own, strict=True)
        }
        labelled = {job.label: candidate for job, candidate in zip(group, chosen, strict=True)}
        above = just_above(fronts, _allowed(config, [search.candidates for search in own]), config.prefer, labelled)
        for job in group:
            job.notes = above.get(job.label, ())
    _polish(group, own, chosen, options, budget, progress)
    if metric is not None:
        metric.confirm(group)
    for job, search in zip(group, own, strict=True):
        assert job.chosen is not None
        job.candidates = list(dict.fromkeys([*search.candidates, job.chosen]))
        if job.module is None:
            what = "faster" if config.prefer == "speed" else "smaller"
            code, why = "out_of_reach", f"no {what} replacement meets the target"
            if job.limit is None:
                code, why = "within_size", "the size allows to keep it"
            job.reason = Note(code, f"{why} of {len(search.candidates) - 1} that were predicted or made")


def _polish(
    group: Sequence[Job],
    searches: Sequence[Search],
    chosen: Sequence[Candidate],
    options: PlanOptions,
    budget: Budget,
    progress: Callable[[int, str], Progress],
) -> None:
    """Polish what was chosen, or what is as good and faster."""
    for number, (job, search, candidate) in enumerate(zip(group, searches, chosen, strict=True)):
        if job.limit is None and options["measure_latency"]:
            candidate = search.quickest_as_good(candidate, job.rows(options["batch_size"]))
        sizes = [other.layer.weight.numel() for other in group[number:]]
        part = budget.part(sizes[0], sum(sizes), progress(len(group) + number, job.label))
        # where a limit is met, more sweeps would not save a byte
        job.chosen = search.polish(candidate, part, more=job.limit is None)


def _progress(
    group: Sequence[Job], picked: Sequence[Candidate], bars: ProgressBars, later: float
) -> Callable[[int, str], Progress]:
    """Of making what was picked for each job, and then of polishing it."""
    works = [making_work(job.layer, each) for job, each in zip(group, picked, strict=True)]
    shares = [1.0 if making_is_all(each) else _MADE for each in picked]
    made = [share * work * each.predicted for share, work, each in zip(shares, works, picked, strict=True)]
    return bars.parts("Choosing", [*made, *((1 - s) * work for s, work in zip(shares, works, strict=True))], later)


def _time_giver(
    group: Sequence[Job], searches: Sequence[Search], budget: Budget, progress: Callable[[int, str], Progress]
) -> Callable[[int, Candidate], None]:
    """Gives a search its time to make a candidate: what it has, or all of its layer's where polishing needs none."""
    sizes = [job.layer.weight.numel() for job in group]
    total = sum(sizes)

    def give(number: int, candidate: Candidate) -> None:
        search, report = searches[number], progress(number, group[number].label)
        if making_is_all(candidate):  # a rounding that is cut short would be in vain
            search.budget = budget.part(sizes[number], total, report)
        else:
            search.budget = search.budget.part(1.0, 1.0, report)

    return give


def _least_size(metric: TaskMetric, group: Sequence[Job], searches: Sequence[Search], bars: ProgressBars) -> float:
    """The least size, as a fraction, at which the network's metric holds. Raises: InfeasibleError where there is none.

    Some compressed copies of the network are measured, whose candidates are not polished.
    """
    progress = bars.parts("Measuring the metric at", [1.0] * 8, known=False)
    tried = count()

    def pick(fraction: float) -> dict[Job, Candidate] | None:
        progress(next(tried), f"{fraction:.3g} of the size")
        try:
            chosen = settle(searches, partial(_picked, group, AutoConfig(size=fraction)))
        except InfeasibleError:
            return None
        return dict(zip(group, chosen, strict=True))

    return metric.least_size(pick, in_time=lambda: all(search.budget.left() > 0 for search in searches))


def _auto(group: Sequence[Job]) -> AutoConfig:
    config = group[0].config
    assert isinstance(config, AutoConfig)
    return config


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


def _in_compute_mode(job: Job, candidate: Candidate, options: PlanOptions, seconds: float) -> Candidate:
    """In the compute mode that was asked for, chosen on rows that the layer saw; the output error is of that mode.

    If none was, the fastest is found only where there are so many seconds, and no metric that has been looked at.
    """
    module, wanted, rows = candidate.module, options["compute"], job.rows(options["batch_size"])
    if module is None or module.quantize is None or wanted == "on_the_fly":
        return candidate
    confirmed = getattr(job.config, "metric_drop", None) is not None  # as it computes on the fly
    timed = options["measure_latency"] and not confirmed and expected_seconds(job.layer, rows) <= seconds
    if wanted is None and not timed:
        return candidate
    choice = choose_compute(
        module,
        wanted,
        timing_inputs(job.layer, rows, job.inputs),
        timed=options["measure_latency"],
        reason_against=partial(reason_against_rounded_inputs, limit=job.limit, held_out=job.held_out),
        # what a config of one rank misses is kept as it is; what was chosen to meet the limit goes on meeting it
        strict=isinstance(job.config, AutoConfig),
        most_change=options["compute_error"],
        seconds=min(seconds, _TIMED if wanted is None else 1.0),
    )
    error = candidate.error
    if choice.compute in ("bfloat16", "int8") and candidate.on_output and job.held_out is not None:
        error = job.held_out.of(module) or error
    return replace(candidate, compute_modes=choice.modes, error=error)
