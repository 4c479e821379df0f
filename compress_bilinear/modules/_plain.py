"""When a layer's tensors may be handed to `ops` at once, and how: its inner layers do nothing but multiply."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization import QuantizedTensor
from ._base import autocast_dtype, without_autocast
from ._dense import DenseBilinear
from ._linear import AddBias, QuantizedLinear

_KINDS = (nn.Linear, QuantizedLinear, DenseBilinear, AddBias, nn.Identity)


def obstacle(parts: dict[str, nn.Module], device: torch.device) -> str | None:
    """Why these inner layers have to be called one by one; None where they need not."""
    if torch.nn.modules.module._has_any_global_hook():
        return "a global module hook is set"
    stored = set()
    for name, layer in parts.items():
        if type(layer) not in _KINDS:
            return f"`{name}` is a {type(layer).__name__}"
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        if any(hooks):
            return f"`{name}` has hooks"
        if "forward" in vars(layer):
            return f"`{name}` has a `forward` of its own"
        weight = getattr(layer, "weight", None)
        if isinstance(weight, QuantizedTensor):
            if device.type == "cpu":
                return "quantized factors are de-quantized part by part"
            if not weight.is_int8:
                return f"the fused kernels read int8, not {weight.extra_repr().split(',')[0]}"
            if weight.resident is not None or getattr(layer, "integer", False):
                return f"`{name}` computes in another way than from its int8 values"
        if weight is not None:
            stored.add(isinstance(weight, QuantizedTensor))
    return "some inner layers are quantized and some are not" if len(stored) > 1 else None


def on_tensors(
    operation: Callable[..., Tensor],
    input1: Tensor,
    input2: Tensor,
    parts: Sequence[nn.Module],
    **scales: Tensor | None,
) -> Tensor:
    """`operation` on the inputs, the parts' weights (None for an identity) and the last one's bias, in one dtype."""
    tensors = [getattr(part, "weight", None) for part in parts]
    device = input1.device.type
    floating = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    bias: Any = getattr(parts[-1], "bias", None)
    operands = [weight.qdata if isinstance(weight, QuantizedTensor) else weight for weight in tensors]
    dtype = autocast_dtype(device, input1, input2, *floating)
    if dtype is None:
        if bias is not None and not floating:
            bias = bias.to(input1.dtype)
        return operation(input1, input2, *operands, bias, **scales)
    cast = [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (*operands, bias)]
    with without_autocast(device):
        return operation(input1.to(dtype), input2.to(dtype), *cast, **scales)
