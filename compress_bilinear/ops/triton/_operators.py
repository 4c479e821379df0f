"""The fused kernels as operators of torch, with what graphs and gradients need.

A launcher computes grids and splits from sizes in Python, so each is one opaque operator: traced as a Triton operator
of torch, its graph would be tied to the sizes that it was traced with. Triton is loaded at the first call of a kernel,
here and nowhere else. Gradients of gradients, which are rare, go through the composed path, which torch can
differentiate.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .._choice import cp_splits
from .._context import gradient_wanted, observed
from .._cp import composed_cp, cp_of_pairs
from .._dense import composed_dense
from .._gemm import decode_factor
from .._tucker import composed_tucker, tucker_of_pairs

NAMESPACE = "compress_bilinear"

Gradients = Sequence[Tensor | None]


class Operator:
    """A launcher as an operator of torch.

    A call goes past torch's dispatcher, which costs two launches, where nothing needs to be recorded.

    Attributes:
        registered: the operator.
        launch: the Python function that it runs.
    """

    def __init__(self, name: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.launch = launch
        self.registered = torch.library.custom_op(f"{NAMESPACE}::{name}", launch, mutates_args=())
        self.registered.register_fake(fake)

    def __call__(self, *args: Any) -> Any:
        recorded = torch.compiler.is_compiling() or observed()
        if recorded or gradient_wanted(*(arg for arg in args if isinstance(arg, Tensor))):
            return self.registered(*args)
        return self.launch(*args)


def operator(
    name: str,
    fake: Callable[..., Any],
    gradients: Callable[..., Gradients] | None = None,
    composed: Callable[..., Tensor] | None = None,
) -> Callable[[Callable[..., Any]], Operator]:
    """Make a launcher an `Operator`.

    Args:
        fake: empty outputs of the right shape and dtype, for the launcher's arguments.
        gradients: for which arguments gradients are wanted, the output's gradient and the arguments -> a gradient or
            None for each of the first arguments; the others have none.
        composed: the same function of the same arguments, which torch can differentiate twice.
    """

    def register(function: Callable[..., Any]) -> Operator:
        @functools.wraps(function)
        def launch(*args: Any) -> Any:
            if not args[0].is_cuda:
                return function(*args)
            with torch.cuda.device(args[0].device):  # Triton launches on the current device
                return function(*args)

        made = Operator(name, launch, fake)
        if gradients is not None and composed is not None:
            backward = functools.partial(_backward, gradients, composed)
            made.registered.register_autograd(backward, setup_context=_save)
        return made

    return register


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(
    gradients: Callable[..., Gradients], composed: Callable[..., Tensor], context: Any, dy: Tensor
) -> Gradients:
    operands, wanted = context.saved_tensors, context.needs_input_grad
    if torch.is_grad_enabled():
        return _composed_gradients(composed, operands, wanted, dy)
    computed = gradients(wanted, dy, *operands)
    kept = [gradient if want else None for gradient, want in zip(computed, wanted, strict=False)]
    return (*kept, *[None] * (len(operands) - len(kept)))


def _composed_gradients(
    composed: Callable[..., Tensor], operands: Sequence[Tensor | None], wanted: Sequence[bool], dy: Tensor
) -> Gradients:
    """The gradients by the composed path, which are differentiable."""
    # views: apart from each other and from what they were computed by, whose gradients autograd sums itself
    operands = [None if tensor is None else tensor.view_as(tensor) for tensor in operands]
    chosen = [tensor for tensor, want in zip(operands, wanted, strict=True) if want and tensor is not None]
    computed = iter(torch.autograd.grad(composed(*operands), chosen, dy, create_graph=True))
    return tuple(next(computed) if want and t is not None else None for t, want in zip(operands, wanted, strict=True))


def _empty(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor of this shape; of no entries without one, as operators return for a gradient not wanted."""
    return like.new_empty(shape or 0)


