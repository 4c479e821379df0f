"""The plots of a layer, drawn by Matplotlib: its candidates, the singular values of its weight, and latencies."""

import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy

from ._data import LayerReport, Spectrum
from ._text import named, printable, size

_SIZE = (330 / 72, 190 / 72)  # inches, of 72 points each
_SMALLEST = 1e-5  # below it a singular value is rounding
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))  # so that the lines differ without colour too

_INK, _GRID, _SURFACE = "#000001", "#000002", "#000003"
_SERIES = ("#00000a", "#00000b", "#00000c")
_MARKS = {"cp": ("o", _SERIES[0]), "tucker": ("s", _SERIES[1]), "dense": ("^", _SERIES[2]), "keep": ("D", _INK)}
_VARIABLES = {_INK: "ink", _GRID: "grid", _SURFACE: "surface"} | {c: f"series-{k}" for k, c in enumerate(_SERIES, 1)}
"""Colours that stand for the page's custom properties, which are others in dark mode."""

_CANDIDATES = (
    *(("cp", "CP"), ("tucker", "Tucker"), ("dense", "dense"), ("keep", "kept")),
    *(("hollow", "quantized"), ("dot", "predicted"), ("ring", "chosen")),
)
_UNFOLDINGS = (("l1", "out"), ("l2", "in1"), ("l3", "in2"))

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
    """An SVG element, a caption, and what its marks mean: classes of the page's style, and labels."""

    svg: str
    title: str
    key: tuple[tuple[str, str], ...] = ()


def latency_plot(layer: LayerReport) -> Plot | None:
    """Bars of the medians with the quartiles; None where nothing was timed."""
    after = "rejected" if layer.decision == "kept" else "replacement"
    rows = [
        (printable(label), value, [value if end is None else end for end in quartiles or (None, None)])
        for label, value, quartiles in (
            ("nn.Bilinear", layer.latency_before_ms, layer.latency_before_quartiles_ms),
            (f"best dense\n{layer.dense_order or ''}", layer.latency_dense_ms, layer.latency_dense_quartiles_ms),
            (f"{after}\n{named(layer)}", layer.latency_after_ms, layer.latency_after_quartiles_ms),
        )
        if value is not None
    ]
    if not rows:
        return None

    def draw(axes: Any) -> None:
        longest = max(max(value, *ends) for _, value, ends in rows)
        for place, (_, value, ends) in enumerate(rows):
            axes.barh(place, value, 0.5, color=_SERIES[place])
            axes.plot(ends, (place, place), marker="|", color=_INK, linewidth=1.2)
            axes.text(max(value, *ends) + 0.03 * longest, place, f"{value:.3g} ms", va="center", color=_INK)
        axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
        axes.set_xticks([0], ["0"])
        axes.yaxis.grid(False)
        axes.set_xlim(0, 1.25 * longest)
        axes.set_ylim(len(rows) - 0.5, -0.5)

    title = f"Latency of {layer.batch_size} rows, with quartiles"
    return Plot(_drawn(draw, f"latency {layer.name}", left=0.25), title)


def front_plot(layer: LayerReport) -> Plot | None:
    """Candidates by bytes and the kind of error that most of them have; None for fewer than two."""
    kinds = ("output_error", "weight_error")
    kind = max(kinds, key=lambda kind: sum(getattr(point, kind) is not None for point in layer.front))
    errors = [(point, getattr(point, kind)) for point in layer.front]
    known = [(point, value) for point, value in errors if value is not None and math.isfinite(value)]
    if len(known) < 2:
        return None
    floor = min((value for _, value in known if value > 0), default=0.2) / 2  # the place of 0, which has no logarithm
    placed = [(point, value or floor) for point, value in known]

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        order = sorted((point.bytes, value) for point, value in placed)
        least = list(accumulate((value for _, value in order), min))  # error within so many bytes
        axes.step([nbytes for nbytes, _ in order], least, where="post", color=_GRID, linewidth=1.5)
        for point, value in placed:
            mark, colour = _MARKS.get(point.method, _MARKS["keep"])
            if point.predicted:
                axes.plot(point.bytes, value, ".", ms=2, color=colour)
                continue
            axes.plot(point.bytes, value, mark, ms=6, mfc=_SURFACE if point.quantize else colour, mec=colour)
            if point.chosen:
                axes.plot(point.bytes, value, "o", ms=14, mfc="none", mec=_INK, mew=1.6)
            if value == floor:
                axes.annotate("exact", (point.bytes, value), (-8, -3), textcoords="offset points", ha="right")
        axes.margins(0.06)
        _round_ticks(axes.xaxis, lambda value, _: size(round(value)))
        _round_ticks(axes.yaxis, "{x:g}")
        axes.set_xlabel("bytes")
        axes.set_ylabel(kind.replace("_", " "))

    return Plot(_drawn(draw, f"front {layer.name}"), "Candidates by bytes and error", _CANDIDATES)


def spectra_plot(layer: LayerReport) -> Plot | None:
    """Singular values of the three unfoldings, with marks at the ranks; None where they are not known."""
    if len(layer.spectra) != 3:
        return None
    ranks = layer.rank if isinstance(layer.rank, Sequence) else (layer.rank,) * 3

    def draw(axes: Any) -> None:
        axes.set_yscale("log")
        for k, (spectrum, rank) in enumerate(zip(layer.spectra, ranks, strict=True)):
            values = [max(value, _SMALLEST) for value in spectrum.values]
            axes.plot(spectrum.indices, values, color=_SERIES[k], linestyle=_DASHES[k], linewidth=1.6)
            if rank is not None and rank <= spectrum.indices[-1]:  # a CP may have a rank above a mode's length
                axes.plot(rank, at(spectrum, rank), "osD"[k], ms=7, mfc=_SERIES[k], mec=_INK)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(1, max(2, *(one.indices[-1] for one in layer.spectra)))
        _round_ticks(axes.yaxis, "{x:g}")
        axes.set_xlabel("singular value number")
        axes.set_ylabel("σ / ‖W‖")

    title = "Singular values of the unfoldings, with marks at the ranks"
    return Plot(_drawn(draw, f"spectra {layer.name}"), title, _UNFOLDINGS)


def at(spectrum: Spectrum, index: int) -> float:
    """The singular value of this number, interpolated linearly between those that are kept."""
    return max(float(numpy.interp(index, spectrum.indices, spectrum.values)), _SMALLEST)


def _round_ticks(axis: Any, label: str | Callable[[float, int], str]) -> None:
    """At most five marks at round numbers on a logarithmic axis."""
    from matplotlib.ticker import LogLocator

    low, high = axis.get_view_interval()
    steps = (1, 3) if high > 30 * low else (1, 2, 5) if high > 3 * low else (1, 1.5, 2, 3, 4, 5, 7)
    axis.set_major_locator(LogLocator(subs=steps if high < 1000 * low else (1,), numticks=5))
    axis.set_major_formatter(label)


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
