"""A candidate: one way to replace a layer, or to keep it, with what it was measured to lose and to cost."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from .. import ops
from ..config import LayerConfig, Quantize
from ..modules import CompressedBilinear, method_of
from ..report import ComputeMode, FrontPoint, Note
from ._measure import stored_bytes


@dataclass(frozen=True, eq=False, kw_only=True)
class Candidate:
    """One way to replace a layer, or to keep it.

    Attributes:
        config: what asks for exactly this; None keeps the layer.
        module: what would take the layer's place; None keeps the layer, or is not made yet: see `predicted`.
        bytes, flops: everything that is stored, and the work for a row.
        error: relative error of the outputs on held-out rows, or of the weight; infinite where it is no number.
        on_output: which of the two that is.
        fitted_to: what the factors were fitted to in the end.
        bias_corrected: whether the bias is no longer the layer's.
        fitted: the factors in floating point, in the coordinates in which they were fitted; None of a dense layer.
        unwhiten: makes of these the factors of the weight; None where they are that already.
        latency: median milliseconds of a call; None where nothing was timed.
        notes: what else the report should say of it.
        compute_modes: what its compute mode was chosen by.
    """

    config: LayerConfig | None
    module: CompressedBilinear | None
    bytes: int
    flops: int
    error: float
    on_output: bool = False
    fitted_to: Literal["weight", "whitened", "rows"] = "weight"
    bias_corrected: bool = False
    fitted: Any = None
    unwhiten: Callable[[Any], Any] | None = None
    latency: float | None = None
    notes: tuple[Note, ...] = ()
    compute_modes: tuple[ComputeMode, ...] = ()

    @classmethod
    def of(cls, config: LayerConfig, module: CompressedBilinear, error: float, **known: Any) -> "Candidate":
        """A replacement, with its sizes."""
        size, flops = stored_bytes(module), module.flops_per_row
        return cls(config=config, module=module, error=error, bytes=size, flops=flops, **known)

    @classmethod
    def kept(cls, layer: nn.Bilinear) -> "Candidate":
        """The layer itself."""
        flops = ops.dense_flops((layer.out_features, layer.in1_features, layer.in2_features))
        return cls(config=None, module=None, bytes=stored_bytes(layer), flops=flops, error=0.0)

    @property
    def decomposition(self) -> Any:
        """The factors of the weight in floating point; None of a dense layer."""
        return self.fitted if self.unwhiten is None or self.fitted is None else self.unwhiten(self.fitted)

    @property
    def kind(self) -> tuple[str, Quantize | None]:
        """Method and format; "keep" of the layer itself."""
        return ("keep", None) if self.config is None else (method_of(self.config).name, self.config.quantize)

    @property
    def predicted(self) -> bool:
        """Whether there is no module yet: the error is a prediction, but for that of int8 and nf4 dense layers."""
        return self.config is not None and self.module is None

    def noted(self, *notes: Note) -> "Candidate":
        """With more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def point(self, on_output: bool, chosen: bool) -> FrontPoint:
        """The candidate as the report's fronts have it; `on_output` says what the errors of the front are of."""
        return FrontPoint(
            method=self.kind[0],
            rank=getattr(self.config, "rank", None),
            quantize=self.kind[1],
            bytes=self.bytes,
            flops=self.flops,
            weight_error=None if on_output else self.error,
            output_error=self.error if on_output else None,
            latency_ms=self.latency,
            predicted=self.predicted,
            chosen=chosen,
        )
