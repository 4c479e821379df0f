"""The fused kernels for pairs as operators of torch, as `_dispatch` has those for rows."""

from typing import Any

import torch
from torch import Tensor

from .._cp import cp_of_pairs
from .._tucker import tucker_of_pairs
from ._operators import NAMESPACE, again, device_of, empty, operator, save


@operator("cp_pairs")
def fused_cp_pairs(
    p: Tensor,  # (B, L1, R)
    q: Tensor,  # (B, L2, R)
    out: Tensor,  # (O, R), floating or int8
    bias: Tensor | None,  # (O,)
    sigma: Tensor | None,  # (R,), float32
) -> Tensor:  # (B, L1, L2, O)
    """(σ * p_k * q_l) Cᵀ + b."""
    from ._cp_pairs import launch_cp_pairs

    with device_of(p):
        return launch_cp_pairs(p.contiguous(), q.contiguous(), out, sigma, bias)


@operator("cp_pairs_backward")
def fused_cp_pairs_backward(
    dy: Tensor,  # (B, L1, L2, O)
    p: Tensor,
    q: Tensor,
    out: Tensor,
    sigma: Tensor | None,
    first: bool,
    second: bool,
    weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of p, q and out; those not wanted are empty."""
    from ._cp_pairs import launch_cp_pairs_gradient, launch_cp_pairs_weight_gradient

    p, q = p.contiguous(), q.contiguous()
    with device_of(dy):
        return (
            launch_cp_pairs_gradient(dy, q, out, sigma) if first else empty(p),
            launch_cp_pairs_gradient(dy.transpose(1, 2), p, out, sigma) if second else empty(p),
            launch_cp_pairs_weight_gradient(dy, p, q, sigma) if weight else empty(p),
        )


@operator("tucker_pairs")
def fused_tucker_pairs(
    t: Tensor,  # (B, L1, R_o, R_j)
    q: Tensor,  # (B, L2, R_j)
    out: Tensor,  # (O, R_o), floating or int8
    bias: Tensor | None,  # (O,)
) -> Tensor:  # (B, L1, L2, O)
    """(t_k q_l) Uᵀ + b, where R_o fits a program."""
    from ._tucker_pairs import launch_tucker_pairs

    with device_of(q):
        return launch_tucker_pairs(t.contiguous(), q.contiguous(), out, bias)


@operator("tucker_pairs_backward")
def fused_tucker_pairs_backward(
    dy: Tensor,  # (B, L1, L2, O)
    t: Tensor,
    q: Tensor,
    out: Tensor,
    first: bool,
    second: bool,
    weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of t, q and out; those not wanted are empty."""
    from ._tucker_pairs import (
        launch_tucker_pairs_first_gradient,
        launch_tucker_pairs_second_gradient,
        launch_tucker_pairs_weight_gradient,
    )

    t, q = t.contiguous(), q.contiguous()
    with device_of(dy):
        return (
            launch_tucker_pairs_first_gradient(dy, q, out) if first else empty(q),
            launch_tucker_pairs_second_gradient(dy, t, out) if second else empty(q),
            launch_tucker_pairs_weight_gradient(dy, t, q) if weight else empty(q),
        )


@fused_cp_pairs.register_fake
def _(p: Tensor, q: Tensor, out: Tensor, bias: Any, sigma: Any) -> Tensor:
    return p.new_empty(p.shape[0], p.shape[1], q.shape[1], out.shape[0])


@fused_tucker_pairs.register_fake
def _(t: Tensor, q: Tensor, out: Tensor, bias: Any) -> Tensor:
    return q.new_empty(t.shape[0], t.shape[1], q.shape[1], out.shape[0])


@fused_cp_pairs_backward.register_fake
def _(
    dy: Tensor, p: Tensor, q: Tensor, out: Tensor, sigma: Any, first: bool, second: bool, weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q, (p, q, out), (first, second, weight))


@fused_tucker_pairs_backward.register_fake
def _(
    dy: Tensor, t: Tensor, q: Tensor, out: Tensor, first: bool, second: bool, weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q, (t, q, out), (first, second, weight))


def _like(
    like: Tensor, tensors: tuple[Tensor, Tensor, Tensor], wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    found = [like.new_empty(t.shape) if want else empty(like) for t, want in zip(tensors, wanted, strict=True)]
    return found[0], found[1], found[2]


def _cp_pairs_backward(context: Any, dy: Tensor) -> Any:
    p, q, out, bias, sigma = context.saved_tensors
    wanted = context.needs_input_grad
    if torch.is_grad_enabled():
        return again(cp_of_pairs, [p, q, out, bias, sigma], wanted, dy)
    found = fused_cp_pairs_backward(dy, p, q, out, sigma, *wanted[:3])
    gradients = [gradient if want else None for gradient, want in zip(found, wanted, strict=False)]
    return *gradients, dy.sum((0, 1, 2)) if wanted[3] else None, None


def _tucker_pairs_backward(context: Any, dy: Tensor) -> Any:
    t, q, out, bias = context.saved_tensors
    wanted = context.needs_input_grad
    if torch.is_grad_enabled():
        return again(tucker_of_pairs, [t, q, out, bias], wanted, dy)
    found = fused_tucker_pairs_backward(dy, t, q, out, *wanted[:3])
    gradients = [gradient if want else None for gradient, want in zip(found, wanted, strict=False)]
    return *gradients, dy.sum((0, 1, 2)) if wanted[3] else None


torch.library.register_autograd(f"{NAMESPACE}::cp_pairs", _cp_pairs_backward, setup_context=save)
torch.library.register_autograd(f"{NAMESPACE}::tucker_pairs", _tucker_pairs_backward, setup_context=save)
