"""What a task loses over the bytes of its layer: a picture of results/quality_cpu.csv.

python -m benchmarks.quality_plot  # draws the committed results again
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.panels import draw_panels
from benchmarks.rows import read

METRICS = {
    "kinships": ("mrr", "Kinships, TuckER (64 x 24 → 64): filtered MRR"),
    "digits": ("accuracy", "Digits, two views (64 x 64 → 64): accuracy"),
}
PUBLISHED = {"ComplEx-N3 .823": 0.823, "ConvE .83": 0.83}
"""Filtered MRR on Kinships: Lacroix et al. (2018) as reported by Sun et al. (2021); Dettmers et al. (2018)."""

STYLES = {
    "automatic": ("o-", "#1b6ca8"),
    "automatic, refined": ("D-", "#0b3c5d"),
    "dense int8": ("*", "#5a5a5a"),
    "dense nf4": ("P", "#5a5a5a"),
    "TensorLy CP": ("s--", "#c8553d"),
    "TensorLy Tucker": ("^--", "#d98e04"),
    "SVD per output": ("v--", "#7a5195"),
}


def plot(path: Path) -> Path:
    """Draw a CSV of `benchmarks.quality` beside it as PNG: means over the seeds, bars from the least to the most."""
    rows = [row for row in read(path) if row["kind"] != "to an error"]
    networks = dict.fromkeys(row["network"] for row in rows)
    groups = {network: [row for row in rows if row["network"] == network] for network in networks}
    return draw_panels(path, groups, _draw, (6.2, 4.6))


def _draw(axis: Any, rows: list[dict[str, str]], network: str) -> None:
    metric, title = METRICS[network]
    before = [float(row[metric]) for row in rows if row["kind"] == "original"]
    axis.axhline(sum(before) / len(before), color="black", linewidth=1, label="nn.Bilinear, float32")
    for method, (style, colour) in STYLES.items():
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            if row["method"] == method:
                points[row["asked_x"]].append((float(row["smaller_x"]), float(row[metric])))
        if not points:
            continue
        means = sorted(
            tuple(sum(values) / len(values) for values in zip(*group, strict=True)) for group in points.values()
        )
        low = [min(y for _, y in group) for group in points.values()]
        high = [max(y for _, y in group) for group in points.values()]
        centres = [sum(x for x, _ in group) / len(group) for group in points.values()]
        axis.plot(*zip(*means, strict=True), style, color=colour, label=method, markersize=6)
        axis.vlines(centres, low, high, color=colour, linewidth=1, alpha=0.5)
    if network == "kinships":
        for number, (name, value) in enumerate(PUBLISHED.items()):
            axis.axhline(value, color="#999999", linewidth=0.8, linestyle=":")
            axis.annotate(name, (24 - 7 * number, value), fontsize=7, color="#555555", va="bottom", ha="right")
    axis.set_title(title, fontsize=10)
    axis.set_xscale("log", base=2)
    axis.set_xticks((sizes := (4, 8, 12, 16, 24, 32, 48)), [f"{times}x" for times in sizes])
    axis.set_xlabel("times smaller, all bytes of the layer counted")
    axis.set_ylabel(metric)
    floor = min(before) - 0.2
    axis.set_ylim(bottom=max(floor, min(axis.get_ylim()[0], 1.0)))
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, loc="lower left")


if __name__ == "__main__":
    print(f"Wrote {plot(Path(__file__).parent / 'results' / 'quality_cpu.csv')}")
