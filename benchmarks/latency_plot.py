"""Latencies of the shape suite as bars with quartiles, a panel a case: results/latency_<device>.csv to .png.

python -m benchmarks.latency_plot                    # the suite's own numbers of rows, float32 on a CPU
python -m benchmarks.latency_plot --rows 1
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.cases import SUITE
from compress_bilinear._io import written_atomically

Row = dict[str, str]

RESULTS = Path(__file__).parent / "results"
# greys for what there is, a colour for each of our forms, pale where a plain chain computes it
_COLOURS = {
    "nn.Bilinear": "#5c6770", "einsum": "#8f99a1", "one GEMM": "#aab3b9", "outer": "#c5ccd0", "plain Triton": "#dde1e4",
    "dense": "#1f6fb4", "dense int8": "#6fb1e0", "dense int8, bfloat16": "#2f8f9d",
    "CP": "#d1345b", "CP int8": "#e68aa0", "CP int8, bfloat16": "#a3195b", "CP composed": "#edadbd",
    "Tucker": "#d99000", "Tucker composed": "#f1d9a6",
}  # fmt: skip
_COLUMNS = 3


def draw(source: Path, target: Path, rows: str = "suite", dtype: str | None = None, kind: str = "forward") -> bool:
    """Write the picture; False where there is nothing to draw.

    Args:
        source: the CSV of `benchmarks.run`.
        rows: of a call, or "suite" for each case's own; pairs have their own in any case.
        dtype: None takes the first in the CSV.
        kind: "forward" or "training".
    """
    if not source.exists():
        return False
    with open(source, encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if row.get("status") == "ok" and row["pass"] == kind]
    if not found:
        return False
    found = [row for row in found if row["dtype"] == (dtype or found[0]["dtype"])]
    panels = []
    for case in dict.fromkeys(row["case"] for row in found):
        own = [row for row in found if row["case"] == case]
        wanted = own[0]["rows"] if rows == "suite" or "x" in own[0]["rows"] else rows
        if panel := [row for row in own if row["rows"] == _suite_rows(case, wanted, rows)]:
            panels.append(panel)
    if not panels:
        return False
    lines = math.ceil(len(panels) / _COLUMNS)
    figure = Figure(figsize=(14, 0.9 + 2.9 * lines), layout="constrained")
    axes = list(figure.subplots(lines, _COLUMNS, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        _panel(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    one = panels[0][0]
    figure.suptitle(
        f"Milliseconds a call ({kind}, {one['dtype']}), median and quartiles; CP and Tucker hold a quarter of the "
        f"parameters\n{one['processor']}, {one['threads']} threads, torch {one['torch']}",
        fontsize=11,
    )
    with written_atomically(target) as temporary:
        figure.savefig(temporary, format="png", dpi=100, facecolor="white")
    return True


def _suite_rows(case: str, first: str, asked: str) -> str:
    """The number of rows to draw; the first in the CSV where the suite does not know the case."""
    if asked != "suite" or "x" in first:
        return first
    known = {known.name: str(known.rows) for known in SUITE}
    return known.get(case, first)


def _panel(axis: Axes, rows: Sequence[Row]) -> None:
    order = sorted(rows, key=lambda row: list(_COLOURS).index(_base(row)))
    medians = [float(row["median_ms"]) for row in order]
    lower = [max(0.0, m - float(row["lower_quartile_ms"])) for m, row in zip(medians, order, strict=True)]
    upper = [max(0.0, float(row["upper_quartile_ms"]) - m) for m, row in zip(medians, order, strict=True)]
    places = list(range(len(order)))
    colours = [_COLOURS[_base(row)] for row in order]
    axis.barh(places, medians, xerr=(lower, upper), color=colours, error_kw={"elinewidth": 1, "capsize": 2})
    most = max(m + up for m, up in zip(medians, upper, strict=True))
    for place, median, up in zip(places, medians, upper, strict=True):
        axis.text(
            median + up + 0.015 * most,
            place,
            f"{median:.3g}" if median < 1000 else f"{median:.0f}",
            va="center",
            fontsize=8,
        )
    axis.set_xlim(0, 1.18 * most)
    axis.set_yticks(places, [row["contestant"] for row in order], fontsize=8)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    one = rows[0]
    title = f"{one['case'].replace('_', ' ')}: {one['in1']} × {one['in2']} → {one['out']}, {_pairs(one['rows'])}"
    axis.set_title(title, fontsize=9, loc="left")


def _base(row: Row) -> str:
    """The contestant whose colour a row has: that of its name before a comma."""
    name = row["contestant"].split(",")[0]
    return name if name in _COLOURS else row["family"]


def _pairs(rows: str) -> str:
    return rows.replace("x", " × ").replace("^2", "² pairs") if "x" in rows else f"{rows} rows"


def main() -> None:
    """Draw the last whole run's results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--kind", default="forward", choices=("forward", "training"))
    parser.add_argument("--rows", default="suite")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the CSV and the picture")
    options = parser.parse_args()
    source = options.results / f"latency_{options.device}.csv"
    target = source.with_suffix(".png")
    if not draw(source, target, options.rows, options.dtype, options.kind):
        sys.exit("Nothing to draw.")
    print(f"Wrote {target}")


if __name__ == "__main__":
    main()
