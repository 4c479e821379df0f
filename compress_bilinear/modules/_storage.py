"""The same layer in another storage format."""

from typing import Any, TypeVar, cast

import torch
from torch import nn

from ..config import Quantize
from ..decomposition import unit_columns
from ..errors import CompressionError
from ._base import CompressedBilinear
from ._dense import DenseBilinear
from ._linear import InterpolativeLinear, QuantizedLinear, fill_linear, linear_weight
from ._tucker import TuckerBilinear

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
    decomposition: Any = getattr(layer, "to_decomposition", None)
    if isinstance(layer, TuckerBilinear):
        _fill_tucker(layer, cast(TuckerBilinear, new), dtype)
    elif decomposition is not None:
        new = kind.from_decomposition(decomposition(dtype), None, quantize=quantize)
    else:
        new = kind.from_weight(layer.to_dense(dtype), quantize=quantize)
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


def _fill_tucker(layer: TuckerBilinear, new: TuckerBilinear, dtype: torch.dtype) -> None:
    """Projection by projection: an interpolative one keeps its index; the core takes the columns' scales."""
    core = layer.core.dense_rows(slice(None), torch.float64 if new.quantize else dtype)
    for mode, name in enumerate(("out_proj", "in1_proj", "in2_proj")):
        old, part = layer.get_submodule(name), new.get_submodule(name)
        if isinstance(part, InterpolativeLinear):
            part.index = old.get_buffer("index").clone()
            old, part = old.get_submodule("rest"), part.rest
            fill_linear(part, linear_weight(old, dtype))
        elif isinstance(part, _LINEAR):
            weight = linear_weight(old, dtype)
            if isinstance(part, QuantizedLinear):
                unit, scale = unit_columns(weight if mode == 0 else weight.T)
                weight = unit if mode == 0 else unit.T
                core = core * scale.view([-1 if axis == mode else 1 for axis in range(3)])
            fill_linear(part, weight)
    new.core = DenseBilinear.from_weight(core, quantize=new.quantize)
