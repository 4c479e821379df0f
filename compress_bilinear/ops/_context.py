"""The one place that asks what surrounds a call: a graph being recorded, transforms, autocast, a gradient wanted."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_Operation = TypeVar("_Operation", bound=Callable[..., Tensor])


def traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit records a graph, which has to hold for other batches too."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def has_rows(leading: Sequence[int], rows: int) -> bool:
    """Whether a call with these leading sizes has so many rows; a graph holds for any number, and is taken to."""
    return traced() or math.prod(leading) >= rows


def transformed() -> bool:
    """Whether a transform of torch.func (vmap, grad, jvp) or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def observed() -> bool:
    """Whether a dispatch mode (of fake tensors, of a FLOP counter) sees every operator."""
    return torch._C._len_torch_dispatch_stack() > 0


def gradient_wanted(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def recorded(device_type: str) -> bool:
    """Whether operators are recorded, transformed, seen or cast by something that knows none but torch's own."""
    return traced() or transformed() or observed() or autocast_enabled(device_type)


def only_values(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors gives values and nothing else, so that it may write in place."""
    return not (traced() or transformed() or gradient_wanted(*tensors))


def plain(*tensors: Tensor | None) -> bool:
    """Whether all tensors are ordinary ones: a subclass may lack operators, or place outputs itself."""
    return all(tensor is None or type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on; the meta device has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_dtype(device_type: str, *tensors: Tensor | None) -> torch.dtype | None:
    """The dtype in which autocast runs a product of these tensors; None where it is off or finds float64."""
    if not autocast_enabled(device_type) or any(t is not None and t.dtype == torch.float64 for t in tensors):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off, for operands that are in their final dtype already."""
    return torch.autocast(device_type, enabled=False) if autocast_enabled(device_type) else nullcontext()


def follows_autocast(operation: _Operation) -> _Operation:
    """Give `operation` the dtype rule of a matrix product under autocast.

    Floating operands are cast to autocast's dtype, and the operation runs without autocast. `sigma` keeps its dtype.
    With an operand in float64 nothing is cast, as in torch.
    """

    @functools.wraps(operation)
    def with_rule(input1: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input1.is_cpu and not torch.is_autocast_enabled("cpu"):  # at once, for calls may be short
            return operation(input1, *args, **kwargs)
        device = input1.device.type
        dtype = autocast_dtype(device, *(v for v in (input1, *args, *kwargs.values()) if isinstance(v, Tensor)))
        if dtype is None:
            return operation(input1, *args, **kwargs)

        def in_dtype(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        named = {name: value if name == "sigma" else in_dtype(value) for name, value in kwargs.items()}
        with without_autocast(device):
            return operation(*map(in_dtype, (input1, *args)), **named)

    return cast(_Operation, with_rule)


def reason_for_plain_operators(*tensors: Tensor | None) -> str | None:
    """Why a call on these tensors needs operators that torch can transform; None where it does not."""
    if torch.compiler.is_compiling():
        return None
    if transformed():
        return "a transform of torch.func or forward-mode differentiation is active"
    return None if plain(*tensors) else "an operand is of a subclass of Tensor"
