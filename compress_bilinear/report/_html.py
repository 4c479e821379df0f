"""The report as a page of its own."""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from ._data import AS_CONFIGURED, ComputeMode, LayerReport, Report
from ._format import compute_mode, error, method, size, size_change, speedup
from ._held import held
from ._page import Cell, drawn, page
from ._plots import Plot, front, front_plot, latency_plot, spectra_plot, spectra_title

_MOST_BYTES = 1_950_000  # of a page, plots included
_OPEN = 3  # layers up to which all are open
_MOST_DETAILS = 300
_NAMED = 5  # layers that a warning names
_UNTOLD = {"name", "aliases", "shape", "notes", "front", "spectra"}  # fields that are shown elsewhere
_FRONT_KEY = (("cp", "CP"), ("tucker", "Tucker"), ("dense", "dense"), ("keep", "kept"))
_FRONT_TITLE = "Considered, by bytes and error"
_KEYS = {
    "front": (*_FRONT_KEY, ("hollow", "8 bits or fewer"), ("ring", "chosen")),
    "spectra": (("l1", "out"), ("l2", "in1"), ("l3", "in2")),
    "latency": (),
}
_READING = (
    "Weight error is ‖W − Ŵ‖/‖W‖ of what is stored; output error is ‖y − ŷ‖/‖y − b‖ on calibration rows and predicts a "
    "task far better. Bytes count everything that is stored. “vs nn.Bilinear” flatters, for it loops over its outputs; "
    "“vs best dense” is against the fastest exact evaluation of the same weight, measured side by side. A kept layer "
    "is as it was."
)


def render_html(report: Report) -> str:
    """The page; where many layers leave no room within 2 MB, the plots of the smallest are left out, and it says so."""
    order = sorted(range(len(report.layers)), key=lambda k: -report.layers[k].bytes_before)
    told = sorted(order[:_MOST_DETAILS])
    context: dict[str, Any] = {
        "summary": {"sentence": _sentence(report), "cards": _cards(report), "warnings": _warnings(report)},
        "columns": [{"label": label, "number": number} for label, number in _COLUMNS],
        "rows": [_row(k, layer, k in set(told)) for k, layer in enumerate(report.layers)],
        "reading": _READING,
        "config": json.dumps(dict(report.config), indent=2, ensure_ascii=False) if report.config else "",
        "environment": list(report.environment.items()),
    }
    details = {k: _details(k, report.layers[k], len(report.layers) <= _OPEN) for k in told}
    left = _MOST_BYTES - len(page("report.html", **context, plotless="", details=details.values()).encode())
    without = 0
    for k in (k for k in order if k in details):
        plots = [] if without else _plots(report.layers[k])
        left -= sum(len((one["svg"] + one["words"]).encode()) + 160 + 55 * len(one["key"]) for one in plots)
        if without or left < 0:
            without += 1
        else:
            details[k]["plots"] = plots
    plotless = f"Plots of the {without} smallest layers are left out for the size of this page." if without else ""
    if len(told) < len(order):
        plotless += f" Only the {len(told)} largest layers are here; the table above has all {len(order)}."
    return page("report.html", **context, plotless=plotless, details=details.values())


def _sentence(report: Report) -> str:
    count, total = sum(layer.decision == "replaced" for layer in report.layers), len(report.layers)
    before, after = report.model_bytes_before, report.model_bytes_after
    what = f"{count} of {total} bilinear layer{'s' * (total != 1)} {'was' if count == 1 else 'were'} replaced. "
    return what + f"The whole model stores {size(after)} instead of {size(before)}."


def _cards(report: Report) -> list[dict[str, Any]]:
    now = [held(layer) for layer in report.layers]
    before, after = report.model_bytes_before, report.model_bytes_after
    layers = size_change(sum(one.bytes_before for one in now), sum(one.bytes_after for one in now))
    smaller = f"{before / after:.3g}x smaller" if after else ""
    cards = [_card("Model size", f"{size(before)} → {size(after)}", smaller, f"these layers: {layers}")]

    timed = [one for one in now if one.latency_before_ms is not None and one.latency_after_ms is not None]
    if timed:
        first = max(timed, key=lambda one: one.latency_before_ms or 0)
        last = max(timed, key=lambda one: one.latency_after_ms or 0)
        figure = f"{first.latency_before_ms:.3g} → {last.latency_after_ms:.3g} ms"
        notes = [f"before: {first.label}", f"after: {last.label}"] if first is not last else [first.label]
        slower = (last.latency_after_ms or 0) > (first.latency_before_ms or 0)
        rows = sorted({one.batch_size for one in timed if one.batch_size is not None})
        notes.append(f"for a call of {', '.join(map(str, rows))} rows")
        cards.append(_card("Slowest layer", figure, *notes, warns=slower))
    else:
        cards.append(_card("Slowest layer", "not measured", "latencies were left out"))

    replaced = [layer for layer in report.layers if layer.decision == "replaced"]
    known = [layer for layer in replaced if layer.output_error is not None]
    by_weight = max(replaced, key=lambda layer: layer.weight_error or 0, default=None)
    weight = "" if by_weight is None else f"worst weight error: {error(by_weight.weight_error)} ({by_weight.label})"
    if known:
        worst = max(known, key=lambda layer: layer.output_error or 0)
        weight = weight.removesuffix(f" ({worst.label})")
        cards.append(_card("Worst output error", error(worst.output_error), worst.label, weight))
    elif replaced:
        cards.append(_card("Worst output error", "not measured", "no calibration inputs were given", weight))
    else:
        cards.append(_card("Worst output error", "none", "no layer was replaced"))

    was, now_is = report.metric_before, report.metric_after
    if was is None or now_is is None:
        cards.append(_card("Task metric", "not measured", "judge by your own before you use the model"))
    else:
        cards.append(_card("Task metric", f"{was:.4g} → {now_is:.4g}", f"change {now_is - was:+.4g}"))
    return cards


