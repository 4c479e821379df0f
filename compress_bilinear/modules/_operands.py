"""When a layer's tensors may be handed to `ops` at once, and how: its inner layers do nothing but multiply."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..quantization import QuantizedTensor
from ._autocast import autocast_dtype, without_autocast
from ._dense import DenseBilinear
from ._linear import AddBias, QuantizedLinear

_KINDS = (nn.Linear, QuantizedLinear, DenseBilinear, AddBias, nn.Identity)


def bare_operands(parts: Mapping[str, Any], names: Sequence[str]) -> list[Any] | None:
    """The weights of these inner layers (None for an identity) and the last one's bias, where they only multiply.

    None where that is not so, or a graph is recorded: then `obstacle` knows more. Tensors are read from where
    `nn.Module` keeps them, for each of its `__getattr__` costs as much as a small sum.
    """
    if torch.compiler.is_compiling() or torch.nn.modules.module._has_any_global_hook():
        return None
    operands: list[Any] = []
    bias = None
    for name in names:
        layer = parts[name]
        own, kind = layer.__dict__, type(layer)
        if bias is not None or own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            return None  # a bias belongs to the last layer
        if own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return None
        if kind is nn.Identity:
            operands.append(None)
            continue
        parameters = own["_parameters"]
        if "bias" not in parameters:
            return None  # it is pruned, parametrized or a plain tensor
        weight, bias = parameters.get("weight"), parameters["bias"]
        if kind is not AddBias and (weight is None or (kind is not nn.Linear and kind is not DenseBilinear)):
            return None
        operands.append(weight)
    operands.append(bias)
    return operands


def obstacle(parts: dict[str, nn.Module], device: torch.device) -> str | None:
    """Why these inner layers have to be called one by one; None where they need not."""
    if torch.nn.modules.module._has_any_global_hook():
        return "a global module hook is set"
    stored = set()
    *inner, _ = parts
    for name, layer in parts.items():
        if type(layer) not in _KINDS:
            return f"`{name}` is a {type(layer).__name__}"
        if name in inner and getattr(layer, "bias", None) is not None:
            return f"`{name}` has a bias"
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
                return f"the fused kernels read int8, not {weight.format.name}"
            if weight.resident is not None or weight.backend != "torch" or getattr(layer, "integer", False):
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
