"""The fused kernels as operators of torch (`torch.ops.compress_bilinear`), with shapes, gradients and autocast.

Triton is loaded at the first call of a kernel, here and nowhere else. Gradients of gradients, which are rare, go
through the composed path, whose operators torch can differentiate.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.nn.functional import linear

from .._choice import cp_splits, fits_one_kernel
from .._cp import composed_cp
from .._dense import composed_dense
from .._gemm import values
from .._tucker import composed_tucker

NAMESPACE = "compress_bilinear"


_FUNCTIONS: dict[CustomOpDef, Callable[..., Any]] = {}  # what each operator runs


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    def registered(function: Callable[..., Any]) -> CustomOpDef:
        operator = torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=())(function)
        _FUNCTIONS[operator] = function
        return operator

    return registered


def launched(operator: CustomOpDef, *args: Any) -> Tensor:
    """What an operator gives; past torch's dispatcher, which costs two launches, where nothing needs to be recorded."""
    recorded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if not recorded and torch.is_grad_enabled():
        recorded = any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
    output: Tensor = operator(*args) if recorded else _FUNCTIONS[operator](*args)
    return output


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@operator("dense")
def fused_dense(
    x1: Tensor,  # (N, I)
    x2: Tensor,  # (N, J)
    weight: Tensor,  # (O, I, J), floating or int8
    scale: Tensor | None,  # float32, broadcastable to `weight`
) -> Tensor:  # (N, O)
    """y_no = Σ_ij x1_ni W_oij x2_nj."""
    from ._dense import launch_dense

    with device_of(x1):
        return launch_dense(x1, x2, weight, scale)


