"""By how much a process's resident memory rises during a call. Needs the standard library alone."""

import ctypes
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")


def with_peak(call: Callable[[], _T]) -> tuple[_T, int]:
    """What a call returns, and the bytes by which the process's resident memory rose at most meanwhile."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide what comes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
    except OSError:
        before, found = _maximum(), call()
        return found, _maximum() - before
    found = call()
    return found, max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def _maximum() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
