"""The search for the least size whose error is within a limit, and for the loosest target that rounding still meets.

A size is whatever the caller varies: a CP rank, or a fraction of a layer's bytes. Errors fall about as a power of it.
"""

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from ._budget import Budget

Result = TypeVar("Result")

_GROWTH = 3.0  # between two sizes while only one side of the bracket is known: further, a power law guesses badly
_INSIDE = 0.15  # of a bracket (in log size) that a step must cut off, so that a bad guess still shrinks it


class Trial(NamedTuple, Generic[Result]):
    """One size that was tried. `error` is infinite where there is no result."""

    size: float
    error: float
    result: Result | None


def smallest(
    attempt: Callable[[float], tuple[Result, float] | None],
    limit: float,
    low: float,
    high: float,
    *,
    first: float | None = None,
    close: float = 1.04,
    whole: bool = False,
    tries: int = 32,
    budget: Budget | None = None,
) -> list[Trial[Result]]:
    """Close in on the least size in [low, high] whose error is at most `limit`; return all trials in their order.

    Sizes grow or shrink from `first` until one meets the limit and one misses it. Then a power law through these two
    says where the next lies. See `best_within` for the answer.

    Args:
        attempt: size -> (result, its error), or None where no result has this size.
        first: where to begin; by default `low`.
        close: the search ends once the least size that meets the limit is at most this times one that misses it.
        whole: sizes are integers.
        tries: at most so many attempts.
        budget: after the first attempt, none begins once its time is up. Each attempt takes its own share of it.
    """
    trials: list[Trial[Result]] = []
    misses: Trial[Result] | None = None
    meets: Trial[Result] | None = None
    size = min(max(low if first is None else first, low), high)
    while len(trials) < tries and not (trials and budget is not None and budget.left() <= 0):
        result, error = attempt(size) or (None, math.inf)
        trial = Trial(size, error, result)
        trials.append(trial)
        if error <= limit:
            meets = trial
        else:
            misses = trial
        if misses is None or meets is None:
            if size == (high if meets is None else low):
                break
            least = max(close, 1.02) ** 2 ** min(len(trials), 6)  # longer steps, where short ones do not get across
            size = min(max(_beyond(trial, limit, min(least, _GROWTH), whole), low), high)
        elif meets.size <= close * misses.size or (whole and meets.size - misses.size <= 1):
            break
        else:
            size = _between(misses, meets, limit)
            size = min(max(round(size), misses.size + 1), meets.size - 1) if whole else size
    return trials


def best_within(trials: list[Trial[Result]], limit: float) -> Trial[Result] | None:
    """The trial of least size that meets the limit; None where none does."""
    return min((trial for trial in trials if trial.error <= limit), key=lambda trial: trial.size, default=None)


def tightened(
    attempt: Callable[[float], tuple[Result, float]],
    limit: float,
    *,
    expected: float = 0.0,
    step: float = 1e-12,
    tries: int = 6,
) -> tuple[Result, float]:
    """Tighten a target until the error *after rounding* is at most `limit`; return the last result and its error.

    The error may still be above the limit, where rounding alone costs that much. `attempt` takes a target, which its
    result meets before rounding, and returns the result and its error after rounding. Truncation and rounding errors
    add in quadrature, which says how much tighter the next target must be.

    Args:
        expected: the error that rounding will add, for the first target.
        step: the least part by which a second target is tighter; for each further one it is a hundred times that.
        tries: at most so many attempts.
    """
    target = math.sqrt(max(limit**2 - expected**2, 0.7 * limit**2))
    for _ in range(tries):
        result, error = attempt(target)
        if error <= limit:
            break
        remaining = limit**2 - 1.1 * (error**2 - target**2)
        target = max(min(math.sqrt(max(remaining, 0.0)), target * (1 - step)), limit / 2)
        step = min(100 * step, 0.3)
    return result, error


def _beyond(trial: Trial[Any], limit: float, least: float, whole: bool) -> float:
    """The next size towards the other side of the limit, if the error falls with the square root of the size.

    It is larger or smaller by a factor of at least `least`.
    """
    ratio = (max(trial.error, 1e-300) / limit) ** 2
    if trial.error > limit:
        size = trial.size * min(max(ratio, least), _GROWTH)
        return max(math.ceil(size), trial.size + 1) if whole else size
    size = trial.size / min(max(1 / ratio, least), _GROWTH)
    return min(math.floor(size), trial.size - 1) if whole else size


def _between(misses: Trial[Any], meets: Trial[Any], limit: float) -> float:
    """Where a power law through the two trials meets the limit, but well within them."""
    part = 0.5
    if misses.error < math.inf and meets.error > 0:
        part = math.log(misses.error / limit) / math.log(misses.error / meets.error)
    return misses.size * (meets.size / misses.size) ** min(max(part, _INSIDE), 1 - _INSIDE)
