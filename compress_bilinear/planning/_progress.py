"""Progress bars on stderr, which vanish when the work is done and never show where nobody looks."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich import progress as rich
from rich.console import Console
from rich.text import Text


class _TimeLeft(rich.TimeRemainingColumn):
    def render(self, task: rich.Task) -> Text:
        return Text("") if task.total is None else Text("left ") + super().render(task)


class ProgressBars(rich.Progress):
    """A context manager; `shown` None shows bars on a terminal only. `seconds` is what each `stage` took.

    What is chosen tells how much work is left: from then on the stages share a bar, see `parts`.
    """

    def __init__(self, shown: bool | None = None) -> None:
        console = Console(stderr=True)
        self.seconds: dict[str, float] = {}
        self._shared: rich.TaskID | None = None
        self._end = 0.0  # of what the stages have done that share a bar, in FLOPs
        super().__init__(
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.TaskProgressColumn(),
            rich.TimeElapsedColumn(),
            _TimeLeft(),
            console=console,
            transient=console.is_terminal,
            disable=not (sys.stderr.isatty() if shown is None else shown),
        )

    def stop(self) -> None:
        """End the display."""
        if not self.disable:  # it prints a newline where there is no terminal
            super().stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the work, which is timed."""
        begun = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begun, 3)
        for task in self.tasks:  # what has ended sooner than it might have is done too
            self.update(task.id, completed=self._end if task.id == self._shared else task.total)

    def parts(
        self, what: str, sizes: Sequence[float], later: float | None = None, known: bool = True
    ) -> Callable[[int, str], Callable[[float, float], None]]:
        """A bar over some solves; called with a solve's number and name, it gives that solve's `progress`.

        Args:
            sizes: the work of each, in any unit.
            later: the work of the stages that follow. With one the bar is shared with those, and the unit is FLOPs.
            known: whether the work is. Where much follows that is not known yet, no time is told that is left.
        """
        begun, total = (0.0, sum(sizes)) if later is None else (self._end, self._end + sum(sizes) + later)
        shared = None if later is None else self._shared
        task = self.add_task(what, total=total if known else None) if shared is None else shared
        if later is not None:
            self._shared, self._end = task, begun + sum(sizes)
            self.update(task, total=total, completed=begun)

        def part(number: int, name: str) -> Callable[[float, float], None]:
            before = begun + sum(sizes[:number])
            self.update(task, description=f"{what} {name}", completed=before)

            def report(done: float, error: float) -> None:
                completed = before + done * sizes[number]
                self.update(task, description=f"{what} {name}: error {error:.4f}", completed=completed)

            return report

        return part
