"""The report as a page of its own: everything in it but the template is escaped, and nothing is to be fetched."""

import base64
import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from ._data import LayerReport, ReportData, effective
from ._plots import Plot, front_plot, latency_plot, spectra_plot
from ._text import error, figure, is_slower, method, size, size_change, spent

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_BYTES = 1_950_000  # of a page, plots included
_MOST_DETAILS = 300  # layers with a section of their own
_SHOWN_ELSEWHERE = {"name", "aliases", "shape", "notes", "front", "spectra"}


def render_html(report: ReportData, most_bytes: int = _MOST_BYTES) -> str:
    """The page; beyond `most_bytes` the plots of the smallest layers are left out, and it says so."""
    largest = sorted(range(len(report.layers)), key=lambda k: -report.layers[k].bytes_before)[:_MOST_DETAILS]
    plots: dict[int, list[Plot]] = {k: [] for k in sorted(largest)}  # of each layer that has a section
    context: dict[str, Any] = {
        "report": report,
        "cards": _cards(report),
        "warnings": _warnings(report),
        "plots": plots,
        "config": json.dumps(dict(report.config), indent=2, ensure_ascii=False) if report.config else "",
        "spent": spent(report),
        "shortened": len(plots) < len(report.layers),
    }
    left = most_bytes - len(_page(context).encode())
    for k in largest:
        drawn = _plots(report.layers[k])
        left -= len(str(drawn).encode())
        if left < 0:
            context["shortened"] = True
            break
        plots[k] = drawn
    return _page(context)


def _page(context: dict[str, Any]) -> str:
    """The template filled in. Text is escaped unless it is `Markup`; a name that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(_TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["dotted"] = lambda name: Markup(".<wbr>").join(name.split("."))  # where a long name may break
    environment.filters["drawn"] = Markup  # an SVG of our own
    for function in (effective, figure, method, size_change, _details):
        environment.filters[function.__name__.strip("_")] = function
    environment.tests["slower"] = is_slower
    style, script = (Markup(_TEMPLATES.joinpath(name).read_text(encoding="utf-8")) for name in ("style.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # the only script that may run
    text = environment.get_template("report.html").render(
        **context, style=style, script=script, script_digest=Markup(digest)
    )
    return text.encode("utf-8", "replace").decode()  # a name may hold half a surrogate pair, which no file can


def _cards(report: ReportData) -> list[tuple[Any, ...]]:
    """What the whole model has become: a label, a figure, a note and whether that is a warning, each."""
    before, after = report.model_bytes_before, report.model_bytes_after
    now, replaced = [effective(layer) for layer in report.layers], _replaced(report)
    cards: list[tuple[Any, ...]] = [
        ("Bilinear layers", f"{len(replaced)} of {len(now)} replaced"),
        ("Model size", f"{size(before)} → {size(after)}", f"{before / after:.3g}x smaller" if after else ""),
    ]
    timed = [one for one in now if one.latency_before_ms is not None and one.latency_after_ms is not None]
    if timed:
        slowest = max(timed, key=lambda one: one.latency_after_ms or 0)
        first, last = max(one.latency_before_ms or 0 for one in timed), slowest.latency_after_ms or 0
        cards.append(("Slowest layer", f"{first:.3g} → {last:.3g} ms", slowest.label, last > first))
    for kind in ("output_error", "weight_error"):
        worst = max(replaced, key=lambda layer: getattr(layer, kind) or 0, default=None)
        if worst is not None and getattr(worst, kind) is not None:
            cards.append((f"Worst {kind.replace('_', ' ')}", error(getattr(worst, kind)), worst.label))
    if report.metric_before is None or report.metric_after is None:
        return [*cards, ("Task metric", "not measured", "judge by your own before you use the model")]
    change = f"change {report.metric_after - report.metric_before:+.4g}"
    return [*cards, ("Task metric", f"{report.metric_before:.4g} → {report.metric_after:.4g}", change)]


def _replaced(report: ReportData) -> list[LayerReport]:
    return [layer for layer in report.layers if layer.decision == "replaced"]


def _warnings(report: ReportData) -> dict[str, list[LayerReport]]:
    """The layers of each warning, where there are any."""
    replaced = _replaced(report)
    slower = [layer for layer in replaced if is_slower(layer.speedup)]
    found = {
        "Slower here than nn.Bilinear": slower,
        "Faster than nn.Bilinear, but slower here than the best exact dense evaluation": [
            layer for layer in replaced if is_slower(layer.speedup_vs_dense) and layer not in slower
        ],
        "Replaced by force, against the verdict": [layer for layer in replaced if layer.has("forced")],
    }
    return {text: layers for text, layers in found.items() if layers}


def _details(layer: LayerReport) -> dict[str, str]:
    """Every figure of a layer that is known, by what it is called on the page."""
    known = {one.name: getattr(layer, one.name) for one in fields(layer) if one.name not in _SHOWN_ELSEWHERE}
    return {
        name.replace("_", " ").replace(" ms", " (ms)"): figure(value)
        for name, value in known.items()
        if value not in (None, ())
    }


def _plots(layer: LayerReport) -> list[Plot]:
    drawn = (front_plot(layer), spectra_plot(layer), latency_plot(layer))
    return [plot for plot in drawn if plot is not None]
