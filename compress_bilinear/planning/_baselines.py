"""What a replacement stands beside: the layer itself, its weight in 8 bits, and what else there was to choose from."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..fitting import Option, OutputError, point, weight_error
from ..modules import DenseBilinear
from ..report import FrontPoint

_MOST = 2**25  # elements of a weight above which 8 bits are not tried for comparison: it would take seconds


def front(layer: nn.Bilinear, options: Sequence[Option], chosen: Option) -> tuple[FrontPoint, ...]:
    """What there was to choose from for a layer, by bytes; the errors are of what the choice was by."""
    on_output = any(option.fitted is not None and option.fitted.on_output for option in options)
    points = []
    for option in sorted(options, key=lambda each: (each.bytes, each.error)):
        module = layer if option.fitted is None else option.fitted.module
        weight, output = (None, option.error) if on_output else (option.error, None)
        points.append(point(module, weight, output, option is chosen, option.latency))
    return tuple(points)


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
    whole = point(layer, 0.0, None if measured is None else 0.0, not candidate.chosen)
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
