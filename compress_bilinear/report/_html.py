"""The report as a page of its own."""

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ._data import ComputeMode, LayerReport, ReportData, effective
from ._page import page
from ._plots import Plot, front_plot, latency_plot, spectra_plot
from ._text import compute_mode, error, method, size, size_change, speedup, spent

_MOST_BYTES = 1_950_000  # of a page, plots included
_MOST_DETAILS = 300  # layers with a section of their own
_SLOWER = 0.995  # a speedup below this is called slower
_SHOWN_ELSEWHERE = {"name", "aliases", "shape", "notes", "front", "spectra"}
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
    details = {k: _details(k, report.layers[k]) for k in sorted(order[:_MOST_DETAILS])}
    context: dict[str, Any] = {
        "cards": _cards(report),
        "warnings": _warnings(report),
        "columns": ("Layer", "Method", *_COLUMNS),
        "rows": [_row(k, layer, k in details) for k, layer in enumerate(report.layers)],
        "details": details.values(),
        "reading": _READING,
        "config": json.dumps(dict(report.config), indent=2, ensure_ascii=False) if report.config else "",
        "environment": report.environment,
        "spent": spent(report),
        "shortened": len(order) > _MOST_DETAILS,
    }
    left = most_bytes - len(page("report.html", **context).encode())
    for k in order[:_MOST_DETAILS]:
        plots = _plots(report.layers[k])
        left -= len(str(plots).encode())
        if left < 0:
            context["shortened"] = True
            break
        details[k]["plots"] = plots
    return page("report.html", **context)


def _cards(report: ReportData) -> list[dict[str, Any]]:
    """The figures of the whole model: how many layers were replaced, its size, latency, error and metric."""
    before, after = report.model_bytes_before, report.model_bytes_after
    now, replaced = [effective(layer) for layer in report.layers], _replaced(report)
    cards = [
        _card("Bilinear layers", f"{len(replaced)} of {len(now)} replaced"),
        _card("Model size", f"{size(before)} → {size(after)}", f"{before / after:.3g}x smaller" if after else ""),
    ]
    timed = [one for one in now if one.latency_before_ms is not None and one.latency_after_ms is not None]
    if timed:
        slowest = max(timed, key=lambda one: one.latency_after_ms or 0)
        first, last = max(one.latency_before_ms or 0 for one in timed), slowest.latency_after_ms or 0
        cards.append(_card("Slowest layer", f"{first:.3g} → {last:.3g} ms", slowest.label, warns=last > first))
    for kind in ("output_error", "weight_error"):
        worst = max(replaced, key=lambda layer: getattr(layer, kind) or 0, default=None)
        if worst is not None and getattr(worst, kind) is not None:
            cards.append(_card(f"Worst {kind.replace('_', ' ')}", error(getattr(worst, kind)), worst.label))
    if report.metric_before is None or report.metric_after is None:
        return [*cards, _card("Task metric", "not measured", "judge by your own before you use the model")]
    change = f"change {report.metric_after - report.metric_before:+.4g}"
    return [*cards, _card("Task metric", f"{report.metric_before:.4g} → {report.metric_after:.4g}", change)]


def _replaced(report: ReportData) -> list[LayerReport]:
    return [layer for layer in report.layers if layer.decision == "replaced"]


def _card(label: str, figure: str, note: str = "", warns: bool = False) -> dict[str, Any]:
    return {"label": label, "figure": figure, "note": note, "warns": warns}


def _warnings(report: ReportData) -> list[str]:
    replaced = _replaced(report)
    slower = [layer for layer in replaced if _is_slower(layer.speedup)]
    beaten = [layer for layer in replaced if _is_slower(layer.speedup_vs_dense) and layer not in slower]
    forced = [layer for layer in replaced if layer.has("forced")]
    return [
        f"{text}: {', '.join(layer.label for layer in layers)}"
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
    figures = []
    for name, text in _COLUMNS.values():
        value = getattr(one, name)
        shown = "–" if value is None else text(value)
        figures.append({"text": shown, "value": value, "warns": "speedup" in name and _is_slower(value)})
    return {
        "name": one.names,
        "shape": "×".join(map(str, one.shape or ())),
        "method": method(layer),
        "link": f"layer-{number}" if linked else "",
        "figures": figures,
    }


def _details(number: int, layer: LayerReport) -> dict[str, Any]:
    kept = layer.decision == "kept"
    reason = f"{layer.decision.capitalize()}: {layer.reason}."
    if kept and layer.weight_error is not None:
        reason += " Errors, latencies and rank below are of the rejected candidate."
    return {
        "number": number,
        "name": layer.names,
        "what": method(layer) + ("" if kept else f", {size_change(layer.bytes_before, layer.bytes_after)}"),
        "reason": reason,
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


def _plots(layer: LayerReport) -> list[Plot]:
    drawn = (front_plot(layer), spectra_plot(layer), latency_plot(layer))
    return [plot for plot in drawn if plot is not None]
