"""The search for the loosest target that rounding still meets."""

import math
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


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
