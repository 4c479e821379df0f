"""Progress bars on stderr, which vanish when the work is done and never show where nobody looks."""

import sys
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import Self

_T = TypeVar("_T")


class ProgressBars:
    """A context manager; `shown` None shows bars on a terminal only."""

    def __init__(self, shown: bool | None = None) -> None:
        console = Console(stderr=True)
        self._shown = sys.stderr.isatty() if shown is None else shown
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        self._progress = Progress(
            *columns,
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=console.is_terminal,
            disable=not self._shown,
        )

    def __enter__(self) -> Self:
        if self._shown:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._shown:  # stopping prints a newline where there is no terminal
            self._progress.stop()

    def track(self, items: Iterable[_T], what: str) -> Iterable[_T]:
        """The items, counted as they are taken."""
        try:
            total = len(items)  # type: ignore[arg-type]
        except TypeError:  # also a DataLoader over a stream, which has a __len__ that raises
            total = None
        task = self._progress.add_task(what, total=total, note="")
        for item in items:
            yield item
            self._progress.advance(task)

    def parts(self, what: str, total: int) -> Callable[[int, str], Callable[[float, float], None]]:
        """A bar over `total` solves; called with a solve's number and name, it gives that solve's `progress`."""
        task: TaskID = self._progress.add_task(what, total=total, note="")

        def part(number: int, name: str) -> Callable[[float, float], None]:
            self._progress.update(task, description=f"{what} {name}", completed=number, note="")

            def report(done: float, error: float) -> None:
                self._progress.update(task, completed=number + done, note=f"error {error:.4f}")

            return report

        return part
