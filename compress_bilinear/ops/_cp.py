"""CP as three linear maps around a product, on any device and in any dtype: what the fused kernels spell faster."""

import math

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from ._dense import block_runner, is_tracing
from ._gemm import LEAST_PRODUCTS, linear, linear_times, values

_PAIR_BLOCK = 2**20  # elements of the product of the projections that pairs hold at once
_PAIR_BLOCK_GRAD = 2**22  # where each block is recomputed in the backward, which has an overhead of its own


def small_cp(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J)
    in1: Tensor,  # (R, I), in the inputs' dtype
    in2: Tensor,  # (R, J)
    out: Tensor,  # (O, R)
    bias: Tensor | None,  # (O,)
) -> Tensor | None:  # (..., O)
    """(x1 Aᵀ * x2 Bᵀ) Cᵀ + b in as few calls as can be; None where the call is not small or not on a CPU.

    Written out, for at one row each look at a tensor costs a hundredth of the products. None too where the inputs'
    leading dimensions differ.
    """
    if not input1.is_cpu or torch.compiler.is_compiling() or torch._C._is_tracing():
        return None
    rank, width = in1.shape
    count = input1.numel()
    if count * rank >= LEAST_PRODUCTS or count * out.numel() >= LEAST_PRODUCTS * width or input1.dtype != in1.dtype:
        return None
    left, right = plain_linear(input1, in1), plain_linear(input2, in2)
    return plain_linear(left * right, out, bias) if left.shape == right.shape else None


def composed_cp(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J)
    in1: Tensor,  # (R, I), floating, or int8 of step 2⁻⁷
    in2: Tensor,  # (R, J)
    out: Tensor,  # (O, R)
    bias: Tensor | None,  # (O,)
    sigma: Tensor | None,  # (R,), float32
) -> Tensor:  # (..., O)
    """(σ * (x1 Aᵀ) * (x2 Bᵀ)) Cᵀ + b."""
    return linear(_product(input1, input2, in1, in2, sigma), values(out, input1.dtype), bias)


def composed_cp_pairs(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J)
    in1: Tensor,  # (R, I)
    in2: Tensor,  # (R, J)
    out: Tensor,  # (O, R)
    bias: Tensor | None,  # (O,)
    sigma: Tensor | None,  # (R,), float32
) -> Tensor:  # (..., L1, L2, O)
    """The same for all pairs."""
    left, right = linear(input1, values(in1, input1.dtype)), linear(input2, values(in2, input2.dtype))
    return cp_of_pairs(left, right, out, bias, sigma)


def cp_of_pairs(
    left: Tensor,  # (..., L1, R)
    right: Tensor,  # (..., L2, R)
    out: Tensor,  # (O, R), floating, or int8 of step 2⁻⁷
    bias: Tensor | None,  # (O,)
    sigma: Tensor | None,  # (R,), float32
) -> Tensor:  # (..., L1, L2, O)
    """All pairs of projected inputs; the product of the projections is held for some of them at once."""
    out = values(out, right.dtype)
    if sigma is not None:
        left = _wide(left) * sigma  # in float32, with the product
    left, right = left.unsqueeze(-2), right.unsqueeze(-3)
    per_row = max(1, math.prod(right.shape))
    most = _PAIR_BLOCK_GRAD if torch.is_grad_enabled() else _PAIR_BLOCK
    blocks = (left,) if is_tracing() else left.split(max(1, most // per_row), dim=-3)
    run = block_runner(len(blocks) > 1, left, right, out)
    pieces = [run(_linear_of_product, block, right, out, bias) for block in blocks]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-3)


def _linear_of_product(left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    return linear((left * right).to(out.dtype), out, bias)


def _product(input1: Tensor, input2: Tensor, in1: Tensor, in2: Tensor, sigma: Tensor | None) -> Tensor:
    left = linear(input1, values(in1, input1.dtype))
    if sigma is None and in2.is_floating_point():
        return linear_times(input2, in2, left)
    right = linear(input2, values(in2, input2.dtype))
    product = _wide(left) * right
    return (product if sigma is None else product * sigma).to(input1.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
