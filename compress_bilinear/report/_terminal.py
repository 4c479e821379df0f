"""The report as a table in the terminal."""

import io

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ._data import Report
from ._format import COLUMNS, cells, notes

_PIPED_WIDTH = 120


def compact_table(title: str) -> Table:
    """An empty table whose columns take as little room as they can: a report has many, a terminal often 80."""
    return Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False)


def render_text(report: Report, title: str) -> str:
    """A table as wide as the terminal, or 120 columns where there is none, and the notes below it; no colour."""
    terminal = Console()
    width = terminal.width if terminal.is_terminal else _PIPED_WIDTH
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    table = compact_table(title)
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    for layer in report.layers:
        table.add_row(*(Text(cell) for cell in cells(layer)))
    console.print(table)
    for note in notes(report):
        console.print(Text(note))
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())
