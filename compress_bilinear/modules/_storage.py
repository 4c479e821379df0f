"""The same layer in another storage format."""

from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..config import Quantize
from ..errors import CompressionError
from ..quantization import QuantizedTensor
from ._base import CompressedBilinear
from ._linear import InterpolativeLinear
from ._projected import PLAIN, reason_against

_Layer = TypeVar("_Layer", bound=CompressedBilinear)


def stored_as(layer: _Layer, quantize: Quantize | None, dtype: torch.dtype) -> _Layer:
    """A layer of the same factors in the format `quantize`, or in `dtype` where that is None.

    Its floating factors require gradients. It has the bias Parameter of `layer` itself, unless the dtype changes.

    Raises: CompressionError where an inner layer has hooks, or is not one that this package puts there.
    """
    for name, part in layer.named_modules():
        reason = reason_against(part, (*PLAIN, type(layer), InterpolativeLinear, QuantizedTensor))
        if reason is not None:
            raise CompressionError(
                f"`{name}` should be a plain linear layer to be stored otherwise. Found that it {reason}: merge or "
                "remove what wraps it first."
            )
    bias = cast(nn.Parameter | None, layer.bias)
    kind: Any = type(layer)
    if layer.rank is None:
        new: _Layer = kind.from_weight(layer.to_dense(dtype), quantize=quantize)
    else:
        decomposition = cast(Any, layer).to_decomposition(torch.float64 if quantize else dtype)
        new = kind.from_decomposition(decomposition, None, quantize=quantize)
    if bias is not None and bias.dtype != dtype and quantize is None:
        bias = nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
    new.set_bias(bias)
    return new.train(layer.training)
