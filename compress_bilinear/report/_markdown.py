"""The report as Markdown."""

import re

from ._comparison import Comparison
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


def render_comparison(comparison: Comparison) -> str:
    """A heading and a table for each figure, the best in bold, then the notes."""
    parts = []
    for panel in comparison.panels:
        better = "" if panel.better is None else f" ({panel.better} is better)"
        rows = [["Layer", *comparison.runs], ["---", *("---:" for _ in comparison.runs)]]
        for k, name in enumerate(panel.rows):
            marked = zip(panel.values[k], panel.best(k), strict=True)
            rows.append([name, *(f"**{panel.text(value)}**" if best else panel.text(value) for value, best in marked)])
        lines = [rows[0], rows[1], *([_escape(name), *cells] for name, *cells in rows[2:])]
        lines[0] = [_escape(cell) for cell in lines[0]]
        parts.append(f"### {_escape(panel.field)}{better}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines))
    notes = "\n".join(f"- {_escape(note)}" for note in comparison.notes)
    return "\n\n".join([*parts, *([notes] if notes else [])]) + "\n"


def _escape(text: str) -> str:
    text = text.replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|_*`\[\]])", r"\\\1", text)
