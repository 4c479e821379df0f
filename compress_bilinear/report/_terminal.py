"""The report as a table in the terminal."""

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._comparison import Comparison
from ._data import Report
from ._format import COLUMNS, cells, notes, printable

_PIPED_WIDTH = 120
_NAME_WIDTH = 18  # columns that many runs leave to a name


def compact_table(title: str) -> Table:
    """An empty table whose columns take as little room as they can: a report has many, a terminal often 80."""
    return Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)


def render_text(report: Report, title: str) -> str:
    """A table as wide as the terminal, or 120 columns where there is none, and the notes below it; no colour."""
    table = compact_table(title)
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    for layer in report.layers:
        table.add_row(*(Text(printable(cell)) for cell in cells(layer)))
    return _printed([table, *(Text(printable(note)) for note in notes(report))])


def render_comparison(comparison: Comparison) -> str:
    """A table for each figure, the best with a star, and the notes."""
    parts: list[Table | Text] = []
    for panel in comparison.panels:
        better = "" if panel.better is None else f" ({panel.better} is better, * marks the best)"
        table = compact_table("")
        table.padding = (0, 1, 0, 0)
        longest = max((len(printable(name)) for name in panel.rows), default=0)
        table.add_column("Layer", overflow="fold", min_width=min(longest, _NAME_WIDTH))
        for run in comparison.runs:
            table.add_column(Text(printable(run)), justify="right", overflow="fold")
        for k, name in enumerate(panel.rows):
            marked = zip(panel.values[k], panel.best(k), strict=True)
            figures = (panel.text(value) + ("*" if best else " ") for value, best in marked)
            table.add_row(Text(printable(name)), *(Text(figure) for figure in figures))
        parts += [Text(f"{panel.field}{better}"), table]
    return _printed([*parts, *(Text(printable(note)) for note in comparison.notes)])


def _printed(parts: Sequence[Table | Text]) -> str:
    terminal = Console()
    width = terminal.width if terminal.is_terminal else _PIPED_WIDTH
    output = io.StringIO()
    console = Console(file=output, width=width, color_system=None, force_terminal=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())
