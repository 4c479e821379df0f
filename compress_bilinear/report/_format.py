"""Figures as people read them, for every renderer alike."""

import math
from collections.abc import Sequence

from ._data import AS_CONFIGURED, ComputeMode, FrontPoint, LayerReport, Report

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


def cells(layer: LayerReport) -> tuple[str, ...]:
    """One row under `COLUMNS`."""
    names = ", ".join([layer.label, *(alias or "(root)" for alias in layer.aliases)])
    if layer.shape is not None:
        names += "\n" + "x".join(str(size) for size in layer.shape)
    latency = "–"
    if layer.latency_before_ms is not None and layer.latency_after_ms is not None:
        latency = f"{layer.latency_before_ms:.3g} → {layer.latency_after_ms:.3g} ms"
    return (
        names,
        method(layer),
        error(layer.weight_error),
        error(layer.output_error),
        size(layer.bytes_before) if layer.decision == "kept" else size_change(layer.bytes_before, layer.bytes_after),
        latency,
        speedup(layer.speedup),
        speedup(layer.speedup_vs_dense),
    )


def method(layer: LayerReport) -> str:
    """For instance "kept", "cp 64" or "tucker 8,16,16 int8"."""
    if layer.decision == "kept":
        return f"kept ({layer.method})"
    return named(layer)


def named(one: LayerReport | FrontPoint) -> str:
    """For instance "cp 64 int8", also of what was turned down."""
    rank = one.rank
    listed = ",".join(str(r) for r in rank) if isinstance(rank, Sequence) else "" if rank is None else str(rank)
    return " ".join(part for part in (one.method, listed, one.quantize) if part)


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
    """A factor; below 1 it says that it is slower."""
    if value is None:
        return "–"
    return f"{value:.2f}x" if value >= 0.995 else f"{value:.2f}x slower"


def notes(report: Report) -> list[str]:
    """A line for each layer with something to say, then the model's bytes, the timing and the environment."""
    told = [layer for layer in report.layers if layer.notes != (AS_CONFIGURED,)]
    lines = [f"{layer.label}: {layer.decision}: {layer.reason}" for layer in told]
    for layer in report.layers:
        if layer.form != "nn.Bilinear":
            lines.append(f"{layer.label}: is a {layer.form}: what it was is measured by its own forward")
    for layer in report.layers:
        lines += [f"{layer.label}: {told}" for told in (*_storage(layer), *_runners_up(layer))]
    if report.metric_before is not None and report.metric_after is not None:
        lines.append(f"Your metric: {report.metric_before:.4f} before, {report.metric_after:.4f} after")
    lines.append(f"Whole model: {size_change(report.model_bytes_before, report.model_bytes_after)}")
    timed = next((layer for layer in report.layers if layer.batch_size is not None), None)
    if timed is not None:
        rows = sorted({layer.batch_size for layer in report.layers if layer.batch_size is not None})
        lines.append(
            f"Latency: medians of calls of {', '.join(str(count) for count in rows)} rows, without gradients. "
            "“Best dense” is the fastest exact evaluation of the same weight."
        )
    lines.append("Measured on: " + ", ".join(f"{key} {value}" for key, value in report.environment.items()))
    return lines


_RUNNERS_UP = 3


def _storage(layer: LayerReport) -> list[str]:
    """How a quantized layer computes, and what of its weight's error rounding has added."""
    if layer.decision == "kept" or layer.compute is None or layer.resident_bytes is None:
        return []
    by = "by " if layer.compute == "bitsandbytes" else ""
    told = f"computes {by}{layer.compute.replace('_', ' ')}, with {size(layer.resident_bytes)} resident"
    if layer.truncation_error is not None and layer.quantization_error is not None:
        told += f"; weight error {error(layer.truncation_error)} by truncation and "
        told += f"{error(layer.quantization_error)} by rounding"
    modes = "; ".join(compute_mode(one) for one in layer.compute_modes)
    return [told, f"compute modes: {modes}"] if modes else [told]


def compute_mode(one: ComputeMode) -> str:
    """For instance "int8 (0.5 ms, 12 kB resident, changes outputs by 0.0066)"."""
    facts = []
    if one.latency_ms is not None:
        facts.append(f"{one.latency_ms:.3g} ms")
    if one.resident_bytes is not None:
        facts.append(f"{size(one.resident_bytes)} resident")
    if one.output_change is not None and one.output_change > _SAME:
        facts.append(f"changes outputs by {error(one.output_change)}")
    if one.refused is not None:
        facts.append(f"not taken: {one.refused}")
    name = one.mode.replace("_", " ")
    return f"{name} ({', '.join(facts)})" if facts else name


_SAME = 1e-4  # a change of outputs that is the order of sums


def _runners_up(layer: LayerReport) -> list[str]:
    """What came nearest in as few bytes, of other methods and formats, where there was a choice."""
    chosen = next((point for point in layer.front if point.chosen), None)
    if chosen is None:
        return []

    def lost(point: FrontPoint) -> float:
        found = point.output_error if point.output_error is not None else point.weight_error
        return math.inf if found is None else found

    others: dict[tuple[str, str | None], FrontPoint] = {}
    for point in sorted(layer.front, key=lambda each: (lost(each), each.bytes)):
        kind = (point.method, point.quantize)
        if point.bytes <= 1.05 * chosen.bytes and kind != (chosen.method, chosen.quantize):
            others.setdefault(kind, point)
    shown = [f"{named(point)} ({error(lost(point))} in {size(point.bytes)})" for point in others.values()]
    told = ", ".join(shown[:_RUNNERS_UP]) or "none so small"
    return [f"chosen of {len(layer.front)}: {named(chosen)}; runners-up: {told}"]


def printable(text: str) -> str:
    """The text with control characters spelled out: a name must not move the cursor."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
