"""The tensors of a layer's inner modules, or the reason why these modules have to be called one by one."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..quantization import QuantizedTensor
from ._dense import DenseBilinear
from ._linear import AddBias, QuantizedLinear

_PLAIN = (nn.Linear, QuantizedLinear, DenseBilinear, AddBias, nn.Identity)  # modules that only multiply, or add a bias


class Operands(NamedTuple):
    """What an operation of `ops` takes besides the inputs.

    Attributes:
        weights: of the inner modules, in their order: `ops.Weight`, or None where a module has none.
        bias: (O,), of the last module.
    """

    weights: list[Any]
    bias: Tensor | None


def operands(modules: Mapping[str, Any], names: Sequence[str], identities: bool) -> Operands | str:
    """The tensors of the inner modules of these names, or the reason to call the modules instead.

    A user may wrap an inner module (hooks, parametrizations, LoRA, sharding, a `forward` set on the instance): then it
    does more than to multiply. Every call asks this, so tensors are read from the dicts where `nn.Module` keeps them: a
    lookup through its `__getattr__` takes as long as a small sum.

    Args:
        identities: whether the operation takes modules without a weight.
    """
    if torch.nn.modules.module._has_any_global_hook():
        return "a global module hook is set"
    weights: list[Any] = []
    bias: Tensor | None = None
    quantized = 0
    for name in names:
        if bias is not None:
            return f"`{names[len(weights) - 1]}` has a bias"
        module = modules[name]
        reason = reason_against(module)
        if reason is not None:
            return f"`{name}` {reason}"
        parameters = module._parameters
        weight = parameters["weight"] if "weight" in parameters else tensor_of(module, "weight")
        bias = parameters["bias"] if "bias" in parameters else tensor_of(module, "bias")
        weights.append(weight)
        if weight is None and not identities:
            return f"`{name}` has no weight"
        if isinstance(weight, QuantizedTensor):
            quantized += 1
            if module.integer:
                return f"`{name}` multiplies integers"
    if quantized and quantized != sum(weight is not None for weight in weights):
        return "some inner layers are quantized and some are not"
    return Operands(weights, bias)


def reason_against(module: nn.Module) -> str | None:
    """What the module does besides multiplying by its weight and adding its bias; None where it does nothing else."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "has hooks"
    if "forward" in own:
        return "has a `forward` of its own"
    return None if type(module) in _PLAIN else f"is a {type(module).__name__}"


def tensor_of(module: Any, name: str) -> Any:
    """A parameter of the module, or what takes its place: a `QuantizedTensor`, or any attribute of a wrapper."""
    parameters = module._parameters
    if name in parameters:
        return parameters[name]
    if name in module._modules:
        return module._modules[name]
    return None if type(module) in (nn.Identity, AddBias) else getattr(module, name, None)
