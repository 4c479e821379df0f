"""The time that a piece of work may take, and how much of it is done."""

import math
import time
from collections.abc import Callable
from typing import TypeAlias

from ..config import check_max_seconds

Progress: TypeAlias = Callable[[float, float], object]
"""Called with the part of the work done, from 0 to 1, and the relative error so far; what it raises ends the solve."""

_NO_TIME = 1e-9  # seconds of a part of a budget that is over: so is the part


class Budget:
    """Seconds and progress of a piece of work. Parts of it get a `child` each; None for `max_seconds` never ends."""

    def __init__(self, max_seconds: float | None = None, progress: Progress | None = None) -> None:
        """The time starts now. Raises: ConfigError unless `max_seconds` is None or a positive number."""
        check_max_seconds(max_seconds)
        self.start = time.perf_counter()
        self.max_seconds = math.inf if max_seconds is None else float(max_seconds)
        self._progress = progress
        self._done = 0.0
        self._error = 1.0

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return math.isfinite(self.max_seconds)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def left(self) -> float:
        """Seconds until the end; negative after it, infinite without a limit."""
        return self.max_seconds - self.elapsed()

    def child(self, share: float = 1.0, span: tuple[float, float] = (0.0, 1.0)) -> "Budget":
        """A budget for a part of the work, which starts now.

        Args:
            share: of the seconds that are left. What a part does not use, the next ones share.
            span: where the part begins and ends in this budget's work, for its progress.
        """
        start, end = span
        seconds = max(share * self.left(), _NO_TIME) if self.limited else None
        if self._progress is None:
            return Budget(seconds)
        return Budget(seconds, lambda done, error: self.report(start + (end - start) * done, error))

    def part(self, size: float, rest: float, progress: Progress) -> "Budget":
        """A budget for work of this size, of `rest` that is still to do in all, with its own progress."""
        return Budget(max(self.left() * size / (rest or 1), _NO_TIME) if self.limited else None, progress)

    def report(self, done: float, error: float) -> None:
        """Tell the caller the part that is done and the error; the first never falls, and the second never rises."""
        if self._progress is None:
            return
        if self.limited:
            done = max(done, self.elapsed() / self.max_seconds)
        self._done = min(1.0, max(self._done, done))
        self._error = min(self._error, error)
        self._progress(self._done, self._error)
