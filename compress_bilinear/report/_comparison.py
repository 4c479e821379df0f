"""Several reports in one table: a row for each layer and a column for each run, the best figures marked."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rich.table import Table
from rich.text import Text

from ..errors import CompressionError, nearest
from ._data import LayerReport, ReportData, effective, numeric_fields
from ._text import compact_table, figure, printable, printed

Better: TypeAlias = Literal["lower", "higher"] | None

DEFAULT_FIELDS = ("bytes_after", "weight_error", "output_error", "latency_after_ms", "speedup", "speedup_vs_dense")
_CLOSE = 1e-9  # relative difference of figures that count as equally good


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure of every row in every run.

    Attributes:
        field: the figure.
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
        none = (False,) * len(self.values[row])
        if self.better is None or not known:
            return none
        target = min(known) if self.better == "lower" else max(known)
        marks = tuple(value is not None and math.isclose(value, target, rel_tol=_CLOSE) for value in self.values[row])
        return none if sum(marks) == len(known) else marks

    def table(self, runs: Sequence[str]) -> Table:
        """The figure in the terminal, the best with a star."""
        rows = []
        for k, name in enumerate(self.rows):
            marked = zip(self.values[k], self.best(k), strict=True)
            rows.append([name, *(figure(value, self.field) + ("*" if best else " ") for value, best in marked)])
        table = compact_table("", ["Layer", *runs], rows, left=1)
        table.padding, table.columns[0].min_width = (0, 1, 0, 0), 12  # however many runs there are
        return table


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several runs compared, as `compare` gives it.

    Attributes:
        runs: their names, one a column.
        panels: one for each figure.
        notes: which layers were kept, and what makes the runs differ besides their configs.
    """

    runs: tuple[str, ...]
    panels: tuple[Panel, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts: list[Table | Text] = []
        for panel in self.panels:
            better = "" if panel.better is None else f" ({panel.better} is better, * marks the best)"
            parts += [Text(f"{panel.field}{better}"), panel.table(self.runs)]
        return printed([*parts, *(Text(printable(note)) for note in self.notes)])

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

    def to_json(self) -> str:
        """`to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


def better(field: str) -> Better:
    """Which values of a figure are the best."""
    if "speedup" in field:
        return "higher"
    return "lower" if any(part in field for part in ("error", "_after", "amplification", "latency")) else None


def compare(reports: Mapping[str, ReportData], figures: Sequence[str] = ()) -> Comparison:
    """Compare reports layer by layer, as the models are afterwards: a kept layer is exact, and as fast as it was.

    Args:
        reports: by the names of the runs.
        figures: numeric fields of `LayerReport`; none gives `DEFAULT_FIELDS`, those that no run knows left out.

    Raises: CompressionError without a report, or for a field that is unknown or no number.
    """
    if not reports:
        raise CompressionError("A comparison needs at least one report. Found none.")
    for field in figures:
        _check_field(field, "A figure to compare")
    runs = {run: {layer.label: effective(layer) for layer in report.layers} for run, report in reports.items()}
    names = tuple(dict.fromkeys(name for layers in runs.values() for name in layers))

    panels = []
    for field in figures or DEFAULT_FIELDS:
        rows = [tuple(getattr(layers.get(name), field, None) for layers in runs.values()) for name in names]
        panels.append(Panel(field=field, better=better(field), rows=names, values=tuple(rows)))
    if not figures:
        whole: dict[str, Better] = {"model_bytes_after": "lower", "metric_after": None}  # None: only the user knows
        for field, best in whole.items():
            values = tuple(getattr(report, field) for report in reports.values())
            panels.append(Panel(field=field, better=best, rows=("whole model",), values=(values,)))
        panels = [one for one in panels if any(value is not None for row in one.values for value in row)]
    return Comparison(runs=tuple(reports), panels=tuple(panels), notes=_notes(reports, runs))


def _notes(reports: Mapping[str, ReportData], runs: Mapping[str, Mapping[str, LayerReport]]) -> tuple[str, ...]:
    notes = []
    for run, layers in runs.items():
        kept = [name for name, layer in layers.items() if layer.decision == "kept"]
        if kept:
            notes.append(f"{run}: kept as they were: {', '.join(kept)}")
    rows = {layer.batch_size for layers in runs.values() for layer in layers.values() if layer.batch_size is not None}
    if len(rows) > 1:
        notes.append(f"Latencies are of calls of different numbers of rows: {', '.join(map(str, sorted(rows)))}.")
    for key in ("device", "dtype", "processor", "threads", "torch"):
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
        bound: the largest value that passes, or the smallest.
        above: True fails above the bound, False below it.
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
        _check_field(name.strip(), option)
        try:
            bound = float(number)
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise CompressionError(f"{option} {name} should be a number. Found {number!r}.")
        return cls(field=name.strip(), bound=bound, above=above)


def failures(reports: Mapping[str, ReportData], limits: Sequence[Limit]) -> list[str]:
    """A line for each layer of each run that breaks a limit, in its effective figures; an unknown figure breaks it."""
    lines = []
    for run, report in reports.items():
        for layer in map(effective, report.layers):
            for limit in limits:
                value, side = getattr(layer, limit.field), "above" if limit.above else "below"
                start = f"{run}: {layer.label}: {limit.field}"
                if value is None:
                    lines.append(f"{start} is not known, which counts as {side} {limit.bound:g}")
                elif value > limit.bound if limit.above else value < limit.bound:
                    lines.append(f"{start} {value:.4g} is {side} {limit.bound:g}")
    return lines


def _check_field(name: str, what: str) -> None:
    known = numeric_fields()
    if name not in known:
        raise CompressionError(f"{what} should name one of {', '.join(known)}. Found {name!r}.{nearest(name, known)}")
