"""The plots of a layer, drawn by Matplotlib: its candidates, the singular values of its weight, and latencies."""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy

from ._data import FrontPoint, LayerReport, Spectrum
from ._text import error, named, printable, size

_SIZE = (330 / 72, 190 / 72)  # inches, of 72 points each
_SMALLEST = 1e-5  # below it a singular value is rounding
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))  # so that the lines differ without colour too

_INK, _GRID, _SURFACE = "#000001", "#000002", "#000003"
_SERIES = ("#00000a", "#00000b", "#00000c")
_MARKS = {"cp": ("o", _SERIES[0]), "tucker": ("s", _SERIES[1]), "dense": ("^", _SERIES[2]), "keep": ("D", _INK)}
_VARIABLES = {_INK: "ink", _GRID: "grid", _SURFACE: "surface"} | {c: f"series-{k}" for k, c in enumerate(_SERIES, 1)}
"""Colours that stand for the page's custom properties, which are others in dark mode."""

_SHORTER = (
    (r"<\?xml.*?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<defs>\s*<(style|clipPath).*?</defs>|</?g\b[^>]*>", ""),
    (r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">'),
    (r"font-(size|family): [^;]*; ", ""),
    (r' clip-path="[^"]*"| transform="rotate\(-0 [^"]*"', ""),
    (r"(\d\.\d)\d{5,}", r"\1"),
    (r"\s+", " "),
)
"""What halves Matplotlib's SVG, for a page has many plots: the page sets the fonts, and its groups have no style."""


class Plot(NamedTuple):
    """An SVG element, a caption, and in words what it shows."""

    svg: str
    title: str
    words: str


def latency_plot(layer: LayerReport) -> Plot | None:
    """Bars of the medians with the quartiles; None where nothing was timed."""
    after = "rejected" if layer.decision == "kept" else "replacement"
    rows = [
        (printable(label), value, *_both(value, quartiles))
        for label, value, quartiles in (
            ("nn.Bilinear", layer.latency_before_ms, layer.latency_before_quartiles_ms),
            (f"best dense\n{layer.dense_order or ''}", layer.latency_dense_ms, layer.latency_dense_quartiles_ms),
            (f"{after}\n{named(layer)}", layer.latency_after_ms, layer.latency_after_quartiles_ms),
        )
        if value is not None
    ]
    if not rows:
        return None
    labels, values, low, high = zip(*rows, strict=True)
    places = range(len(rows))

    def draw(axes: Any) -> None:
        axes.barh(places, values, 0.5, color=_SERIES)
        spread = [[v - a for v, a in zip(values, low, strict=True)], [b - v for v, b in zip(values, high, strict=True)]]
        axes.errorbar(values, places, xerr=spread, fmt="none", elinewidth=1.2, capsize=3)
        for place, value, end in zip(places, values, high, strict=True):
            axes.text(end + 0.03 * max(high), place, f"{value:.3g} ms", va="center", color=_INK)
        axes.set_yticks(places, labels)
        axes.set_xticks([0], ["0"])
        axes.yaxis.grid(False)
        axes.set_xlim(0, 1.25 * max(high))
        axes.set_ylim(len(rows) - 0.5, -0.5)

    words = "; ".join(
        f"{' '.join(label.split())} {value:.3g} ms"
        + (f" (quartiles {first:.3g} to {last:.3g})" if last > first else "")
        for label, value, first, last in rows
    )
    title = f"Latency of {layer.batch_size} rows, with quartiles"
    words = f"Bars of the latency of a call of {layer.batch_size} rows: {words}."
    return Plot(_drawn(draw, f"latency {layer.name}", left=0.25), title, words)


def _both(value: float, quartiles: tuple[float | None, float | None] | None) -> tuple[float, float]:
    """The quartiles, no closer than the median; the median itself for one that is not known."""
    low, high = quartiles or (None, None)
    return min(value, value if low is None else low), max(value, value if high is None else high)


def front(layer: LayerReport) -> tuple[str, list[tuple[FrontPoint, float]]]:
    """The kind of error that more candidates have, and the candidates that have it, with it."""
    by_output = [(one, one.output_error) for one in layer.front if one.output_error is not None]
    by_weight = [(one, one.weight_error) for one in layer.front if one.weight_error is not None]
    kind, known = ("output", by_output) if len(by_output) >= len(by_weight) else ("weight", by_weight)
    return f"{kind} error", [(one, value) for one, value in known if one.bytes > 0 and math.isfinite(value)]


def front_plot(layer: LayerReport) -> Plot | None:
    """Error over bytes of the candidates; None for fewer than two."""
    kind, known = front(layer)
    if len(known) < 2:
        return None
    floor = min((value for _, value in known if value > 0), default=0.2) / 2  # the place of 0, which has no logarithm
    placed = [(point, value or floor) for point, value in known]

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        edge = _edge(placed)
        axes.plot([point.bytes for point, _ in edge], [value for _, value in edge], color=_GRID, linewidth=1.5)
        for point, value in placed:
            mark, colour = _MARKS.get(point.method, _MARKS["keep"])
            axes.plot(point.bytes, value, mark, ms=6, mfc=_SURFACE if point.quantize else colour, mec=colour)
            if point.chosen:
                axes.plot(point.bytes, value, "o", ms=14, mfc="none", mec=_INK, mew=1.6)
            if value == floor:
                axes.annotate("exact", (point.bytes, value), (-8, -3), textcoords="offset points", ha="right")
        sizes, errors = ([one.bytes for one, _ in placed], [value for _, value in placed])
        axes.set_xlim(min(sizes) / 1.2, max(sizes) * 1.2)
        axes.set_ylim(min(errors) / 1.3, max(errors) * 1.3)
        _round_ticks(axes.xaxis, max(sizes) / min(sizes), lambda value: size(round(value)))
        _round_ticks(axes.yaxis, max(errors) / min(errors), lambda value: f"{value:g}")
        axes.set_xlabel("bytes")
        axes.set_ylabel(kind)

    chosen = next(((point, value) for point, value in known if point.chosen), None)
    words = "none of them was chosen"
    if chosen is not None:
        words = f"the chosen one is {named(chosen[0])} with {size(chosen[0].bytes)} and {kind} {error(chosen[1])}"
    words = f"{kind.capitalize()} over bytes of {len(known)} candidates; {words}."
    missing = len(layer.front) - len(known)
    words += f" Of {missing} more the {kind} is not known." if missing else ""
    return Plot(_drawn(draw, f"front {layer.name}"), "Candidates by bytes and error", words)


def _edge(placed: Sequence[tuple[FrontPoint, float]]) -> list[tuple[FrontPoint, float]]:
    """Those that none beats in both bytes and error, by bytes."""
    edge: list[tuple[FrontPoint, float]] = []
    for point, value in sorted(placed, key=lambda pair: (pair[0].bytes, pair[1])):
        if not edge or value < edge[-1][1]:
            edge.append((point, value))
    return edge


def spectra_plot(layer: LayerReport) -> Plot | None:
    """Singular values of the three unfoldings, with marks at the ranks; None where they are not known."""
    if len(layer.spectra) != 3:
        return None
    ranks = layer.rank if isinstance(layer.rank, Sequence) else (layer.rank,) * 3
    lines = [
        (
            spectrum,
            [max(value, _SMALLEST) for value in spectrum.values],
            rank if (rank or 0) <= spectrum.indices[-1] else 0,
        )
        for spectrum, rank in zip(layer.spectra, ranks, strict=True)
    ]

    def draw(axes: Any) -> None:
        axes.set_yscale("log")
        for k, (spectrum, values, rank) in enumerate(lines):
            axes.plot(spectrum.indices, values, color=_SERIES[k], linestyle=_DASHES[k], linewidth=1.6)
            if rank:
                axes.plot(rank, at(spectrum, rank), "osD"[k], ms=7, mfc=_SERIES[k], mec=_INK)
        heights = [value for _, values, _ in lines for value in values]
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(1, max(2, *(one.indices[-1] for one in layer.spectra)))
        axes.set_ylim(min(heights) / 1.2, max(heights) * 1.2)
        _round_ticks(axes.yaxis, max(heights) / min(heights), lambda value: f"{value:g}")
        axes.set_xlabel("singular value number")
        axes.set_ylabel("σ / ‖W‖")

    words = "; ".join(
        f"{name} falls from {spectrum.values[0]:.2g} to {spectrum.values[-1]:.2g} at {spectrum.indices[-1]}"
        + (f", {at(spectrum, rank):.2g} at the rank {rank}" if rank else "")
        for name, (spectrum, _, rank) in zip(("out", "in1", "in2"), lines, strict=True)
    )
    sampled = " Estimated from a sample of the weight." if any(one.sampled for one in layer.spectra) else ""
    what = "rejected" if layer.decision == "kept" else "chosen"
    marked = f"ranks {', '.join(map(str, layer.rank))}" if isinstance(layer.rank, Sequence) else f"rank {layer.rank}"
    title = "Singular values" + (f"; marks at the {what} {marked}" if any(rank for *_, rank in lines) else "")
    return Plot(_drawn(draw, f"spectra {layer.name}"), title, f"{title} of the unfoldings: {words}.{sampled}")


def at(spectrum: Spectrum, index: int) -> float:
    """The singular value of this number, interpolated linearly between those that are kept."""
    return max(float(numpy.interp(index, spectrum.indices, spectrum.values)), _SMALLEST)


def _round_ticks(axis: Any, ratio: float, label: Callable[[float], str]) -> None:
    """At most five marks at round numbers on a logarithmic axis whose ends have this ratio."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    steps = (1, 3) if ratio > 30 else (1, 2, 5) if ratio > 3 else (1, 1.5, 2, 3, 4, 5, 7)
    axis.set_major_locator(LogLocator(subs=steps if ratio < 1000 else (1,), numticks=5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))


def _drawn(draw: Callable[[Any], None], salt: str, left: float = 0.16) -> str:
    """The axes that `draw` fills, as SVG in the page's colours, whatever style the caller of Matplotlib has set.

    `salt` makes the ids of the drawing its own.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    own: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": ascii(salt), "text.parse_math": False}
    own |= {"text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK}
    own["axes.prop_cycle"] = f"cycler('color', ['{_INK}'])"
    own |= {"grid.color": _GRID, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True}
    own |= {f"{axis}tick.{kind}.size": 0 for axis in "xy" for kind in ("major", "minor")}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(own)
        figure = Figure(figsize=_SIZE, dpi=72, frameon=False)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((left, 0.2, 0.97 - left, 0.74), frameon=False)
        draw(axes)
        axes.minorticks_off()
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    for pattern, shorter in _SHORTER:
        svg = re.sub(pattern, shorter, svg, flags=re.DOTALL)
    return re.sub("|".join(_VARIABLES), lambda match: f"var(--{_VARIABLES[match.group()]})", svg).strip()
