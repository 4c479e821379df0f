"""The time that a solve may take, and word of how far it is."""

import math
import time
from collections.abc import Callable
from typing import TypeAlias

from ..errors import ConfigError

Progress: TypeAlias = Callable[[float, float], object]
"""Called with the part of the work done, from 0 to 1, and the relative error so far; what it raises ends the solve."""


def check_max_seconds(max_seconds: object) -> None:
    """Raise `ConfigError` unless `max_seconds` is None or a positive number."""
    if max_seconds is None:
        return
    if isinstance(max_seconds, bool) or not isinstance(max_seconds, (int, float)) or not max_seconds > 0:
        raise ConfigError(f"`max_seconds` should be a positive number or None. Found {max_seconds!r}.")


class Budget:
    """Started when the solve is; `max_seconds` None never ends."""

    def __init__(self, max_seconds: float | None = None, progress: Progress | None = None) -> None:
        check_max_seconds(max_seconds)
        self.start = time.perf_counter()
        self.max_seconds = math.inf if max_seconds is None else float(max_seconds)
        self._progress = progress
        self._origin = self._closing = 0.0
        self._done = 0.0
        self._error = 1.0

    @property
    def limited(self) -> bool:
        """Whether there is a time budget at all."""
        return math.isfinite(self.max_seconds)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def prepared(self, closing: float) -> None:
        """From here on, fractions are of the time that is left now, less some seconds for the closing."""
        self._origin, self._closing = self.elapsed(), closing

    def left(self, fraction: float = 1.0) -> float:
        """Seconds until this fraction of the budget, less preparations, is spent."""
        return self._origin + fraction * max(self.max_seconds - self._closing - self._origin, 0.0) - self.elapsed()

    def child(self, share: float = 1.0, span: tuple[float, float] = (0.0, 1.0)) -> "Budget":
        """A budget of this share of the time that is left, which reports this span of the parent's work."""
        start, end = span
        seconds = max(share * self.left(), 1e-3) if self.limited else None
        return Budget(seconds, lambda done, error: self.report(start + (end - start) * done, error))

    def report(self, done: float, error: float) -> None:
        """Tell the caller; neither the part done nor the best error so far ever goes back."""
        if self._progress is None:
            return
        if self.limited:
            done = max(done, self.elapsed() / self.max_seconds)
        self._done = min(1.0, max(self._done, done))
        self._error = min(self._error, error)
        self._progress(self._done, self._error)
