"""The report as data: one frozen record for each layer, and what they were measured on."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from .._atomic import written_atomically
from ..errors import CompressionError
from ._read import check, record

SCHEMA_VERSION = 3

Rank: TypeAlias = int | tuple[int, int, int] | None
Quartiles: TypeAlias = tuple[float | None, float | None]  # None where it was not finite


@dataclass(frozen=True)
class Note:
    """One fact about what was decided for a layer.

    Attributes:
        code: names the kind of fact, for programs: "as_configured", "forced", "slower", "cancelling",
            "fitted_to_weight", "unreached", "refined", "not_refined"; of a kept layer "not_replaceable", "not_finite",
            "keeps_nothing", "not_smaller", "misses_target", "not_faster", "infeasible", "misfit", "out_of_reach",
            "within_size". "text" has no kind: it was read from a report of an older schema.
        text: the same for people; part of a sentence, without a full stop.
    """

    code: str
    text: str


AS_CONFIGURED = Note("as_configured", "as configured")
"""The note of a replacement with nothing more to say."""


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """One replacement that was considered for a layer, with what it would cost and lose.

    Attributes:
        method: "keep", "dense", "cp" or "tucker"; `rank` and `quantize` as in `LayerReport`.
        bytes: everything that it would store. `flops`: of a row.
        weight_error, output_error: as in `LayerReport`; the latter on held-out calibration rows. None where unknown.
        latency_ms: the median of a call; None where nothing was timed.
        chosen: whether it is what the layer became.
    """

    method: str
    rank: Rank = None
    quantize: str | None = None
    bytes: int
    flops: int
    weight_error: float | None = None
    output_error: float | None = None
    latency_ms: float | None = None
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values of one unfolding of a layer's weight, the largest first; of a long mode some stand for all.

    Attributes:
        indices: which they are, counted from 1.
        values: relative to the weight's Frobenius norm, so that the squares of all sum to 1.
        sampled: whether they are estimated from some slices of a large weight.
    """

    indices: tuple[int, ...]
    values: tuple[float, ...]
    sampled: bool = False


