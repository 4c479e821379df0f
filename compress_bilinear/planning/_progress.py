"""Progress bars on stderr, which vanish when the work is done and never show where nobody looks."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as rich
from rich.console import Console


class ProgressBars(rich.Progress):
    """A context manager; `shown` None shows bars on a terminal only. `seconds` is what each `stage` took."""

    def __init__(self, shown: bool | None = None) -> None:
        console = Console(stderr=True)
        self.seconds: dict[str, float] = {}
        super().__init__(
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.TaskProgressColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(elapsed_when_finished=False),
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

    def parts(self, what: str, total: int) -> Callable[[int, str], Callable[[float, float], None]]:
        """A bar over `total` solves; called with a solve's number and name, it gives that solve's `progress`."""
        task = self.add_task(what, total=total)

        def part(number: int, name: str) -> Callable[[float, float], None]:
            self.update(task, description=f"{what} {name}", completed=number)

            def report(done: float, error: float) -> None:
                self.update(task, description=f"{what} {name}: error {error:.4f}", completed=number + done)

            return report

        return part