def _card(label: str, figure: str, *notes: str, warns: bool = False) -> dict[str, Any]:
    return {"label": label, "figure": figure, "notes": [note for note in notes if note], "warns": warns}


def _warnings(report: Report) -> list[str]:
    replaced = [layer for layer in report.layers if layer.decision == "replaced"]
    slower = [layer for layer in replaced if layer.speedup is not None and layer.speedup < 0.995]
    beaten = [
        layer
        for layer in replaced
        if layer.speedup_vs_dense is not None and layer.speedup_vs_dense < 0.995 and layer not in slower
    ]
    forced = [layer for layer in replaced if layer.has("forced")]
    return [
        f"{text}: {_listed(layers)}"
        for text, layers in (
            ("Slower here than nn.Bilinear", slower),
            ("Faster than nn.Bilinear, but slower here than the best exact dense evaluation", beaten),
            ("Replaced by force, whatever spoke against it", forced),
        )
        if layers
    ]


def _listed(layers: Sequence[LayerReport]) -> str:
    more = len(layers) - _NAMED
    return ", ".join(layer.label for layer in layers[:_NAMED]) + (f" and {more} more" if more > 0 else "")


_COLUMNS = (
    ("Layer", False),
    ("Method", False),
    ("Weight error", True),
    ("Output error", True),
    ("Bytes before", True),
    ("Bytes after", True),
    ("Smaller", True),
    ("ms before", True),
    ("ms after", True),
    ("vs nn.Bilinear", True),
    ("vs best dense", True),
)


def _row(number: int, layer: LayerReport, linked: bool) -> dict[str, Any]:
    one = held(layer)
    ratio = one.bytes_before / one.bytes_after if one.bytes_after else None

    def figure(value: float | None, text: Callable[[Any], str], warns: bool = False) -> Cell:
        return Cell(text="–" if value is None else text(value), number=True, value=value, warns=warns)

    names = ", ".join([one.label, *(alias or "(root)" for alias in one.aliases)])
    cells = [
        Cell(text=names, detail="×".join(map(str, one.shape)) if one.shape else ""),
        Cell(text=method(layer)),
        figure(one.weight_error, error),
        figure(one.output_error, error),
        figure(one.bytes_before, size),
        figure(one.bytes_after, size),
        figure(ratio, lambda value: f"{value:.3g}x"),
        figure(one.latency_before_ms, lambda value: f"{value:.3g}"),
        figure(one.latency_after_ms, lambda value: f"{value:.3g}"),
        figure(one.speedup if one.latency_after_ms is not None else None, speedup, (one.speedup or 1) < 0.995),
        figure(one.speedup_vs_dense, speedup, (one.speedup_vs_dense or 1) < 0.995),
    ]
    return {"name": names, "link": f"layer-{number}" if linked else "", "cells": cells}


def _details(number: int, layer: LayerReport, opened: bool) -> dict[str, Any]:
    change = size_change(layer.bytes_before, layer.bytes_after)
    kept = layer.decision == "kept"
    reason = f"{layer.decision.capitalize()}: {layer.reason}."
    if kept and layer.weight_error is not None:
        reason += " Errors, latencies and rank below are of what was turned down."
    if len(front(layer)[1]) < 2 and not kept:
        reason += " Nothing else was considered, so there is no front."
    return {
        "number": number,
        "name": ", ".join([layer.label, *(alias or "(root)" for alias in layer.aliases)]),
        "what": method(layer) if kept else f"{method(layer)}, {change}",
        "reason": reason.replace(f": {AS_CONFIGURED.text}.", f" {AS_CONFIGURED.text}."),
        "open": opened,
        "plots": [],
        "figures": [
            (field.name.replace("_", " ").replace(" ms", " (ms)"), _figure(getattr(layer, field.name)))
            for field in fields(layer)
            if field.name not in _UNTOLD and getattr(layer, field.name) not in (None, ())
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
    found: list[tuple[str, str, Plot | None]] = [
        (_FRONT_TITLE, "front", front_plot(layer)),
        ("" if not layer.spectra else spectra_title(layer), "spectra", spectra_plot(layer)),
        (f"Latency of {layer.batch_size} rows, with quartiles", "latency", latency_plot(layer)),
    ]
    return [
        {"title": title, "key": _KEYS[kind], "words": plot.words, "svg": drawn(plot.svg)}
        for title, kind, plot in found
        if plot is not None
    ]
