"""The smallest network whose own metric falls by no more than is allowed: allocations are bisected on copies of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..config import Evaluate
from ..errors import CompressionError, InfeasibleError
from ..fitting import FIRST_SIZE, Candidate, Job, task_metric
from ..report import Note
from ._execute import copied

_LARGEST = 0.99  # of the size, beyond which nothing is tried
_CLOSE = 1.1  # between the least size at which the metric holds and the largest at which it does not


class TaskMetric:
    """The caller's metric of a network with some candidates in place, against the least that is allowed."""

    def __init__(self, model: nn.Module, jobs: Sequence[Job], evaluate: Evaluate | None, drop: float) -> None:
        """`jobs` that have chosen already are in place too. Raises: ConfigError where the metric is no number."""
        assert evaluate is not None
        self._model, self._evaluate = model, evaluate
        self._others = [job for job in jobs if job.module is not None]
        self._drop, self.before = drop, task_metric(evaluate, model)
        self._known: dict[tuple[Candidate, ...], float] = {}
        self._best: Mapping[Job, Candidate] = {}

    def holds(self, chosen: Mapping[Job, Candidate]) -> bool:
        """Whether the metric is good enough with these. Raises: CompressionError where the model cannot be copied."""
        key = tuple(chosen.values())
        if key not in self._known:
            made = [replace(job, chosen=candidate) for job, candidate in chosen.items() if candidate.module is not None]
            try:
                compressed = copied(self._model, [*self._others, *made])
            except CompressionError as error:
                raise CompressionError(
                    "`metric_drop` needs a model that can be copied, to measure it compressed. Found that it cannot: "
                    f"{error.__cause__ or error}. Use `size` or `error`."
                ) from error
            self._known[key] = task_metric(self._evaluate, compressed)
        held = self._known[key] >= self.before - self._drop
        if held:
            self._best = chosen
        return held

    def least_size(self, pick: Callable[[float], Mapping[Job, Candidate] | None], in_time: Callable[[], bool]) -> float:
        """The least fraction of the bytes of all jobs at which the metric holds.

        Args:
            pick: the candidates at a fraction; None where it is out of reach.

        Raises: InfeasibleError where it holds at no fraction, or at none in time.
        """
        good: float | None = None
        bad, fraction = 0.0, FIRST_SIZE
        while in_time() and bad < _LARGEST and (good is None or good > bad * _CLOSE):
            chosen = pick(fraction)
            if chosen is not None and self.holds(chosen):
                used = sum(each.bytes for each in chosen.values()) + 0.5  # so that rounding down gives the same bytes
                good = min(fraction, used / sum(job.candidates[0].bytes for job in chosen))
            else:
                bad = fraction
            if good is None:
                fraction = min(2 * bad, _LARGEST)
            elif bad == 0:
                fraction = good / 2
            else:
                fraction = math.sqrt(good * bad)
        if good is None:
            tried = f"{max(self._known.values()):.4g} is the best that was found" if self._known else "found no time"
            raise InfeasibleError(f"A metric within {self._drop:g} of {self.before:.4g} is out of reach: {tried}.")
        return good

    def confirm(self, group: Sequence[Job]) -> None:
        """Take back how these jobs' candidates were polished, if the metric does not hold with it; note the metric."""
        now = {job: job.chosen for job in group if job.chosen is not None}
        if not self.holds(now):
            for job, candidate in self._best.items():
                job.chosen = candidate
        after = self._known[tuple(self._best.values())]
        text = f"with it the metric is {after:.4g}, before {self.before:.4g}; {len(self._known)} networks were measured"
        for job in group:
            job.notes = (*job.notes, Note("metric_drop", text))
