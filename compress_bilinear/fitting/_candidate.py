"""One way to replace a layer, with what it was measured to lose and to cost."""

from dataclasses import dataclass

from torch import nn

from .. import ops
from ..config import LayerConfig
from ..modules import CompressedBilinear
from ..report import FrontPoint
from ._fit import Fitted
from ._measure import stored_bytes


@dataclass(frozen=True, eq=False)
class Option:
    """One way to replace a layer, or to keep it.

    Attributes:
        config: what asks for exactly this; None keeps the layer.
        fitted: the replacement; None keeps the layer.
        bytes, flops: everything that is stored, and the work for a row.
        error: of the outputs on held-out rows; without calibration, of the weight.
        latency: median milliseconds of a call; None where nothing was timed.
    """

    config: LayerConfig | None
    fitted: Fitted | None
    bytes: int
    flops: int
    error: float
    latency: float | None = None


def point(
    module: CompressedBilinear | nn.Bilinear,
    weight: float | None,
    output: float | None,
    chosen: bool = False,
    latency: float | None = None,
) -> FrontPoint:
    """A replacement, or the layer that is kept, with its errors and the median milliseconds of a call."""
    if isinstance(module, nn.Bilinear):
        method, rank, quantize = "keep", None, None
        flops = ops.dense_flops((module.out_features, module.in1_features, module.in2_features))
    else:
        method, rank, quantize, flops = module.method, module.rank, module.quantize, module.flops_per_row
    return FrontPoint(
        method=method,
        rank=rank,
        quantize=quantize,
        bytes=stored_bytes(module),
        flops=flops,
        weight_error=weight,
        output_error=output,
        latency_ms=latency,
        chosen=chosen,
    )
