"""What a replacement stands beside: the layer itself, its weight in 8 bits, and what was tried on the way to it."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from . import ops
from .measure import OutputError, stored_bytes, weight_error
from .modules import CompressedBilinear, DenseBilinear
from .report import FrontPoint

_MOST = 2**25  # elements of a weight above which 8 bits are not tried for comparison: it would take seconds


def point(module: CompressedBilinear, weight: float | None, output: float | None, chosen: bool = False) -> FrontPoint:
    """A replacement with its errors."""
    return FrontPoint(
        method=module.method,
        rank=module.rank,
        quantize=module.quantize,
        bytes=stored_bytes(module),
        flops=module.flops_per_row,
        weight_error=weight,
        output_error=output,
        chosen=chosen,
    )


def beside(
    layer: nn.Bilinear, candidate: FrontPoint, tried: Sequence[FrontPoint], measured: OutputError | None
) -> tuple[FrontPoint, ...]:
    """The candidate among what it is to be compared with, by bytes.

    Args:
        layer: the original.
        candidate: what has become of it, or what was turned down.
        tried: others, of which those that are the candidate itself are left out.
        measured: the error on held-out rows, where there are any.
    """
    whole = FrontPoint(
        method="keep",
        bytes=stored_bytes(layer),
        flops=ops.dense_flops((layer.out_features, layer.in1_features, layer.in2_features)),
        weight_error=0.0,
        output_error=None if measured is None else 0.0,
        chosen=not candidate.chosen,
    )
    points = [whole, candidate]
    known = {(one.method, one.rank, one.quantize) for one in points}
    if ("dense", None, "int8") not in known and layer.weight.numel() <= _MOST:
        dense = DenseBilinear.from_bilinear(layer, quantize="int8")
        output = None if measured is None else measured.of(dense)
        points.append(point(dense, weight_error(layer.weight.detach(), dense), output))
    for one in tried:
        if (one.method, one.rank, one.quantize) not in known:
            known.add((one.method, one.rank, one.quantize))
            points.append(one)
    return tuple(sorted(points, key=lambda one: one.bytes))


def renewed(points: Sequence[FrontPoint], weight: float, output: float | None) -> tuple[FrontPoint, ...]:
    """The points with these errors of the chosen one, where it had such before: it has been trained since."""
    return tuple(
        replace(
            one,
            weight_error=None if one.weight_error is None else weight,
            output_error=None if one.output_error is None else output,
        )
        if one.chosen
        else one
        for one in points
    )
