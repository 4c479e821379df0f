"""The same layer in another storage format."""

from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..config import Quantize
from ..errors import CompressionError
from ._base import CompressedBilinear
from ._dense import DenseBilinear
from ._linear import InterpolativeLinear, QuantizedLinear, fill_linear, linear_weight

_Layer = TypeVar("_Layer", bound=CompressedBilinear)


def stored_as(layer: _Layer, quantize: Quantize | None, dtype: torch.dtype) -> _Layer:
    """A layer of the same factors, rounded to `quantize`, or in `dtype` where that is None.

    Its floating factors require gradients. The bias is the very Parameter of `layer`, unless its dtype is another.

    Raises: CompressionError where an inner layer is not one of those that this package puts there.
    """
    rank = () if layer.rank is None else (layer.rank,)
    sizes = (layer.in1_features, layer.in2_features, layer.out_features)
    bias = cast(nn.Parameter | None, layer.bias)
    kind: Any = type(layer)  # dense layers take no rank
    new: _Layer = kind(*sizes, *rank, bias is not None, "meta", dtype, quantize=quantize)
    for name, part in list(new.named_modules()):
        if not isinstance(part, (nn.Linear, QuantizedLinear, InterpolativeLinear, DenseBilinear)):
            continue
        old = layer.get_submodule(name)
        kinds = (nn.Linear, QuantizedLinear) if isinstance(part, (nn.Linear, QuantizedLinear)) else (type(part),)
        if type(old) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise CompressionError(
                f"`{name}` should be a plain {wanted} to be stored otherwise. Found {type(old).__name__}: merge or "
                "remove what wraps it first."
            )
        if isinstance(part, InterpolativeLinear):
            part.index = old.get_buffer("index").clone()
        elif isinstance(part, DenseBilinear):
            weight = cast(DenseBilinear, old).dense_rows(slice(None), dtype)
            filled = DenseBilinear.from_weight(weight, quantize=quantize)
            part.weight = filled.weight
        else:
            fill_linear(part, linear_weight(old)(dtype), _component(part))
    if bias is not None and bias.dtype != dtype and quantize is None:
        bias = nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
    new.set_bias(bias)
    return new.train(layer.training)


def _component(linear: nn.Linear | QuantizedLinear) -> int:
    """The axis along which each index has a scale of its own; any for a layer without scales."""
    if isinstance(linear, nn.Linear):
        return 0
    return 0 if tuple(linear.weight.scale.shape) == (linear.out_features, 1) else 1
