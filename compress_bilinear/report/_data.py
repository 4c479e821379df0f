"""The report as data: a frozen record for each layer, and what they were measured on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_type_hints

from annotated_types import Ge

from .._io import STRICT
from ..errors import CompressionError

Count: TypeAlias = Annotated[int, Ge(0)]
Amount: TypeAlias = Annotated[float, Ge(0)]
Rank: TypeAlias = int | tuple[int, int, int] | None
Quartiles: TypeAlias = tuple[Amount | None, Amount | None]  # None where it was not finite


@dataclass(frozen=True)
class Note:
    """One fact about what was decided for a layer.

    Attributes:
        code: names the kind of fact, for programs: "as_configured", "forced", "slower", "cancelling",
            "fitted_to_weight", "unreached", "few_rows", "few_groups", "refined", "not_refined", "just_above",
            "metric_drop", "not_timed", "symmetric"; of a kept layer "not_replaceable", "weight_read", "not_finite",
            "keeps_nothing", "not_smaller", "misses_target", "not_faster", "infeasible",
            "misfit", "out_of_reach", "within_size". "text" has no kind: it was read from a report of an older schema.
        text: the same for people; part of a sentence, without a full stop.
    """

    code: str
    text: str


AS_CONFIGURED = Note("as_configured", "as configured")
"""The note of a replacement with nothing more to say."""


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """One candidate of a layer: what it stores, and how much it changes.

    Attributes:
        method: "keep", "dense", "cp" or "tucker"; `rank` and `quantize` as in `LayerReport`.
        bytes: everything that it stores. `flops`: of a row.
        weight_error, output_error: as in `LayerReport`; the latter on held-out calibration rows. None where unknown.
        latency_ms: the median of a call; None where nothing was timed.
        predicted: whether the candidate was not made, so that its error is a prediction; of int8 and nf4 dense layers
            one that was measured before they are refined.
        chosen: whether the layer became this.
    """

    method: str
    rank: Rank = None
    quantize: str | None = None
    bytes: Count
    flops: Count
    weight_error: Amount | None = None
    output_error: Amount | None = None
    latency_ms: Amount | None = None
    predicted: bool = False
    chosen: bool = False


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Singular values of one unfolding of a layer's weight, the largest first. A long mode has a selection of them.

    Attributes:
        indices: the number of each value, counted from 1.
        values: relative to the weight's Frobenius norm, so that the squares of all sum to 1.
        sampled: whether they are estimated from a part of a large weight.

    Raises: CompressionError unless there is a value at least, and an index for each that rises from 1 or more.
    """

    indices: tuple[Count, ...]
    values: tuple[Amount, ...]
    sampled: bool = False

    def __post_init__(self) -> None:
        rising = list(self.indices) == sorted({max(1, index) for index in self.indices})
        if not (self.values and rising and len(self.indices) == len(self.values)):
            raise CompressionError(f"`indices` should rise from 1, one for each of `values`. Found {self.indices}.")