@dataclass(frozen=True, kw_only=True)
class ComputeMode:
    """A way in which a quantized layer can compute, as it was measured.

    Attributes:
        mode: "on_the_fly", "resident", "int8" or "bitsandbytes"; `chosen` says whether the layer computes so.
        latency_ms, latency_quartiles_ms: of a call, all modes side by side; None where it was not timed.
        resident_bytes: in memory, what is kept de-quantized included.
        output_change: ‖y − ŷ‖/‖ŷ − b‖ of its outputs y against those on the fly, ŷ, on the timed rows.
        refused: why the layer does not have it, or why it was not to be chosen; None where neither.
    """

    mode: str
    chosen: bool
    latency_ms: float | None = None
    latency_quartiles_ms: tuple[float, float] | None = None
    resident_bytes: int | None = None
    output_change: float | None = None
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What was done with one layer and what it cost; "after" is what the model holds afterwards.

    Attributes:
        name: of the layer in the model, "" for the model itself; `aliases` has its other names.
        form: "nn.Bilinear", or the class of a module that carried the weight in another form. The latency before, and
            what is told as "nn.Bilinear", is then of that module's own forward, and the batch its pairs of rows.
        shape: (O, I, J).
        method: "dense", "cp" or "tucker": what was asked for. `rank` is what it came to, None for dense or unsolved.
        quantize: None, "bf16", "int8" or "nf4".
        decision: "replaced" or "kept".
        notes: why, and what else is to be said of it; `reason` joins their texts.
        weight_error: ‖W − Ŵ‖/‖W‖, Frobenius, in float64, of what is stored; for a kept layer, of the candidate that
            was turned down. None where nothing was solved.
        truncation_error, quantization_error: the parts of `weight_error` of a quantized layer: of the decomposition in
            floating point, and how far what is stored is from it, both relative to ‖W‖. None where not quantized.
        output_error: ‖y − ŷ‖/‖y − b‖ on the calibration rows, against the original weight in float64; None without.
        calibration_rows: how many rows that is measured on.
        params_before, params_after: stored values, bias included.
        bytes_before, bytes_after: everything that is stored: values, scales, bias.
        resident_bytes: in memory, of a quantized layer: what is stored, and what its compute mode keeps de-quantized.
        compute: how a quantized layer computes: a mode of `ComputeMode`. None for others.
        compute_modes: what that was chosen by; empty where nothing but the default was asked for.
        flops_before, flops_after: for a row, in the best order, multiply-add counted as 2.
        latency_before_ms, latency_after_ms, latency_dense_ms: medians, of `nn.Bilinear`, the replacement, and the
            fastest exact dense evaluation (`dense_order` names it); `..._quartiles_ms` are the quartiles. None where
            nothing was timed.
        speedup: against `nn.Bilinear`; `speedup_vs_dense`: against the fastest exact dense evaluation. Below 1 the
            replacement is slower.
        batch_size: rows in a timed call.
        amplification: sqrt(Σ_r ‖component r‖²)/‖Ŵ‖ of a CP: 8-bit error is about 1% of it. None for other methods.
        front: all candidates that were evaluated, by bytes; empty where the config left no choice.
        spectra: of the weight's unfoldings by out, in1 and in2; empty where nothing was solved or a mode is too long.
    """

    name: str
    aliases: tuple[str, ...] = ()
    shape: tuple[int, int, int] | None
    method: str
    rank: Rank = None
    quantize: str | None = None
    decision: Literal["replaced", "kept"]
    notes: tuple[Note, ...]
    weight_error: float | None = None
    truncation_error: float | None = None
    quantization_error: float | None = None
    output_error: float | None = None
    calibration_rows: int = 0
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    resident_bytes: int | None = None
    compute: str | None = None
    compute_modes: tuple[ComputeMode, ...] = ()
    flops_before: int | None = None
    flops_after: int | None = None
    latency_before_ms: float | None = None
    latency_before_quartiles_ms: Quartiles | None = None
    latency_after_ms: float | None = None
    latency_after_quartiles_ms: Quartiles | None = None
    latency_dense_ms: float | None = None
    latency_dense_quartiles_ms: Quartiles | None = None
    dense_order: str | None = None
    speedup: float | None = None
    speedup_vs_dense: float | None = None
    batch_size: int | None = None
    amplification: float | None = None
    form: str = "nn.Bilinear"
    front: tuple[FrontPoint, ...] = ()
    spectra: tuple[Spectrum, ...] = ()

    @property
    def label(self) -> str:
        """The name to show: a root layer has none."""
        return self.name or "(root)"

    @property
    def reason(self) -> str:
        """The texts of the notes, with "; " between them."""
        return "; ".join(note.text for note in self.notes)

    def has(self, code: str) -> bool:
        """Whether a note has this code."""
        return any(note.code == code for note in self.notes)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What compressing a model did, layer by layer.

    Attributes:
        layers: one `LayerReport` for each layer that was selected, in the model's order.
        model_bytes_before, model_bytes_after: parameters and buffers of the whole model.
        environment: device, dtype, threads and versions that the figures hold for.
        metric_before, metric_after: the caller's own task metric of the whole model; None where none was given.
        config: the recipe, as a recipe file has it (`config.parse_recipe`); empty where it is not known.
    """

    layers: tuple[LayerReport, ...]
    model_bytes_before: int
    model_bytes_after: int
    environment: Mapping[str, str | int]
    metric_before: float | None = None
    metric_after: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        from ._terminal import render_text

        return render_text(self, title="Compression report")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; a figure that is not finite becomes None."""
        body = {
            "schema_version": SCHEMA_VERSION,
            "environment": dict(self.environment),
            "model_bytes_before": self.model_bytes_before,
            "model_bytes_after": self.model_bytes_after,
            "metric_before": self.metric_before,
            "metric_after": self.metric_after,
            "config": self.config,
            "layers": [dataclasses.asdict(layer) | {"reason": layer.reason} for layer in self.layers],
        }
        plain: dict[str, Any] = _plain(body)
        return plain

    def to_json(self) -> str:
        """`to_dict()` as JSON; `schema_version` says how to read it."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """The inverse of `to_dict()`; dicts of older schemas are read too.

        Raises: CompressionError for a newer schema version, or where a field is missing, unknown, or not of its type.
        """
        found = data.get("schema_version") if isinstance(data, Mapping) else None
        if found not in range(1, SCHEMA_VERSION + 1) or isinstance(found, bool):
            raise CompressionError(f"`schema_version` of a report should be at most {SCHEMA_VERSION}. Found {found!r}.")
        data = _current(data)
        known = {"schema_version", *(one.name for one in dataclasses.fields(cls))}
        if data.keys() != known:
            parts = [f"no {', '.join(sorted(known - data.keys()))}"] if known - data.keys() else []
            parts += [f"also {', '.join(sorted(data.keys() - known))}"] if data.keys() - known else []
            raise CompressionError(f"A report should have {', '.join(sorted(known))}. Found {'; '.join(parts)}.")
        for name in ("model_bytes_before", "model_bytes_after"):
            check(data[name], int, f"`{name}` of a report")
        for name in ("metric_before", "metric_after"):  # which may be below 0
            value = data[name]
            size = abs(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
            check(size, float | None, f"`{name}` of a report")
        for name in ("environment", "config"):
            if not isinstance(data[name], Mapping):
                raise CompressionError(f"`{name}` of a report should be an object. Found {data[name]!r}.")
        for name, value in data["environment"].items():
            check(value, str | int, f"`environment.{name}` of a report")
        if not isinstance(data["layers"], (list, tuple)):
            raise CompressionError(f"`layers` of a report should be a list. Found {data['layers']!r}.")
        layers = tuple(_layer(layer, k) for k, layer in enumerate(data["layers"]))
        rest = {name: data[name] for name in known - {"schema_version", "layers"}}
        return cls(**rest, layers=layers)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json()`. Raises: CompressionError where the text is not such a report."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CompressionError(f"A report in JSON is required. Found text that is not JSON: {error}.") from error
        return cls.from_dict(data)

    def to_markdown(self) -> str:
        """A Markdown table, the reasons of kept layers, and the environment."""
        from ._markdown import render_markdown

        return render_markdown(self)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page of its own, below 2 MB, that needs no network: summary, table, plots, environment and config.

        Args:
            path: where to write it too, whole or not at all.

        Raises: CompressionError where `path` cannot be a file.
        """
        from ._html import render_html

        if path is None:
            return render_html(self)
        with written_atomically(path) as temporary:  # which looks at the path before plots are drawn
            text = render_html(self)
            temporary.write_text(text, encoding="utf-8")
        return text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@cache
