"""The exact dense bilinear of a small call on a CPU, where each look at a tensor costs a hundredth of the products."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from ._gemm import has_slow_mkl

_PAIRS = 2**18  # elements of x1 ⊗ x2 up to which a call is small
_PRODUCTS = 2**21  # and its multiply-adds, unless it has
_FEW_ROWS = 8
_ROW_PAIRS = 2**22  # elements of x1 ⊗ x2 up to which a single row, which only reads the weight, is a small call
_LEAST_OUT = 4  # outputs from which a small call takes "outer"
_LYING = 2**19  # elements of T = x1 W_o up to which, with the slices as they lie, it is fastest where MKL multiplies


def small_dense(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J)
    weight: Tensor,  # (O, I, J)
    bias: Tensor | None,  # (O,)
) -> Tensor | None:  # (..., O)
    """y_o = x1ᵀ W_o x2 + b_o in as few calls as can be, None where the call is not small or not on a CPU.

    None too where the inputs' sizes are not those of the weight, or their leading dimensions differ, or the bias has
    another dtype.
    """
    if not input1.is_cpu or torch.compiler.is_compiling() or torch._C._is_tracing():
        return None
    (out, in1, in2), shape1, shape2 = weight.shape, input1.shape, input2.shape
    flat = len(shape1) == len(shape2) == 2
    if flat:  # slices of a shape are slow
        rows, width = shape1
        if width != in1 or shape2[1] != in2 or shape2[0] != rows:
            return None
    else:
        if not shape1 or shape1[-1] != in1 or shape2 != (*shape1[:-1], in2):
            return None
        rows = shape1[:-1].numel()
    autocast = torch.is_autocast_enabled("cpu")
    if autocast:
        dtype = torch.get_autocast_dtype("cpu")
    else:
        dtype = weight.dtype
        if bias is not None and bias.dtype != dtype:
            return None
        lying = flat and (rows > 1 or out < _LEAST_OUT) and 0 < out * rows * min(in1, in2) <= _LYING
        if lying and input1.dtype == input2.dtype == dtype == torch.float32 and not _wants_more():
            return _lying(input1, input2, weight, bias)
    count = rows * in1 * in2  # of x1 ⊗ x2
    if not 0 < count <= _PAIRS:
        if rows != 1 or not 0 < count <= _ROW_PAIRS or out < _LEAST_OUT or not weight.is_contiguous():
            return None
    elif count * out > _PRODUCTS and rows > _FEW_ROWS:
        return None
    if out >= _LEAST_OUT and dtype != torch.float16:  # where x1 ⊗ x2 could overflow
        if not flat:
            return linear((input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2), weight.flatten(1), bias)
        if rows == 1:  # fewer views
            return linear((input1.t() * input2).reshape(1, -1), weight.flatten(1), bias)
        return linear((input1.unsqueeze(2) * input2.unsqueeze(1)).flatten(1), weight.flatten(1), bias)
    if not flat or autocast:  # which would leave the bias as it is
        return None
    product = linear(input2, weight.flatten(0, 1)).view(-1, out, in1)
    output = torch.bmm(product, input1.unsqueeze(2)).squeeze(2)
    return output if bias is None else output + bias


def _lying(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_ij x1_ni W_oij x2_nj + b_o, the wider input first, by one batched product that wants no copy of the weight."""
    _, in1, in2 = weight.shape
    if in1 < in2:
        input1, input2, weight = input2, input1, weight.mT
    output = lying_products(input1, input2, weight).contiguous()
    return output if bias is None else output.add_(bias)


def lying_products(
    rows1: Tensor,  # (N, I)
    rows2: Tensor,  # (N, J)
    weight: Tensor,  # (O, I, J)
) -> Tensor:  # (N, O), turned
    """Σ_ij x1_ni W_oij x2_nj by x1 W_o: not `matmul`, which copies a weight that requires a gradient elsewhere."""
    return torch.bmm(rows1.expand(len(weight), -1, -1), weight).mul_(rows2).sum(-1).t()


def _wants_more() -> bool:
    """Whether more than the output might be asked for, or MKL is slow."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or has_slow_mkl()
    )