@operator("dense_weight_gradient")
def fused_weight_gradient(dy: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    """Σ_n dy_no x1_ni x2_nj, (O, I, J)."""
    from ._dense import launch_weight_gradient

    with device_of(x1):
        return launch_weight_gradient(dy, x1, x2)


@operator("cp")
def fused_cp(
    x1: Tensor,  # (N, I)
    x2: Tensor,  # (N, J)
    in1: Tensor,  # (R, I), floating or int8
    in2: Tensor,  # (R, J)
    out: Tensor,  # (O, R)
    bias: Tensor | None,  # (O,)
    sigma: Tensor | None,  # (R,), float32
) -> Tensor:  # (N, O)
    """(σ * (x1 Aᵀ) * (x2 Bᵀ)) Cᵀ + b."""
    from ._cp import launch_forward, launch_product

    with device_of(x1):
        if cp_splits(x1.shape[0], in1.shape[0], out.shape[0]):
            return linear(launch_product(x1, x2, in1, in2, sigma), values(out, x1.dtype), bias)
        return launch_forward(x1, x2, in1, in2, out, sigma, bias)


@operator("cp_backward")
def fused_cp_backward(
    dy: Tensor,  # (N, O)
    x1: Tensor,
    x2: Tensor,
    in1: Tensor,
    in2: Tensor,
    out: Tensor,
    sigma: Tensor | None,
    inputs: bool,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x1, x2, in1, in2 and out; those not wanted are empty."""
    from ._cp import MOST_IN, launch_backward

    narrow = max(x1.shape[1], x2.shape[1]) <= MOST_IN
    stored = weights or not narrow
    with device_of(x1):
        dx1, dx2, h, dp, dq = launch_backward(dy, x1, x2, in1, in2, out, sigma, inputs, stored)
    if inputs and (dx1 is None or dx2 is None):
        assert dp is not None and dq is not None  # noqa: PT018
        dx1, dx2 = dp @ values(in1, x1.dtype), dq @ values(in2, x1.dtype)
    if not (weights and dp is not None and dq is not None and h is not None):
        return or_empty(dx1, x1), or_empty(dx2, x1), empty(x1), empty(x1), empty(x1)
    return or_empty(dx1, x1), or_empty(dx2, x1), dp.T @ x1, dq.T @ x2, dy.T @ h


@operator("tucker")
def fused_tucker(
    x1: Tensor,  # (N, I)
    x2: Tensor,  # (N, J)
    in1: Tensor,  # (R_i, I), floating or int8
    in2: Tensor,  # (R_j, J)
    core: Tensor,  # (R_o, R_i, R_j)
    out: Tensor,  # (O, R_o)
    bias: Tensor | None,  # (O,)
    scale: Tensor | None,  # of an int8 core
) -> Tensor:  # (N, O)
    """G(x1 Aᵀ, x2 Bᵀ) Uᵀ + b, where R_o and R_j fit a program."""
    from ._tucker import launch_tucker

    with device_of(x1):
        return launch_tucker(x1, x2, in1, in2, core, out, bias, scale)


@fused_dense.register_fake
def _(x1: Tensor, x2: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    return x1.new_empty(x1.shape[0], weight.shape[0])


@fused_weight_gradient.register_fake
def _(dy: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    return x1.new_empty(dy.shape[1], x1.shape[1], x2.shape[1])


@fused_cp.register_fake
def _(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, bias: Any, sigma: Any) -> Tensor:
    return x1.new_empty(x1.shape[0], out.shape[0])


@fused_cp_backward.register_fake
def _(
    dy: Tensor, x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, sigma: Any, inputs: bool, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like = [x1.new_empty(x.shape) if inputs else empty(x1) for x in (x1, x2)]
    like += [x1.new_empty(factor.shape) if weights else empty(x1) for factor in (in1, in2, out)]
    return like[0], like[1], like[2], like[3], like[4]


@fused_tucker.register_fake
def _(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, core: Tensor, out: Tensor, bias: Any, scale: Any) -> Tensor:
    return x1.new_empty(x1.shape[0], out.shape[0])


def empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return empty(like) if tensor is None else tensor


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def again(composed: Callable[..., Tensor], operands: list[Tensor | None], wanted: Sequence[bool], dy: Tensor) -> Any:
    """The gradients by the composed path, themselves differentiable."""
    # apart from each other and from what they were computed by, whose gradients are autograd's to sum
    operands = [None if tensor is None else tensor.view_as(tensor) for tensor in operands]
    chosen = [tensor for tensor, want in zip(operands, wanted, strict=True) if want and tensor is not None]
    found = iter(torch.autograd.grad(composed(*operands), chosen, dy, create_graph=True))
    return tuple(
        next(found) if want and tensor is not None else None for tensor, want in zip(operands, wanted, strict=True)
    )


def _dense_backward(context: Any, dy: Tensor) -> Any:
    x1, x2, weight, scale = context.saved_tensors
    wanted = context.needs_input_grad
    if torch.is_grad_enabled():

        def composed(x1: Tensor, x2: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
            return composed_dense(x1, x2, weight, None, scale, None)

        return again(composed, [x1, x2, weight, scale], wanted, dy)
    return *dense_gradients(dy, x1, x2, weight, scale, wanted), None


def dense_gradients(
    dy: Tensor,  # (N, O)
    x1: Tensor,  # (N, I)
    x2: Tensor,  # (N, J)
    weight: Tensor,  # (O, I, J)
    scale: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x1, x2 and weight: the inputs' are dense bilinears of the weight with its axes in another order."""

    def turned(first: Tensor, second: Tensor, *axes: int) -> Tensor:
        return fused_dense(first, second, weight.permute(axes), None if scale is None else scale.permute(axes))

    return (
        turned(dy, x2, 1, 0, 2) if wanted[0] else None,
        turned(dy, x1, 2, 0, 1) if wanted[1] else None,
        fused_weight_gradient(dy, x1, x2) if wanted[2] else None,
    )


def _cp_backward(context: Any, dy: Tensor) -> Any:
    x1, x2, in1, in2, out, bias, sigma = context.saved_tensors
    wanted = context.needs_input_grad
    if torch.is_grad_enabled():
        return again(composed_cp, [x1, x2, in1, in2, out, bias, sigma], wanted, dy)
    found = fused_cp_backward(dy, x1, x2, in1, in2, out, sigma, any(wanted[:2]), any(wanted[2:5]))
    gradients = [gradient if want else None for gradient, want in zip(found, wanted, strict=False)]
    return *gradients, dy.sum(0) if wanted[5] else None, None


def _tucker_backward(context: Any, dy: Tensor) -> Any:
    x1, x2, in1, in2, core, out, _, core_scale = context.saved_tensors
    wanted = context.needs_input_grad
    if torch.is_grad_enabled():
        return again(composed_tucker, list(context.saved_tensors), wanted, dy)
    in1, in2, out = (values(factor, x1.dtype) for factor in (in1, in2, out))
    p, q = linear(x1, in1), linear(x2, in2)
    dz = dy @ out
    dp, dq, dcore = dense_gradients(dz, p, q, core, core_scale, [any(wanted[0:3:2]), any(wanted[1:4:2]), wanted[4]])
    return (
        dp @ in1 if wanted[0] and dp is not None else None,
        dq @ in2 if wanted[1] and dq is not None else None,
        dp.T @ x1 if wanted[2] and dp is not None else None,
        dq.T @ x2 if wanted[3] and dq is not None else None,
        dcore,
        dy.T @ fused_dense(p, q, core, core_scale) if wanted[5] else None,
        dy.sum(0) if wanted[6] else None,
        None,
    )


torch.library.register_autograd(f"{NAMESPACE}::dense", _dense_backward, setup_context=save)
torch.library.register_autograd(f"{NAMESPACE}::cp", _cp_backward, setup_context=save)
torch.library.register_autograd(f"{NAMESPACE}::tucker", _tucker_backward, setup_context=save)

__all__ = [
    "fits_one_kernel",
    "fused_cp",
    "fused_dense",
    "fused_tucker",
    "launched",
    "values",
]
