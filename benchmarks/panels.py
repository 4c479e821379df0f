"""A picture of a CSV of results: a panel for each of its groups, side by side."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from compress_bilinear._io import written_atomically


def draw_panels(
    path: Path,
    groups: Mapping[str, Sequence[dict[str, str]]],
    draw: Callable[[Any, list[dict[str, str]], str], None],
    size: tuple[float, float],  # of a panel, in inches
) -> Path:
    """Draw each group's rows in a panel of its own; returns the PNG, which is beside the CSV and whole at any time."""
    width, height = size
    figure = Figure(figsize=(width * len(groups), height))
    for axis, (name, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        draw(axis, list(rows), name)
    figure.tight_layout()
    target = path.with_suffix(".png")
    with written_atomically(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return target
