"""The report as a page of its own."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from ._data import AS_CONFIGURED, ComputeMode, LayerReport, ReportData, effective
from ._page import Cell, page
from ._plots import Plot, front, front_plot, latency_plot, spectra_plot
from ._text import compute_mode, error, method, size, size_change, speedup

_MOST_BYTES = 1_950_000  # of a page, plots included
_MOST_DETAILS = 300  # layers with a section of their own
_OPEN = 3  # layers up to which all sections are open
_LISTED = 5  # layers that a warning names
_SLOWER = 0.995  # a speedup below this is called slower
_SHOWN_ELSEWHERE = {"name", "aliases", "shape", "notes", "front", "spectra"}
_KEYS: dict[Callable[[LayerReport], Plot | None], tuple[tuple[str, str], ...]] = {
    front_plot: (
        *(("cp", "CP"), ("tucker", "Tucker"), ("dense", "dense"), ("keep", "kept")),
        *(("hollow", "quantized"), ("ring", "chosen")),
    ),
    spectra_plot: (("l1", "out"), ("l2", "in1"), ("l3", "in2")),
    latency_plot: (),
}
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "Weight error": ("weight_error", error),
    "Output error": ("output_error", error),
    "Bytes before": ("bytes_before", size),
    "Bytes after": ("bytes_after", size),
    "Smaller": ("times_smaller", "{:.3g}x".format),
    "ms before": ("latency_before_ms", "{:.3g}".format),
    "ms after": ("latency_after_ms", "{:.3g}".format),
    "vs nn.Bilinear": ("speedup", speedup),
    "vs best dense": ("speedup_vs_dense", speedup),
}
"""The columns of numbers: their fields, and how they are written."""

_READING = (
    "Weight error is ‖W − Ŵ‖/‖W‖ of what is stored. Output error is ‖y − ŷ‖/‖y − b‖ on calibration rows, and predicts "
    "a task far better. Bytes count everything that is stored. “vs nn.Bilinear” looks better than it is, because "
    "nn.Bilinear loops over its outputs; “vs best dense” is against the fastest exact evaluation of the same weight, "
    "measured in turn with it. A kept layer is as it was."
)


def render_html(report: ReportData, most_bytes: int = _MOST_BYTES) -> str:
    """The page; beyond `most_bytes` the plots of the smallest layers are left out, and it says so."""
    order = sorted(range(len(report.layers)), key=lambda k: -report.layers[k].bytes_before)
    shown = sorted(order[:_MOST_DETAILS])
    context: dict[str, Any] = {
        "summary": {"sentence": _sentence(report), "cards": _cards(report), "warnings": _warnings(report)},
        "columns": [{"label": label, "number": label in _COLUMNS} for label in ("Layer", "Method", *_COLUMNS)],
        "rows": [_row(k, layer, k in set(shown)) for k, layer in enumerate(report.layers)],
        "reading": _READING,
        "config": json.dumps(dict(report.config), indent=2, ensure_ascii=False) if report.config else "",
        "environment": list(report.environment.items()),
    }
    details = {k: _details(k, report.layers[k], len(report.layers) <= _OPEN) for k in shown}
    left = most_bytes - len(page("report.html", **context, plotless="", details=details.values()).encode())
    without = 0
    for k in (k for k in order if k in details):
        plots = [] if without else _plots(report.layers[k])
        left -= sum(len((one["svg"] + one["words"]).encode()) + 160 + 55 * len(one["key"]) for one in plots)
        if without or left < 0:
            without += 1
        else:
            details[k]["plots"] = plots
    plotless = f"Plots of the {without} smallest layers are left out for the size of this page." if without else ""
    if len(shown) < len(order):
        plotless += f" Only the {len(shown)} largest layers are here; the table above has all {len(order)}."
    return page("report.html", **context, plotless=plotless, details=details.values())


def _sentence(report: ReportData) -> str:
    count, total = len(_replaced(report)), len(report.layers)
    before, after = report.model_bytes_before, report.model_bytes_after
    what = f"{count} of {total} bilinear layer{'s' * (total != 1)} {'was' if count == 1 else 'were'} replaced. "
    return what + f"The whole model stores {size(after)} instead of {size(before)}."


def _replaced(report: ReportData) -> list[LayerReport]:
    return [layer for layer in report.layers if layer.decision == "replaced"]


def _cards(report: ReportData) -> list[dict[str, Any]]:
    before, after = report.model_bytes_before, report.model_bytes_after
    now = [effective(layer) for layer in report.layers]
    layers = size_change(sum(one.bytes_before for one in now), sum(one.bytes_after for one in now))
    smaller = f"{before / after:.3g}x smaller" if after else ""
    cards = [_card("Model size", f"{size(before)} → {size(after)}", smaller, f"these layers: {layers}")]
    cards += [_slowest(now), _worst(_replaced(report))]
    if report.metric_before is None or report.metric_after is None:
        return [*cards, _card("Task metric", "not measured", "judge by your own before you use the model")]
    change = f"change {report.metric_after - report.metric_before:+.4g}"
    return [*cards, _card("Task metric", f"{report.metric_before:.4g} → {report.metric_after:.4g}", change)]


def _slowest(now: Sequence[LayerReport]) -> dict[str, Any]:
    timed = [(one, one.latency_before_ms, one.latency_after_ms) for one in now]
    known = [(one, before, after) for one, before, after in timed if before is not None and after is not None]
    if not known:
        return _card("Slowest layer", "not measured", "latencies were left out")
    first, before, _ = max(known, key=lambda row: row[1])
    last, _, after = max(known, key=lambda row: row[2])
    notes = [f"before: {first.label}", f"after: {last.label}"] if first is not last else [first.label]
    rows = sorted({one.batch_size for one, _, _ in known if one.batch_size is not None})
    notes.append(f"for a call of {', '.join(map(str, rows))} rows")
    return _card("Slowest layer", f"{before:.3g} → {after:.3g} ms", *notes, warns=after > before)


def _worst(replaced: Sequence[LayerReport]) -> dict[str, Any]:
    if not replaced:
        return _card("Worst output error", "none", "no layer was replaced")
    by_weight = max(replaced, key=lambda layer: layer.weight_error or 0)
    weight = f"worst weight error: {error(by_weight.weight_error)}"
    known = [layer for layer in replaced if layer.output_error is not None]
    if not known:
        reason = "no calibration inputs were given"
        return _card("Worst output error", "not measured", reason, f"{weight} ({by_weight.label})")
    worst = max(known, key=lambda layer: layer.output_error or 0)
    weight += "" if worst is by_weight else f" ({by_weight.label})"
    return _card("Worst output error", error(worst.output_error), worst.label, weight)


def _card(label: str, figure: str, *notes: str, warns: bool = False) -> dict[str, Any]:
    return {"label": label, "figure": figure, "notes": [note for note in notes if note], "warns": warns}


def _warnings(report: ReportData) -> list[str]:
    replaced = _replaced(report)
    slower = [layer for layer in replaced if _is_slower(layer.speedup)]
    beaten = [layer for layer in replaced if _is_slower(layer.speedup_vs_dense) and layer not in slower]
    forced = [layer for layer in replaced if layer.has("forced")]
    return [
        f"{text}: {', '.join(layer.label for layer in layers[:_LISTED])}"
        + (f" and {len(layers) - _LISTED} more" if len(layers) > _LISTED else "")
        for text, layers in (
            ("Slower here than nn.Bilinear", slower),
            ("Faster than nn.Bilinear, but slower here than the best exact dense evaluation", beaten),
            ("Replaced by force, against the verdict", forced),
        )
        if layers
    ]


def _is_slower(factor: float | None) -> bool:
    return factor is not None and factor < _SLOWER


def _row(number: int, layer: LayerReport, linked: bool) -> dict[str, Any]:
    one = effective(layer)
    if one.latency_after_ms is None:
        one = replace(one, speedup=None)
    shape = "×".join(map(str, one.shape)) if one.shape else ""
    cells = [Cell(text=one.names, detail=shape), Cell(text=method(layer))]
    for name, text in _COLUMNS.values():
        value = getattr(one, name)
        shown = "–" if value is None else text(value)
        cells.append(Cell(text=shown, number=True, value=value, warns="speedup" in name and _is_slower(value)))
    return {"name": one.names, "link": f"layer-{number}" if linked else "", "cells": cells}


def _details(number: int, layer: LayerReport, opened: bool) -> dict[str, Any]:
    kept = layer.decision == "kept"
    reason = f"{layer.decision.capitalize()}: {layer.reason}."
    if layer.notes == (AS_CONFIGURED,):
        reason = f"{layer.decision.capitalize()} {AS_CONFIGURED.text}."
    if kept and layer.weight_error is not None:
        reason += " Errors, latencies and rank below are of the rejected candidate."
    if len(front(layer)[1]) < 2 and not kept:
        reason += " There were no other candidates to plot."
    change = "" if kept else f", {size_change(layer.bytes_before, layer.bytes_after)}"
    return {
        "number": number,
        "name": layer.names,
        "what": method(layer) + change,
        "reason": reason,
        "open": opened,
        "plots": [],
        "figures": [
            (one.name.replace("_", " ").replace(" ms", " (ms)"), _figure(getattr(layer, one.name)))
            for one in fields(layer)
            if one.name not in _SHOWN_ELSEWHERE and getattr(layer, one.name) not in (None, ())
        ],
    }


def _figure(value: object) -> str:
    match value:
        case ComputeMode():
            return compute_mode(value)
        case tuple():
            return ", ".join(_figure(part) for part in value)
        case float():
            return f"{value:.4g}"
        case int():
            return f"{value:,}".replace(",", " ")  # a thin space, as standards have it
        case _:
            return str(value)


def _plots(layer: LayerReport) -> list[dict[str, Any]]:
    drawn: Iterable[tuple[Plot | None, Any]] = ((plot(layer), key) for plot, key in _KEYS.items())
    return [{**plot._asdict(), "key": key} for plot, key in drawn if plot is not None]
