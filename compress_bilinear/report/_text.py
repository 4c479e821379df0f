"""Figures as people read them, and the report as a table in the terminal and in Markdown."""

import io
import math
import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from ._data import AS_CONFIGURED, ComputeMode, FrontPoint, LayerReport, ReportData

COLUMNS = (
    "Layer",
    "Method",
    "Weight\nerror",
    "Output\nerror",
    "Bytes",
    "Latency",
    "vs nn.\nBilinear",
    "vs best\ndense",
)
_PIPED_WIDTH = 120
_RUNNERS_UP = 3
_SAME = 1e-4  # a relative change of the outputs that another order of additions explains


def cells(layer: LayerReport) -> tuple[str, ...]:
    """One row under `COLUMNS`."""
    shape = "" if layer.shape is None else "\n" + "x".join(map(str, layer.shape))
    latency = "–"
    if layer.latency_before_ms is not None and layer.latency_after_ms is not None:
        latency = f"{layer.latency_before_ms:.3g} → {layer.latency_after_ms:.3g} ms"
    return (
        layer.names + shape,
        method(layer),
        error(layer.weight_error),
        error(layer.output_error),
        size(layer.bytes_before) if layer.decision == "kept" else size_change(layer.bytes_before, layer.bytes_after),
        latency,
        speedup(layer.speedup),
        speedup(layer.speedup_vs_dense),
    )


def figure(value: object, field: str = "") -> str:
    """A figure of a report as people read it; the name of its field says in which unit."""
    match value:
        case None:
            return "–"
        case ComputeMode():
            return compute_mode(value)
        case tuple():
            return ", ".join(figure(part, field) for part in value)
        case int() | float() if "bytes" in field:
            return size(round(value))
        case int() | float() if field.endswith("error"):
            return error(value)
        case int() | float() if field.startswith("speedup"):
            return speedup(value)
        case int() if not isinstance(value, bool):
            return f"{value:,}".replace(",", "\u202f")  # a thin space, as standards have it
        case float():
            return f"{value:.3g}x" if field == "times_smaller" else f"{value:.4g}"
    return str(value)


def method(layer: LayerReport) -> str:
    """For instance "kept (cp)", "cp 64" or "tucker 8,16,16 int8"."""
    return f"kept ({layer.method})" if layer.decision == "kept" else named(layer)


def named(one: LayerReport | FrontPoint) -> str:
    """For instance "cp 64 int8", also of a rejected candidate."""
    rank = ",".join(map(str, one.rank)) if isinstance(one.rank, Sequence) else one.rank
    return " ".join(str(part) for part in (one.method, rank, one.quantize) if part)


def error(value: float | None) -> str:
    """A relative error; "exact" where it is zero."""
    if value is None:
        return "–"
    return "exact" if value == 0 else f"{value:.2g}" if value < 1e-3 else f"{value:.4f}"


def size(count: int) -> str:
    """Bytes in powers of 1000, three digits."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.3g} {unit}"


def size_change(before: int, after: int) -> str:
    """Bytes before and after, and how many times smaller."""
    ratio = f" ({before / after:.3g}x)" if after else ""
    return f"{size(before)} → {size(after)}{ratio}"


def speedup(value: float | None) -> str:
    """A factor; below 1 it says that the replacement is slower."""
    return "–" if value is None else f"{value:.2f}x{' (slower)' if is_slower(value) else ''}"


def is_slower(speedup: float | None) -> bool:
    """Whether a speedup is known and below 1, as it is shown."""
    return speedup is not None and speedup < 0.995


def notes(report: ReportData) -> list[str]:
    """A line for each layer with something to say, then the model's bytes, and what was measured on what."""
    lines = []
    for layer in report.layers:
        if layer.notes != (AS_CONFIGURED,):
            lines.append(f"{layer.label}: {layer.decision}: {layer.reason}")
    for layer in report.layers:
        if layer.form != "nn.Bilinear":
            lines.append(f"{layer.label}: is a {layer.form}, which was itself measured as the layer before")
    for layer in report.layers:
        lines += [f"{layer.label}: {line}" for line in (*_storage(layer), *_runners_up(layer))]
    lines += [f"Not looked at: {sentence}" for sentence in report.unknown]
    if report.metric_before is not None and report.metric_after is not None:
        lines.append(f"Your metric: {report.metric_before:.4f} before, {report.metric_after:.4f} after")
    lines.append(f"Whole model: {size_change(report.model_bytes_before, report.model_bytes_after)}")
    rows = sorted({layer.batch_size for layer in report.layers if layer.batch_size is not None})
    if rows:
        lines.append(
            f"Latency: medians of calls of {', '.join(map(str, rows))} rows, without gradients. "
            "“Best dense” is the fastest exact evaluation of the same weight."
        )
    groups = [layer.calibration_groups for layer in report.layers if layer.calibration_groups is not None]
    if groups:
        lines.append(f"Output error: of each layer on held-out rows of at least {min(groups)} independent groups.")
    lines.append("Measured on: " + ", ".join(f"{key} {value}" for key, value in report.environment.items()))
    return [*lines, *spent(report)]


