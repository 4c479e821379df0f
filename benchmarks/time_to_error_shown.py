"""What `benchmarks.time_to_error` found, as tables and as a picture: error over seconds, a panel a layer.

python -m benchmarks.time_to_error_shown  # draws the committed results again
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.panels import draw_panels
from benchmarks.rows import Row, read

BOX = box.SIMPLE_HEAD

STYLES = {
    "automatic": ("o", "#1b6ca8"),
    "TensorLy CP, int8": ("s", "#c8553d"),
    "TensorLy Tucker, int8": ("^", "#d98e04"),
}
"""The same colours as in `quality_plot`."""


def table(rows: Sequence[Row]) -> Table:
    """The points as a table."""
    fields = ["layer", "contestant", "asked_seconds", "seconds", "overrun", "output_error", "reported_error"]
    fields += ["smaller_x", "method", "rank", "format", "peak_mb", "status"]
    shown = Table(*(name.replace("_", " ") for name in fields), box=BOX)
    for row in rows:
        values = (row.get(name, "") for name in fields)
        shown.add_row(*("" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    return shown


def promises(rows: Sequence[Row]) -> Table:
    """Of each layer: whether limits are kept, and whether twice the time is ever worse; without a limit, as it took."""
    table = Table("Layer", "Over 1.1 of the time", "At most 1 s", "Worse with twice the time", "At most 2%", box=BOX)
    for layer in dict.fromkeys(row["layer"] for row in rows):
        own = [row for row in rows if (row["layer"], row["contestant"], row["status"]) == (layer, "automatic", "ok")]
        limited = [(float(row["asked_seconds"]), float(row["seconds"])) for row in own if row["asked_seconds"]]
        over = max((took - 1.1 * asked for asked, took in limited), default=0.0)
        times = [float(row["asked_seconds"] or row["seconds"]) for row in own]
        found = list(zip(times, (float(row["output_error"] or math.inf) for row in own), strict=True))
        rises = [e2 / e1 - 1 for t1, e1 in found for t2, e2 in found if t2 >= 2 * t1 and e1 < math.inf]
        worse = max(rises, default=0.0)
        kept = ("yes" if holds else "NO" for holds in (over <= 1, worse <= 0.02))
        table.add_row(layer, f"{over:+.1f} s", next(kept), f"{worse:+.1%}", next(kept))
    return table


def plot(path: Path) -> Path:
    """Draw a CSV of `benchmarks.time_to_error` beside it as PNG."""
    rows = [row for row in read(path) if row["output_error"]]
    layers = sorted({row["layer"] for row in rows}, key=lambda name: math.prod(map(int, name.split("x"))))
    groups = {layer: [row for row in rows if row["layer"] == layer] for layer in layers}

    def draw(axis: Any, own: list[dict[str, str]], layer: str) -> None:
        _draw(axis, own, layer)
        if layer == layers[0]:
            axis.set_ylabel("output error on unseen rows")
            axis.legend(fontsize=7)

    return draw_panels(path, groups, draw, (4.4, 4.2))


def _draw(axis: Any, rows: list[dict[str, str]], layer: str) -> None:
    for name, (marker, colour) in STYLES.items():
        own = [row for row in rows if row["contestant"] == name]
        points = sorted((float(row["seconds"]), float(row["output_error"]), row["asked_seconds"]) for row in own)
        if not points:
            continue
        axis.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            marker + "-",
            color=colour,
            label=name,
            markersize=6,
        )
        last = 0.0
        for time, error, limit in points if name == "automatic" else ():
            if limit and time < 1.5 * last:
                continue  # no room for its label
            last = time
            axis.annotate(
                f"{limit} s" if limit else "no limit",
                (time, error),
                fontsize=7,
                xytext=(3, 5 if limit else -11),
                textcoords="offset points",
            )
    out, in1, in2 = layer.split("x")
    axis.set_title(f"{in1} x {in2} → {out}, at most 1/8 of the bytes", fontsize=10)
    axis.set_xscale("log")
    axis.set_xlabel("seconds taken")
    axis.margins(x=0.15)  # room for "no limit"
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)


if __name__ == "__main__":
    print(f"Wrote {plot(Path(__file__).parent / 'results' / 'time_to_error_cpu.csv')}")