def _like(like: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(_empty(like, *t.shape) if want else _empty(like) for t, want in zip(tensors, wanted, strict=True))


def _dense_gradients(
    wanted: Sequence[bool], dy: Tensor, x1: Tensor, x2: Tensor, weight: Tensor, scale: Tensor | None
) -> Gradients:
    """The inputs' gradients are dense bilinears of the weight with its axes in another order."""

    def permuted(first: Tensor, second: Tensor, *axes: int) -> Tensor:
        return fused_dense(first, second, weight.permute(axes), None if scale is None else scale.permute(axes))

    return (
        permuted(dy, x2, 1, 0, 2) if wanted[0] else None,
        permuted(dy, x1, 2, 0, 1) if wanted[1] else None,
        fused_weight_gradient(dy, x1, x2) if wanted[2] else None,
    )


@operator(
    "dense",
    lambda x1, x2, weight, scale: _empty(x1, x1.shape[0], weight.shape[0]),
    _dense_gradients,
    lambda x1, x2, weight, scale: composed_dense(x1, x2, weight, None, scale, None),
)
def fused_dense(
    x1: Tensor,  # (N, I)
    x2: Tensor,  # (N, J)
    weight: Tensor,  # (O, I, J), floating or int8
    scale: Tensor | None,  # float32, broadcastable to `weight`
) -> Tensor:  # (N, O)
    """y_no = Σ_ij x1_ni W_oij x2_nj."""
    from ._dense import launch_dense

    return launch_dense(x1, x2, weight, scale)


@operator("dense_weight_gradient", lambda dy, x1, x2: _empty(x1, dy.shape[1], x1.shape[1], x2.shape[1]))
def fused_weight_gradient(dy: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    """Σ_n dy_no x1_ni x2_nj, (O, I, J)."""
    from ._dense import launch_weight_gradient

    return launch_weight_gradient(dy, x1, x2)


def _cp_gradients(wanted: Sequence[bool], dy: Tensor, *operands: Any) -> Gradients:
    x1, x2, in1, in2, out, _, sigma = operands
    first = fused_cp_backward(dy, x1, x2, in1, in2, out, sigma, any(wanted[:2]), any(wanted[2:5]))
    return *first, dy.sum(0) if wanted[5] else None


@operator("cp", lambda x1, x2, in1, in2, out, *_: _empty(x1, x1.shape[0], out.shape[0]), _cp_gradients, composed_cp)
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

    if cp_splits(x1.shape[0], in1.shape[0], out.shape[0]):
        return linear(launch_product(x1, x2, in1, in2, sigma), decode_factor(out, x1.dtype), bias)
    return launch_forward(x1, x2, in1, in2, out, sigma, bias)


def _cp_backward_like(
    dy: Tensor, x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, sigma: Any, inputs: bool, weights: bool
) -> tuple[Tensor, ...]:
    return _like(x1, (x1, x2, in1, in2, out), (inputs, inputs, weights, weights, weights))


@operator("cp_backward", _cp_backward_like)
def fused_cp_backward(
    dy: Tensor, x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, sigma: Tensor | None,
    inputs: bool, weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x1, x2, in1, in2 and out; those not wanted are empty."""
    from ._cp import MOST_IN, launch_backward

    stored = weights or max(x1.shape[1], x2.shape[1]) > MOST_IN
    launched: tuple[Any, ...] = launch_backward(dy, x1, x2, in1, in2, out, sigma, inputs, stored)
    dx1, dx2, h, dp, dq = launched
    if inputs and dx1 is None:  # too wide for the kernel
        dx1, dx2 = dp @ decode_factor(in1, x1.dtype), dq @ decode_factor(in2, x1.dtype)
    by_weights = (dp.T @ x1, dq.T @ x2, dy.T @ h) if weights else [_empty(x1) for _ in range(3)]
    return (dx1, dx2, *by_weights) if inputs else (_empty(x1), _empty(x1), *by_weights)


def _tucker_gradients(wanted: Sequence[bool], dy: Tensor, *operands: Any) -> Gradients:
    x1, x2, in1, in2, core, out, _, scale = operands
    in1, in2, out = (decode_factor(factor, x1.dtype) for factor in (in1, in2, out))
    p, q = linear(x1, in1), linear(x2, in2)
    inner = [any(wanted[0:3:2]), any(wanted[1:4:2]), wanted[4]]
    dp, dq, dcore = _dense_gradients(inner, dy @ out, p, q, core, scale)
    return (
        dp @ in1 if wanted[0] and dp is not None else None,
        dq @ in2 if wanted[1] and dq is not None else None,
        dp.T @ x1 if wanted[2] and dp is not None else None,
        dq.T @ x2 if wanted[3] and dq is not None else None,
        dcore,
        dy.T @ fused_dense(p, q, core, scale) if wanted[5] else None,
        dy.sum(0) if wanted[6] else None,
    )


@operator(
    "tucker",
    lambda x1, x2, in1, in2, core, out, *_: _empty(x1, x1.shape[0], out.shape[0]),
    _tucker_gradients,
    composed_tucker,
)
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

    return launch_tucker(x1, x2, in1, in2, core, out, bias, scale)


def _cp_pairs_gradients(wanted: Sequence[bool], dy: Tensor, *operands: Any) -> Gradients:
    p, q, out, _, sigma = operands
    first = fused_cp_pairs_backward(dy, p, q, out, sigma, *wanted[:3])
    return *first, dy.sum((0, 1, 2)) if wanted[3] else None


@operator(
    "cp_pairs",
    lambda p, q, out, *_: _empty(p, *p.shape[:2], q.shape[1], out.shape[0]),
    _cp_pairs_gradients,
    cp_of_pairs,
)
def fused_cp_pairs(
    p: Tensor,  # (B, L1, R)
    q: Tensor,  # (B, L2, R)
    out: Tensor,  # (O, R), floating or int8
    bias: Tensor | None,  # (O,)
    sigma: Tensor | None,  # (R,), float32
) -> Tensor:  # (B, L1, L2, O)
    """(σ * p_k * q_l) Cᵀ + b."""
    from ._cp_pairs import launch_cp_pairs

    return launch_cp_pairs(p.contiguous(), q.contiguous(), out, sigma, bias)


def _pairs_backward_like(dy: Tensor, left: Tensor, right: Tensor, out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _like(right, (left, right, out), rest[-3:])


@operator("cp_pairs_backward", _pairs_backward_like)
def fused_cp_pairs_backward(
    dy: Tensor, p: Tensor, q: Tensor, out: Tensor, sigma: Tensor | None, first: bool, second: bool, weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of p, q and out; those not wanted are empty."""
    from ._cp_pairs import launch_cp_pairs_gradient, launch_cp_pairs_weight_gradient

    p, q = p.contiguous(), q.contiguous()
    return (
        launch_cp_pairs_gradient(dy, q, out, sigma) if first else _empty(p),
        launch_cp_pairs_gradient(dy.transpose(1, 2), p, out, sigma) if second else _empty(p),
        launch_cp_pairs_weight_gradient(dy, p, q, sigma) if weight else _empty(p),
    )


def _tucker_pairs_gradients(wanted: Sequence[bool], dy: Tensor, *operands: Any) -> Gradients:
    t, q, out, _ = operands
    first = fused_tucker_pairs_backward(dy, t, q, out, *wanted[:3])
    return *first, dy.sum((0, 1, 2)) if wanted[3] else None


@operator(
    "tucker_pairs",
    lambda t, q, out, *_: _empty(q, *t.shape[:2], q.shape[1], out.shape[0]),
    _tucker_pairs_gradients,
    tucker_of_pairs,
)
def fused_tucker_pairs(
    t: Tensor,  # (B, L1, R_o, R_j)
    q: Tensor,  # (B, L2, R_j)
    out: Tensor,  # (O, R_o), floating or int8
    bias: Tensor | None,  # (O,)
) -> Tensor:  # (B, L1, L2, O)
    """(t_k q_l) Uᵀ + b, where R_o fits a program."""
    from ._tucker_pairs import launch_tucker_pairs

    return launch_tucker_pairs(t.contiguous(), q.contiguous(), out, bias)


@operator("tucker_pairs_backward", _pairs_backward_like)
def fused_tucker_pairs_backward(
    dy: Tensor, t: Tensor, q: Tensor, out: Tensor, first: bool, second: bool, weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of t, q and out; those not wanted are empty."""
    from . import _tucker_pairs as kernels

    t, q = t.contiguous(), q.contiguous()
    return (
        kernels.launch_tucker_pairs_first_gradient(dy, q, out) if first else _empty(q),
        kernels.launch_tucker_pairs_second_gradient(dy, t, out) if second else _empty(q),
        kernels.launch_tucker_pairs_weight_gradient(dy, t, q) if weight else _empty(q),
    )
