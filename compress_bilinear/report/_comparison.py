"""Runs side by side: for each figure a row a layer and a column a run, the best marked."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..errors import CompressionError, nearest
from ._data import LayerReport, Report, numeric_fields
from ._format import error, size
from ._held import held

Better: TypeAlias = Literal["lower", "higher"] | None

DEFAULT_FIELDS = ("bytes_after", "weight_error", "output_error", "latency_after_ms", "speedup", "speedup_vs_dense")
_CLOSE = 1e-9  # relative difference of what counts as equally good
_BETTER: tuple[tuple[Better, tuple[str, ...]], ...] = (
    ("higher", ("speedup",)),
    ("lower", ("error", "_after", "amplification", "latency", "resident")),
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure of every row in every run.

    Attributes:
        field: what it is.
        better: which values are the best; None where none is.
        rows: their names.
        values: for each row one a run; None where it is not known.
    """

    field: str
    better: Better
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]

    def best(self, row: int) -> tuple[bool, ...]:
        """Which runs are the best in a row; none where all are equal, or fewer than two are known."""
        known = [value for value in self.values[row] if value is not None and math.isfinite(value)]
        none = tuple(False for _ in self.values[row])
        if self.better is None or len(known) < 2:
            return none
        target = min(known) if self.better == "lower" else max(known)
        marks = tuple(value is not None and math.isclose(value, target, rel_tol=_CLOSE) for value in self.values[row])
        return none if sum(marks) == len(known) else marks

    def text(self, value: float | None) -> str:
        """A value as people read it."""
        if value is None:
            return "–"
        if self.field.endswith("error"):
            return error(value)
        if "bytes" in self.field:
            return size(round(value))
        if self.field.startswith("speedup"):
            return f"{value:.2f}x"
        return f"{value:,.0f}".replace(",", " ") if isinstance(value, int) else f"{value:.4g}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several runs side by side, as `compare` gives it.

    Attributes:
        runs: their names, one a column.
        panels: one for each figure.
        notes: what else is to be said.
    """

    runs: tuple[str, ...]
    panels: tuple[Panel, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        from ._terminal import render_comparison

        return render_comparison(self)

    def to_markdown(self) -> str:
        """A table for each figure, the best in bold."""
        from ._markdown import render_comparison

        return render_comparison(self)

    def to_html(self) -> str:
        """A page of its own that needs no network; its tables sort."""
        from ._comparison_html import render_comparison

        return render_comparison(self)

    def to_dict(self) -> dict[str, object]:
        """Plain dicts, lists, strings and numbers: for each figure its rows, their values and the marks of the best."""
        panels = [
            {
                "figure": panel.field,
                "better": panel.better,
                "layers": list(panel.rows),
                "values": [list(values) for values in panel.values],
                "best": [list(panel.best(k)) for k in range(len(panel.rows))],
            }
            for panel in self.panels
        ]
        return {"runs": list(self.runs), "figures": panels, "notes": list(self.notes)}

    def to_csv(self) -> str:
        """Columns: figure, layer, one for each run, and which are the best; numbers in full, unknown ones empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("figure", "layer", *self.runs, "best"))
        for panel in self.panels:
            for k, row in enumerate(panel.rows):
                best = ", ".join(run for run, mark in zip(self.runs, panel.best(k), strict=True) if mark)
                values = ("" if value is None else repr(value) for value in panel.values[k])
                writer.writerow((panel.field, row, *values, best))
        return out.getvalue()


def check_field(name: str, what: str) -> None:
    """Raise CompressionError unless `name` is one of `numeric_fields()`."""
    known = numeric_fields()
    if name not in known:
        raise CompressionError(f"{what} should name one of {', '.join(known)}. Found {name!r}.{nearest(name, known)}")


def better(field: str) -> Better:
    """Which values of a figure are the best."""
    return next((which for which, parts in _BETTER if any(part in field for part in parts)), None)