def numeric_fields() -> tuple[str, ...]:
    """The fields of `LayerReport` that are one number."""
    hints = get_type_hints(LayerReport)
    kinds = {one.name: set(get_args(hints[one.name]) or (hints[one.name],)) for one in dataclasses.fields(LayerReport)}
    return tuple(name for name, kind in kinds.items() if kind & {int, float} and kind <= {int, float, type(None)})


def _current(data: Mapping[str, Any]) -> dict[str, Any]:
    """A report's dict in the present schema: "reason" is left out, of which `notes` are the source."""
    old = data["schema_version"] < SCHEMA_VERSION
    found: dict[str, Any] = ({"metric_before": None, "metric_after": None, "config": {}} if old else {}) | dict(data)
    if old:
        found.pop("call", None)
    if isinstance(found.get("layers"), (list, tuple)):
        found["layers"] = [
            _current_layer(layer, old) if isinstance(layer, Mapping) else layer for layer in data["layers"]
        ]
    return found


def _current_layer(layer: Mapping[str, Any], old: bool) -> dict[str, Any]:
    if not old:
        return {key: value for key, value in layer.items() if key != "reason"}
    kept = {key: value for key, value in layer.items() if key not in ("backend", "compared", "reason")}
    reason = layer.get("reason")
    note = AS_CONFIGURED if reason == AS_CONFIGURED.text else Note("text", reason)  # type: ignore[arg-type]
    return kept | {"notes": [dataclasses.asdict(note)]}


def _layer(entry: Any, number: int) -> LayerReport:
    named = isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
    what = f"layer {entry['name'] or '(root)'!r}" if named else f"layer {number}"
    inner: dict[str, tuple[object, ...]] = {}
    kinds = {"notes": Note, "front": FrontPoint, "spectra": Spectrum, "compute_modes": ComputeMode}
    for name, kind in kinds.items():
        if isinstance(entry, Mapping) and isinstance(entry.get(name), (list, tuple)):
            inner[name] = tuple(record(kind, one, f"{name}[{k}] of {what}") for k, one in enumerate(entry[name]))
    layer = record(LayerReport, entry, what, **inner)
    for k, one in enumerate(layer.spectra):
        rising = list(one.indices) == sorted({max(1, i) for i in one.indices})
        if not one.values or len(one.indices) != len(one.values) or not rising:
            raise CompressionError(
                f"`indices` of spectra[{k}] of {what} should rise from 1 at least, and there should be some, "
                "one for each of `values`. "
                f"Found {len(one.indices)} for {len(one.values)} values, from {one.indices[:1]} on."
            )
    return layer
