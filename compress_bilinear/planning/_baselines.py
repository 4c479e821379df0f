"""The front of a layer: what there was to choose from."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..fitting import Option, point
from ..report import FrontPoint


def front(layer: nn.Bilinear, options: Sequence[Option], chosen: Option) -> tuple[FrontPoint, ...]:
    """What there was to choose from for a layer, by bytes; the errors are of what the choice was by."""
    on_output = any(option.fitted is not None and option.fitted.on_output for option in options)
    points = []
    for option in sorted(options, key=lambda each: (each.bytes, each.error)):
        module = layer if option.fitted is None else option.fitted.module
        weight, output = (None, option.error) if on_output else (option.error, None)
        points.append(point(module, weight, output, option is chosen, option.latency))
    return tuple(points)


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
