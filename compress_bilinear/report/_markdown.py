"""The report as Markdown."""

from ._data import Report
from ._format import COLUMNS, cells, notes


def render_markdown(report: Report) -> str:
    """A table with one row a layer, and the notes as a list."""
    rows = [
        [name.replace("\n", " ") for name in COLUMNS],
        ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2),
        *(cells(layer) for layer in report.layers),
    ]
    table = ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows]
    return "\n".join([*table, "", *(f"- {_escape(note)}" for note in notes(report))]) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("_", "\\_").replace("*", "\\*")