@dataclass(frozen=True, kw_only=True)
class ComputeMode:
    """A way in which a quantized layer can compute, as it was measured.

    Attributes:
        mode: "on_the_fly", "bfloat16", "int8" or "bitsandbytes"; `chosen` says whether the layer computes so.
        rows: of a call, from which the chosen mode is taken; fewer are computed on the fly.
        latency_ms, latency_quartiles_ms: of a call, all modes measured in turn; None where it was not timed.
        output_change: ‖y − ŷ‖/‖ŷ − b‖ of its outputs y against those on the fly, ŷ, on the timed rows.
        refused: why the layer cannot or should not compute so; None where it may.
    """

    mode: str
    chosen: bool
    latency_ms: Amount | None = None
    latency_quartiles_ms: tuple[Amount, Amount] | None = None
    output_change: Amount | None = None
    rows: int = 1
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What was done with one layer and what it cost; "after" is what the model holds afterwards.

    Attributes:
        name: of the layer in the model, "" for the model itself; `aliases` has its other names.
        form: "nn.Bilinear", or the class of a module that held the weight in another form. The latency before is then
            that of the module's own forward, and `batch_size` counts its pairs of rows.
        shape: (O, I, J).
        method: "dense", "cp" or "tucker", as the config asked. `rank` is the result, None for dense or unsolved.
        quantize: the storage format: None (the layer's dtype), "bf16", "int8" or "nf4".
        decision: "replaced" or "kept".
        notes: why, and what else there is to say; `reason` joins their texts.
        weight_error: ‖W − Ŵ‖/‖W‖, Frobenius, of what is stored; for a kept layer, of the candidate that
            was rejected. None where nothing was solved.
        truncation_error, quantization_error: the two parts of `weight_error` of a quantized layer: that of the
            decomposition before rounding, and that of rounding, both relative to ‖W‖. None where not quantized, or
            where no time was left.
        output_error: ‖y − ŷ‖/‖y − b‖ on held-out calibration rows, against the original weight in float64; None
            without such rows.
        calibration_rows: the number of these rows. calibration_groups: the number of independent groups among them,
            which is that of the distinct values of the input that has fewer; None where it is not known.
        params_before, params_after: stored values, bias included.
        bytes_before, bytes_after: everything that is stored: values, scales, bias.
        compute: the compute mode of a quantized layer, see `ComputeMode`. None for others.
        compute_modes: the modes among which it was chosen; empty where only the default was asked for.
        flops_before, flops_after: of a row, in the best order, multiply-add counted as 2.
        latency_before_ms, latency_after_ms, latency_dense_ms: medians, of `nn.Bilinear`, the replacement, and the
            fastest exact dense evaluation (`dense_order` names it); `..._quartiles_ms` are the quartiles. None where
            nothing was timed.
        speedup: against `nn.Bilinear`; `speedup_vs_dense`: against the fastest exact dense evaluation. Below 1 the
            replacement is slower.
        batch_size: rows in a timed call.
        amplification: sqrt(Σ_r ‖component r‖²)/‖Ŵ‖ of a CP: 8-bit error is about 1% of it. None for other methods.
        front: all candidates that were evaluated, by bytes; empty where the config left no choice.
        spectra: of the weight's unfoldings by out, in1 and in2; empty where nothing was solved, a mode is too long,
            or no time was left.
    """

    name: str
    aliases: tuple[str, ...] = ()
    shape: tuple[Count, Count, Count] | None
    method: str
    rank: Rank = None
    quantize: str | None = None
    decision: Literal["replaced", "kept"]
    notes: tuple[Note, ...]
    weight_error: Amount | None = None
    truncation_error: Amount | None = None
    quantization_error: Amount | None = None
    output_error: Amount | None = None
    calibration_rows: Count = 0
    calibration_groups: Count | None = None
    params_before: Count
    params_after: Count
    bytes_before: Count
    bytes_after: Count
    compute: str | None = None
    compute_modes: tuple[ComputeMode, ...] = ()
    flops_before: Count | None = None
    flops_after: Count | None = None
    latency_before_ms: Amount | None = None
    latency_before_quartiles_ms: Quartiles | None = None
    latency_after_ms: Amount | None = None
    latency_after_quartiles_ms: Quartiles | None = None
    latency_dense_ms: Amount | None = None
    latency_dense_quartiles_ms: Quartiles | None = None
    dense_order: str | None = None
    speedup: Amount | None = None
    speedup_vs_dense: Amount | None = None
    batch_size: Count | None = None
    amplification: Amount | None = None
    form: str = "nn.Bilinear"
    front: tuple[FrontPoint, ...] = ()
    spectra: tuple[Spectrum, ...] = ()

    @property
    def label(self) -> str:
        """The name to show: a root layer has none."""
        return self.name or "(root)"

    @property
    def names(self) -> str:
        """The label and the aliases."""
        return ", ".join([self.label, *(alias or "(root)" for alias in self.aliases)])

    @property
    def times_smaller(self) -> float | None:
        """The bytes before, divided by those after."""
        return self.bytes_before / self.bytes_after if self.bytes_after else None

    @property
    def reason(self) -> str:
        """The texts of the notes, with "; " between them."""
        return "; ".join(note.text for note in self.notes)

    def has(self, code: str) -> bool:
        """Whether a note has this code."""
        return any(note.code == code for note in self.notes)


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The figures of a report; `Report` adds how to read, write and show them."""

    layers: tuple[LayerReport, ...]
    model_bytes_before: Count
    model_bytes_after: Count
    environment: Mapping[str, str | int]
    metric_before: float | None = None
    metric_after: float | None = None
    seconds: Mapping[str, Amount] = field(default_factory=dict, compare=False)
    config: Mapping[str, Any] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    __pydantic_config__ = STRICT


@cache
def numeric_fields() -> tuple[str, ...]:
    """The fields of `LayerReport` that are one number."""
    hints = get_type_hints(LayerReport)
    kinds = {name: set(get_args(hint) or (hint,)) for name, hint in hints.items()}
    return tuple(name for name, kind in kinds.items() if kind & {int, float} and kind <= {int, float, type(None)})


def effective(layer: LayerReport) -> LayerReport:
    """The record with the figures of a rejected candidate replaced by those of the original layer: exact, as fast."""
    if layer.decision == "replaced":
        return layer
    before, dense = layer.latency_before_ms, layer.latency_dense_ms
    exact: dict[str, Any] = {one.name: 0.0 for one in fields(layer) if one.name.endswith("_error")}
    return replace(
        layer,
        **exact,
        rank=None,
        quantize=None,
        compute=None,
        latency_after_ms=before,
        latency_after_quartiles_ms=layer.latency_before_quartiles_ms,
        speedup=1.0,
        speedup_vs_dense=dense / before if dense is not None and before else None,
        amplification=None,
    )
