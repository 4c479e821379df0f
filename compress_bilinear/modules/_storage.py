"""The same layer in another storage format."""

from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..config import Quantize
from ..errors import CompressionError
from ._base import CompressedBilinear
from ._dense import DenseBilinear
from ._linear import InterpolativeLinear, QuantizedLinear

_LINEAR = (nn.Linear, QuantizedLinear)
_Layer = TypeVar("_Layer", bound=CompressedBilinear)


def stored_as(layer: _Layer, quantize: Quantize | None, dtype: torch.dtype) -> _Layer:
    """A layer of the same factors in the format `quantize`, or in `dtype` where that is None.

    Its floating factors require gradients. It has the bias Parameter of `layer` itself, unless the dtype changes.

    Raises: CompressionError where an inner layer is not one that this package puts there.
    """
    rank = () if layer.rank is None else (layer.rank,)
    sizes = (layer.in1_features, layer.in2_features, layer.out_features)
    bias = cast(nn.Parameter | None, layer.bias)
    kind: Any = type(layer)  # dense layers take no rank
    new: _Layer = kind(*sizes, *rank, bias is not None, "meta", dtype, quantize=quantize)
    _check_parts(layer, new)
    if layer.rank is None:
        new = kind.from_weight(layer.to_dense(dtype), quantize=quantize)
    else:
        decomposition = cast(Any, layer).to_decomposition(torch.float64 if quantize else dtype)
        new = kind.from_decomposition(decomposition, None, quantize=quantize)
    if bias is not None and bias.dtype != dtype and quantize is None:
        bias = nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
    new.set_bias(bias)
    return new.train(layer.training)


def _check_parts(layer: CompressedBilinear, new: CompressedBilinear) -> None:
    for name, part in new.named_modules():
        if not isinstance(part, (*_LINEAR, InterpolativeLinear, DenseBilinear)):
            continue
        old, kinds = layer.get_submodule(name), _LINEAR if type(part) in _LINEAR else (type(part),)
        if type(old) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise CompressionError(
                f"`{name}` should be a plain {wanted} to be stored otherwise. Found {type(old).__name__}: merge or "
                "remove what wraps it first."
            )
