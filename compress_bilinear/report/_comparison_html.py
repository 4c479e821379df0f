"""A comparison as a page of its own."""

from ._comparison import Comparison, Panel
from ._page import Cell, page


def render_comparison(comparison: Comparison) -> str:
    """The page: a table for each figure, which sorts."""
    panels = [
        {
            "title": panel.field.replace("_", " ").replace(" ms", " (ms)"),
            "better": "" if panel.better is None else f"{panel.better} is better",
            "columns": [{"label": "Layer", "number": False}]
            + [{"label": run, "number": True} for run in comparison.runs],
            "rows": [_row(panel, k) for k in range(len(panel.rows))],
        }
        for panel in comparison.panels
    ]
    return page("comparison.html", runs=comparison.runs, panels=panels, notes=comparison.notes)


def _row(panel: Panel, number: int) -> dict[str, object]:
    name = panel.rows[number]
    cells = [Cell(text=name)] + [
        Cell(text=panel.text(value), number=True, value=value, best=best)
        for value, best in zip(panel.values[number], panel.best(number), strict=True)
    ]
    return {"name": name, "link": "", "cells": cells}