def compare(reports: Mapping[str, Report], figures: Sequence[str] = ()) -> Comparison:
    """Set reports side by side, layer by layer, as the models hold them: a kept layer is exact, and as fast as it was.

    Args:
        reports: by the names of the runs.
        figures: numeric fields of `LayerReport`; none gives `DEFAULT_FIELDS`, those that no run knows left out.

    Raises: CompressionError without a report, or for a field that is unknown or no number.
    """
    if not reports:
        raise CompressionError("A comparison needs at least one report. Found none.")
    for figure in figures:
        check_field(figure, "A figure to compare")
    layers = {run: {layer.label: held(layer) for layer in report.layers} for run, report in reports.items()}
    names = tuple(dict.fromkeys(name for found in layers.values() for name in found))

    def panel(figure: str) -> Panel:
        rows = [tuple(_value(found.get(name), figure) for found in layers.values()) for name in names]
        return Panel(field=figure, better=better(figure), rows=names, values=tuple(rows))

    def whole(figure: str, value: Callable[[Report], float | None], better: Better) -> Panel:
        values = (tuple(value(report) for report in reports.values()),)
        return Panel(field=figure, better=better, rows=("whole model",), values=values)

    panels = [panel(figure) for figure in figures or DEFAULT_FIELDS]
    if not figures:
        panels += [
            whole("model_bytes_after", lambda report: report.model_bytes_after, "lower"),
            whole(
                "metric_after", lambda report: report.metric_after, None
            ),  # which way is better, only its owner knows
        ]
        panels = [one for one in panels if any(value is not None for row in one.values for value in row)]
    return Comparison(runs=tuple(reports), panels=tuple(panels), notes=_notes(reports, layers))


def _value(layer: LayerReport | None, figure: str) -> float | None:
    value = None if layer is None else getattr(layer, figure)
    return value if isinstance(value, (int, float)) else None


def _notes(reports: Mapping[str, Report], layers: Mapping[str, Mapping[str, LayerReport]]) -> tuple[str, ...]:
    notes = []
    for run, found in layers.items():
        kept = [name for name, layer in found.items() if layer.decision == "kept"]
        if kept:
            notes.append(f"{run}: kept as they were: {', '.join(kept)}")
    rows = {layer.batch_size for found in layers.values() for layer in found.values() if layer.batch_size is not None}
    if len(rows) > 1:
        notes.append(f"Latencies are of calls of different numbers of rows: {', '.join(map(str, sorted(rows)))}.")
    keys = ("device", "dtype", "processor", "threads", "torch")
    for key in keys:
        values = {run: report.environment.get(key) for run, report in reports.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{run} {value}" for run, value in values.items())
            notes.append(f"Measured on different {key}: {listed}.")
    return tuple(notes)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A bound on a figure of every layer, for continuous integration.

    Attributes:
        field: a numeric field of `LayerReport`.
        bound: what it may come to.
        above: whether more than that fails, or else less.
    """

    field: str
    bound: float
    above: bool

    @classmethod
    def parse(cls, text: str, above: bool) -> "Limit":
        """From "FIELD=NUMBER". Raises: CompressionError for an unknown field, or for no number."""
        option = "--fail-above" if above else "--fail-below"
        name, sign, number = text.partition("=")
        if not sign:
            raise CompressionError(f"{option} should be FIELD=NUMBER, say output_error=0.05. Found {text!r}.")
        check_field(name.strip(), option)
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise CompressionError(f"{option} {name} should be a number. Found {number!r}.")
        return cls(field=name.strip(), bound=bound, above=above)


def failures(reports: Mapping[str, Report], limits: Sequence[Limit]) -> list[str]:
    """A line for each layer of each run that breaks a limit, as the model holds it; what is not known breaks it too."""
    lines = []
    for run, report in reports.items():
        for layer in map(held, report.layers):
            for limit in limits:
                value = _value(layer, limit.field)
                side = "above" if limit.above else "below"
                if value is None:
                    lines.append(
                        f"{run}: {layer.label}: {limit.field} is not known, which counts as {side} {limit.bound:g}"
                    )
                elif value > limit.bound if limit.above else value < limit.bound:
                    lines.append(f"{run}: {layer.label}: {limit.field} {value:.4g} is {side} {limit.bound:g}")
    return lines
