"""Error against seconds of the solvers, a panel a shape: results/solvers_cpu.csv to results/solvers_cpu.png.

python -m benchmarks.plot
"""

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from compress_bilinear._io import written_atomically

Row = dict[str, str]

RESULTS = Path(__file__).parent / "results"
METHODS = {"cp": "CP", "tucker": "Tucker"}
# the same in all panels, blues for TensorLy and ochres for pyttb; the signs tell them apart without colour
STYLES = {
    "ours": ("#d1345b", "o"),
    "TensorLy random": ("#1f6fb4", "s"),
    "TensorLy svd": ("#12355b", "D"),
    "TensorLy sampled": ("#6fb1e0", "v"),
    "TensorLy": ("#1f6fb4", "s"),
    "TensorLy numpy": ("#12355b", "X"),
    "TensorLy randomized": ("#6fb1e0", "v"),
    "pyttb cp_als": ("#d99000", "^"),
    "pyttb tucker_als": ("#d99000", "^"),
    "pyttb hosvd": ("#7a5c00", "P"),
}
_COLUMNS = 3
_SPREAD = 0.1  # errors this part above a panel's best are drawn at its top, with their value
_LEAST_SPREAD = 0.02  # a panel's axis is at least this part of its best error high: a part in a thousand is a tie


def draw(source: Path, target: Path) -> bool:
    """Write the picture; False where there is nothing to draw."""
    if not source.exists():
        return False
    with open(source, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] == "ok" and "MaxError" not in row["setting"]]
    cases = {method: _cases(rows, method) for method in METHODS}
    lines = {method: math.ceil(len(names) / _COLUMNS) for method, names in cases.items() if names}
    if not lines:
        return False
    figure = Figure(figsize=(12, 0.9 + 3.1 * sum(lines.values())), layout="constrained")
    for part, (method, count) in zip(_parts(figure, lines), lines.items(), strict=True):
        grid = part.subplots(count, _COLUMNS, squeeze=False)
        axes = list(grid.flat)
        for axis, case in zip(axes, cases[method], strict=False):
            _panel(axis, [row for row in rows if (row["method"], row["case"]) == (method, case)])
        for axis in axes[len(cases[method]) :]:
            axis.set_axis_off()
        for axis in grid[:, 0]:
            axis.set_ylabel("relative error")
        handles = {handle.get_label(): handle for axis in axes for handle in axis.get_legend_handles_labels()[0]}
        names = [name for name in STYLES if name in handles]
        part.suptitle(METHODS[method] + (_NOTE if method == "cp" else ""), x=0.01, ha="left", fontsize=12)
        part.legend(
            [handles[name] for name in names], names, loc="outside lower center", ncols=len(names), frameon=False
        )
    with written_atomically(target) as temporary:
        figure.savefig(temporary, format="png", dpi=110, facecolor="white")
    return True


_NOTE = (
    ". Lines: ours with budgets from 1/30 to 0.4 of TensorLy's time; TensorLy random with 10, 30, 100"
    " sweeps.\nRing: our default call. Arrow: above the axis."
)


def _parts(figure: Figure, lines: dict[str, int]) -> list[Figure]:
    parts = figure.subfigures(len(lines), 1, height_ratios=list(lines.values()), squeeze=False)
    return list(parts[:, 0])


def _cases(rows: Sequence[Row], method: str) -> list[str]:
    """In order; those whose errors span decades (Hilbert) do not fit a linear axis and are left to the CSV."""
    return list(
        dict.fromkeys(row["case"] for row in rows if row["method"] == method and not row["case"].startswith("hilbert"))
    )


def _panel(axis: Axes, rows: Sequence[Row]) -> None:
    best = min(float(row["error"]) for row in rows)
    top = max(float(row["error"]) for row in rows)
    top = min(max(top, best * (1 + _LEAST_SPREAD)), best * (1 + _SPREAD))
    bottom, top = best - 0.08 * (top - best), top + 0.08 * (top - best)
    axis.set_ylim(bottom, top)
    axis.set_xscale("log")
    for name in dict.fromkeys(row["contestant"] for row in rows):
        own = [row for row in rows if row["contestant"] == name]
        colour, sign = STYLES[name]
        curve = sorted((row for row in own if row["setting"] != "default" or len(own) == 1), key=_seconds)
        inside = [row for row in curve if float(row["error"]) <= top]
        axis.plot(
            [_seconds(row) for row in inside],
            [float(row["error"]) for row in inside],
            color=colour,
            marker=sign,
            markersize=6,
            linewidth=1.4,
            label=name,
            zorder=3 if name == "ours" else 2,
        )
        for row in curve:
            if float(row["error"]) > top:
                where = (_seconds(row), top - 0.05 * (top - bottom))
                axis.plot(*where, color=colour, marker=sign, markersize=6)
                text = f"{float(row['error']):.3g} ↑"
                axis.annotate(text, where, (-7, 0), textcoords="offset points", ha="right", va="center", fontsize=9)
        if len(own) > 1:
            for row in own:
                if row["setting"] == "default":
                    where = (_seconds(row), float(row["error"]))
                    axis.plot(*where, "o", color=colour, markersize=11, markerfacecolor="none", markeredgewidth=2)
    rank, shape = rows[0]["rank"], rows[0]["shape"]
    case = rows[0]["case"]
    name = "power law" if case.startswith("power_") else case.replace("_", " ")
    axis.set_title(f"{name} {shape.replace('x', '×')}, rank {rank.replace('x', '×')}", fontsize=10)
    axis.grid(alpha=0.25)
    axis.set_xlabel("seconds")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if _decades(rows) > 1.5 else (1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(MaxNLocator(5))


def _decades(rows: Sequence[Row]) -> float:
    seconds = [_seconds(row) for row in rows]
    return math.log10(max(seconds) / min(seconds))


def _seconds(row: Row) -> float:
    return float(row["seconds"])


def main() -> None:
    """Draw the last whole run's results."""
    target = RESULTS / "solvers_cpu.png"
    if not draw(RESULTS / "solvers_cpu.csv", target):
        sys.exit("Nothing to draw.")
    print(f"Wrote {target}")


if __name__ == "__main__":
    main()