def spent(report: ReportData) -> list[str]:
    """A line with the seconds of all stages; none where they are not known."""
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.seconds.items())
    return [f"Took {sum(report.seconds.values()):.1f} s: {stages}"] if stages else []


def _storage(layer: LayerReport) -> list[str]:
    """How a quantized layer computes, and how much of its weight error comes from rounding."""
    if layer.decision == "kept" or layer.compute is None:
        return []
    by = {"bitsandbytes": "by ", "bfloat16": "in ", "int8": "in "}.get(layer.compute, "")
    rows = max((one.rows for one in layer.compute_modes if one.chosen), default=1)
    line = f"computes {by}{layer.compute.replace('_', ' ')}" + (f" from {rows} rows on" if rows > 1 else "")
    if layer.truncation_error is not None and layer.quantization_error is not None:
        line += f"; weight error {error(layer.truncation_error)} by truncation and "
        line += f"{error(layer.quantization_error)} by rounding"
    modes = "; ".join(compute_mode(one) for one in layer.compute_modes)
    return [line, f"compute modes: {modes}"] if modes else [line]


def compute_mode(one: ComputeMode) -> str:
    """For instance "int8 (0.5 ms, changes outputs by 0.0066)"."""
    facts = []
    if one.latency_ms is not None:
        facts.append(f"{one.latency_ms:.3g} ms")
    if one.output_change is not None and one.output_change > _SAME:
        facts.append(f"changes outputs by {error(one.output_change)}")
    if one.refused is not None:
        facts.append(f"not taken: {one.refused}")
    name = one.mode.replace("_", " ")
    return f"{name} ({', '.join(facts)})" if facts else name


def _runners_up(layer: LayerReport) -> list[str]:
    """The best candidates of other methods and formats that are as small as the chosen one."""
    chosen = next((point for point in layer.front if point.chosen), None)
    if chosen is None:
        return []

    def lost(point: FrontPoint) -> float:
        value = point.output_error if point.output_error is not None else point.weight_error
        return math.inf if value is None else value

    others: dict[tuple[str, str | None], FrontPoint] = {}
    made = [point for point in layer.front if not point.predicted]
    for point in sorted(made, key=lambda one: (lost(one), one.bytes)):
        kind = (point.method, point.quantize)
        if point.bytes <= 1.05 * chosen.bytes and kind != (chosen.method, chosen.quantize):
            others.setdefault(kind, point)
    best = list(others.values())[:_RUNNERS_UP]
    listed = ", ".join(f"{named(point)} ({error(lost(point))} in {size(point.bytes)})" for point in best)
    return [f"chosen of {len(made)}: {named(chosen)}; runners-up: {listed or 'none so small'}"]


def printable(text: str) -> str:
    """The text with control characters spelled out: a name must not move the cursor."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def compact_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 2) -> Table:
    """A table of narrow columns: a report has many, a terminal often has room for 80 characters.

    The first columns are aligned to the left, so many.
    """
    table = Table(
        title=Text(printable(title)), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False
    )
    for k, column in enumerate(columns):
        table.add_column(Text(printable(column)), justify="left" if k < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def printed(parts: Sequence[RenderableType]) -> str:
    """Tables and text as wide as the terminal, or 120 columns where there is none; no colour."""
    terminal = Console()
    width = terminal.width if terminal.is_terminal else _PIPED_WIDTH
    output = io.StringIO()
    console = Console(file=output, width=width, color_system=None, force_terminal=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())


def render_text(report: ReportData, title: str) -> str:
    """The table of the layers, and the notes below it."""
    table = compact_table(title, COLUMNS, map(cells, report.layers))
    return printed([table, *(Text(printable(note)) for note in notes(report))])


def render_markdown(report: ReportData) -> str:
    """A table with one row a layer, and the notes as a list."""
    rows = [
        [name.replace("\n", " ") for name in COLUMNS],
        ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2),
        *([_escaped(cell) for cell in cells(layer)] for layer in report.layers),
    ]
    table = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*table, "", *(f"- {_escaped(note)}" for note in notes(report))]) + "\n"


def _escaped(text: str) -> str:
    text = text.replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\|_*`\[\]])", r"\\\1", text)
