"""The plots of a layer, drawn by Matplotlib: latencies, the front of what was considered, and the spectra."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ._data import FrontPoint, LayerReport, Quartiles, Spectrum
from ._format import error, named, printable, size
from ._svg import GRID, INK, SERIES, SURFACE, inlined

_MODES = ("out", "in1", "in2")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))  # told apart without colour
_MARKS = {"cp": ("o", SERIES[0]), "tucker": ("s", SERIES[1]), "dense": ("^", SERIES[2])}
_KEPT = ("D", INK)
_WIDTH, _HEIGHT = 330, 190  # of a plot, in its own units
_SMALLEST = 1e-5  # below which a singular value is rounding


class Plot(NamedTuple):
    """An SVG element, and in words what it shows."""

    svg: str
    words: str


def latency_plot(layer: LayerReport) -> Plot | None:
    """Bars of the medians with the quartiles; None where nothing was timed."""
    after = "turned down" if layer.decision == "kept" else "replacement"
    rows = [
        ((label, detail), value, _whole(quartiles))
        for label, detail, value, quartiles in (
            ("nn.Bilinear", "", layer.latency_before_ms, layer.latency_before_quartiles_ms),
            (
                "best dense",
                printable(layer.dense_order or ""),
                layer.latency_dense_ms,
                layer.latency_dense_quartiles_ms,
            ),
            (after, printable(named(layer)), layer.latency_after_ms, layer.latency_after_quartiles_ms),
        )
        if value is not None
    ]
    if not rows:
        return None

    def draw(axes: Any) -> None:
        ends = [quartiles[1] if quartiles else value for _, value, quartiles in rows]
        for y, ((label, detail), value, quartiles) in enumerate(rows):
            for text, lower in ((label, -0.13 if detail else 0), (detail, 0.17)):
                place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
                axes.text(-0.03, y + lower, text, color=INK, parse_math=False, **place)
            axes.barh(y, value, 0.5, color=SERIES[y % 3], clip_on=False)
            if quartiles:
                low, high = quartiles
                line = (low, low, low, high, high, high), (y - 0.1, y + 0.1, y, y, y - 0.1, y + 0.1)
                axes.plot(*line, color=INK, linewidth=1.2, clip_on=False)
            axes.text(ends[y] + 0.03 * max(ends), y, f"{value:.3g} ms", va="center", color=INK, parse_math=False)
        axes.set_yticks([])
        axes.set_xlim(0, 1.25 * max(ends))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks([0], ["0"])

    told = "; ".join(
        f"{' '.join(filter(None, label))} {value:.3g} ms"
        + (f" (quartiles {quartiles[0]:.3g} to {quartiles[1]:.3g})" if quartiles else "")
        for label, value, quartiles in rows
    )
    return Plot(_drawn(draw, left=0.25), f"Bars of the latency of a call of {layer.batch_size} rows: {told}.")


def _whole(quartiles: Quartiles | None) -> tuple[float, float] | None:
    """Both of them, or neither."""
    low, high = quartiles or (None, None)
    return None if low is None or high is None else (low, high)


def front(layer: LayerReport) -> tuple[str, list[tuple[FrontPoint, float]]]:
    """What there is to plot error over bytes of, and of what the error is: of what is known of more points."""
    points = [point for point in layer.front if point.bytes > 0]
    by_output = [(one, one.output_error) for one in points if one.output_error is not None]
    by_weight = [(one, one.weight_error) for one in points if one.weight_error is not None]
    kind, known = ("output", by_output) if len(by_output) >= len(by_weight) else ("weight", by_weight)
    return f"{kind} error", [(one, value) for one, value in known if math.isfinite(value)]


def front_plot(layer: LayerReport) -> Plot | None:
    """Error over bytes of what was considered; None of fewer than two points."""
    kind, known = front(layer)
    if len(known) < 2:
        return None
    shown = [value for _, value in known if value > 0]
    floor = min(shown) / 2 if shown else 0.1  # where an exact one stands: a logarithm has no zero
    placed = [(point, value if value > 0 else floor) for point, value in known]

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        edge = _edge(placed)
        axes.plot([p.bytes for p, _ in edge], [v for _, v in edge], color=GRID, linewidth=1.5, clip_on=False, zorder=1)
        for point, value in placed:
            mark, colour = _MARKS.get(point.method, _KEPT)
            face = SURFACE if point.quantize is not None else colour
            axes.plot(point.bytes, value, mark, ms=6, mfc=face, mec=colour, clip_on=False, zorder=2)
            if point.chosen:
                axes.plot(point.bytes, value, "o", ms=14, mfc="none", mec=INK, mew=1.6, clip_on=False, zorder=3)
        sizes = [p.bytes for p, _ in placed]
        axes.set_xlim(min(sizes) / 1.2, max(sizes) * 1.2)
        axes.set_ylim(min(v for _, v in placed) / 1.3, max(v for _, v in placed) * 1.3)
        _ticks(axes, "x", [float(s) for s in sizes], lambda value: size(round(value)))
        _ticks(
            axes,
            "y",
            [v for _, v in placed],
            lambda value: f"{value:g}",
            {floor: "exact"} if len(shown) < len(known) else {},
        )
        axes.set_xlabel("bytes", color=INK)
        axes.set_ylabel(kind, color=INK)

    chosen = next(((p, v) for p, v in known if p.chosen), None)
    told = "none of them was chosen"
    if chosen is not None:
        told = f"the chosen one is {named(chosen[0])} with {size(chosen[0].bytes)} and {kind} {error(chosen[1])}"
    words = f"{kind.capitalize()} over bytes of {len(known)} replacements that were considered; {told}."
    missing = len(layer.front) - len(known)
    return Plot(_drawn(draw), words + (f" Of {missing} more the {kind} is not known." if missing else ""))


def spectra_plot(layer: LayerReport) -> Plot | None:
    """Singular values of the three unfoldings, with the chosen ranks; None where they are not known."""
    if len(layer.spectra) != 3 or not all(one.indices for one in layer.spectra):
        return None
    chosen = layer.rank if isinstance(layer.rank, Sequence) else (layer.rank,) * 3

    def draw(axes: Any) -> None:
        axes.set_yscale("log")
        for k, spectrum in enumerate(layer.spectra):
            values = [max(value, _SMALLEST) for value in spectrum.values]
            axes.plot(spectrum.indices, values, color=SERIES[k], linestyle=_DASHES[k], linewidth=1.6, clip_on=False)
            rank = chosen[k]
            if rank is not None and rank <= spectrum.indices[-1]:
                axes.plot(
                    rank, max(at(spectrum, rank), _SMALLEST), "osD"[k], ms=7, mfc=SERIES[k], mec=INK, clip_on=False
                )
        longest = max(one.indices[-1] for one in layer.spectra)
        heights = [max(value, _SMALLEST) for one in layer.spectra for value in one.values]
        axes.set_xlim(1, max(longest, 2))
        axes.set_ylim(min(heights) / 1.2, max(heights) * 1.2)
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if 5 * s >= longest)
        marks = sorted({1, *range(step, longest + 1, step)})
        axes.set_xticks(marks, [str(mark) for mark in marks])
        _ticks(axes, "y", heights, lambda value: f"{value:g}")
        axes.set_xlabel("singular value number", color=INK)
        axes.set_ylabel("σ / ‖W‖", color=INK)

    told: list[str] = []
    for name, spectrum, rank in zip(_MODES, layer.spectra, chosen, strict=True):
        last = f"{name} falls from {spectrum.values[0]:.2g} to {spectrum.values[-1]:.2g} at {spectrum.indices[-1]}"
        within = rank is not None and rank <= spectrum.indices[-1]
        told.append(last + (f", {at(spectrum, rank):.2g} at the rank {rank}" if within and rank is not None else ""))
    sampled = " Estimated from a sample of the weight." if any(one.sampled for one in layer.spectra) else ""
    return Plot(_drawn(draw), f"Singular values of the unfoldings: {'; '.join(told)}.{sampled}")


def spectra_title(layer: LayerReport) -> str:
    """What the plot of the spectra shows, and which of the ranks it has marks at."""
    what = "turned down" if layer.decision == "kept" else "chosen"
    if layer.rank is None:
        return "Singular values of the unfoldings; no rank was chosen"
    if isinstance(layer.rank, Sequence):
        return f"Singular values; marks at the {what} ranks {', '.join(map(str, layer.rank))}"
    within = [layer.rank <= one.indices[-1] for one in layer.spectra]
    if not any(within):
        return f"Singular values; no mode has as many as the {what} rank {layer.rank}"
    where = "" if all(within) else ", of the modes that have it"
    return f"Singular values; marks at the {what} rank {layer.rank}{where}"


def at(spectrum: Spectrum, index: int) -> float:
    """The singular value of this number, between those that are kept in proportion."""
    pairs = list(zip(spectrum.indices, spectrum.values, strict=True))
    below = max((pair for pair in pairs if pair[0] <= index), default=pairs[0])
    above = min((pair for pair in pairs if pair[0] >= index), default=pairs[-1])
    share = (index - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
    return below[1] + share * (above[1] - below[1])


def _edge(placed: Sequence[tuple[FrontPoint, float]]) -> list[tuple[FrontPoint, float]]:
    """Those that none beats in both bytes and error, by bytes."""
    edge: list[tuple[FrontPoint, float]] = []
    for point, value in sorted(placed, key=lambda pair: (pair[0].bytes, pair[1])):
        if not edge or value < edge[-1][1]:
            edge.append((point, value))
    return edge


def _ticks(axes: Any, which: str, values: Sequence[float], label: Any, also: dict[float, str] | None = None) -> None:
    """Few marks on a logarithmic axis, at round numbers, and at `also`."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        marks = [
            step * 10.0**power for power in powers for step in steps if 0.95 * low <= step * 10.0**power <= 1.05 * high
        ]
        if len(marks) <= 5:
            break
    marks = marks[:: math.ceil(len(marks) / 5)] if marks else [low]
    special = also or {}
    near = (high / low) ** 0.1  # where two labels would touch
    marks = [mark for mark in marks if all(mark > near * other or mark < other / near for other in special)]
    names = [label(mark) for mark in marks] + list(special.values())
    (axes.set_xticks if which == "x" else axes.set_yticks)([*marks, *special], names)


def _drawn(draw: Any, left: float = 0.16) -> str:
    """The axes that `draw` fills, as SVG; whatever style the caller of Matplotlib has set is left out of it."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.fonttype": "none", "svg.hashsalt": "0", "font.size": 10, "text.parse_math": False}
        )
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72, frameon=False)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((left, 0.2, 0.97 - left, 0.74), frameon=False)
        draw(axes)
        axes.minorticks_off()
        axes.tick_params(length=0, colors=INK, labelcolor=INK)
        axes.grid(color=GRID, linewidth=0.6, zorder=0)
        axes.set_axisbelow(True)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return inlined(out.getvalue())
