"""Products of integers: the inputs' rows are rounded to int8 in each call, and multiplied by an int8 weight."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from ..quantization import LEVELS, UNIT, QuantizedTensor, expand_scale
from ._blocks import joined, plus
from ._context import gradient_wanted, traced
from ._dense import composed_dense, contract
from ._stored import project, slabs

_LEAST = 2e-36  # stands for the largest magnitude of a row of zeros: 127 / _LEAST and the step are normal in float32


def int8_linear(
    input: Tensor,  # (..., I)
    weight: QuantizedTensor,  # (O, I), int8 in steps of 2⁻⁷
    bias: Tensor | None = None,  # (O,)
) -> Tensor:  # (..., O)
    """x Wᵀ + b by `torch._int_mm`. Rounding the inputs costs about 1% of the output.

    The gradient is that of the product without rounding, for which the weight is decoded slab by slab. Integers are
    padded to sizes that the kernel takes: on CUDA more than 16 rows, and multiples of 8.
    """
    return plus(_with_exact_gradient(lambda x: _product(x, weight.qdata), lambda x: project(x, weight), input), bias)


def int8_bilinear(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J)
    weight: QuantizedTensor,  # (O, I, J), int8
) -> Tensor:  # (..., O)
    """y_o = x1ᵀ W_o x2. The longer input's rows are rounded to int8, and multiplied as integers within each block.

    The rounding costs about 0.7% of the output. The gradient is that of the product without rounding. Besides inputs
    and output, a forward holds a block of products (`Tuning.block`), in int32 and in floating point, and the copy that
    a kernel makes of at most `Tuning.weight` of the weight's integers (or one output's).
    """
    return _with_exact_gradient(
        lambda x1, x2: _bilinear(x1, x2, weight), lambda x1, x2: composed_dense(x1, x2, weight), input1, input2
    )


def _with_exact_gradient(rounded: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """The value of `rounded`, a function of the inputs, with the gradient of `exact`."""
    if not gradient_wanted(*inputs):
        return rounded(*inputs)
    value = exact(*inputs)
    return value + (rounded(*(input.detach() for input in inputs)) - value.detach())


@torch.no_grad()
def _bilinear(input1: Tensor, input2: Tensor, stored: QuantizedTensor) -> Tensor:
    (out, in1, in2), weight, scale = stored.shape, stored.qdata, stored.scale
    assert scale is not None
    kept, first = input1, input2
    if in1 > in2:  # scales are of blocks along the longer axis, which is summed over first
        kept, first, weight, scale = input2, input1, weight.mT, scale.mT
    wide = torch.promote_types(first.dtype, torch.float32)
    qdata, step = _rounded_rows(first.reshape(-1, first.shape[-1]).to(wide))
    kept = kept.reshape(-1, kept.shape[-1]).to(wide) * step
    parts = [slice(None)] if traced() else slabs(stored)
    pieces = (contract(kept, qdata, weight[rows], scale[rows], block=_block) for rows in parts)
    return joined(pieces, out, 1, not traced()).to(input1.dtype).reshape(*input1.shape[:-1], out)


def _block(kept: Tensor, qdata: Tensor, part: Tensor, scale: Tensor) -> Tensor:
    """(n, a), (n, b) int8, (o, a, b) int8, (o, a or fewer, blocks) -> (n, o)."""
    outputs, width, _ = part.shape
    steps = expand_scale(scale, (outputs, width, scale.shape[2])).to(kept.dtype)
    flat, size = part.flatten(0, 1), -(-part.shape[2] // steps.shape[2])
    total: Tensor | None = None
    for k in range(steps.shape[2]):
        product = _integers(qdata[:, k * size : (k + 1) * size], flat[:, k * size : (k + 1) * size])
        values, step = product.unflatten(1, (outputs, width)), steps[:, :, k]
        total = values * step if total is None else total.addcmul_(values.to(total.dtype), step)
    assert total is not None
    return total.mul_(kept.unsqueeze(1)).sum(-1)


def _product(input: Tensor, weight: Tensor) -> Tensor:
    (out, width), wide = weight.shape, torch.promote_types(input.dtype, torch.float32)
    qdata, step = _rounded_rows(input.reshape(-1, width).to(wide))
    return (_integers(qdata, weight) * (step * UNIT)).to(input.dtype).reshape(*input.shape[:-1], out)


def _rounded_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in int8, and its step (N, 1)."""
    peak = rows.abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    return (rows * (LEVELS / peak)).round().to(torch.int8), peak / LEVELS


def _integers(
    qdata: Tensor,  # (N, K) int8
    weight: Tensor,  # (M, K) int8
) -> Tensor:  # (N, M) int32
    """The product of integers, padded to sizes that the kernel takes."""
    if weight.device != qdata.device:  # offloaded: on a CPU the kernel gives what there is in memory
        raise InputError(f"Stored integers should be on {qdata.device}, as the inputs are. Found {weight.device}.")
    count, (out, width) = qdata.shape[0], weight.shape
    if qdata.is_cuda and (count <= 16 or out % 8 or width % 8):
        qdata = torch.nn.functional.pad(qdata, [0, -width % 8, 0, max(0, 17 - count)])
        weight = torch.nn.functional.pad(weight, [0, -width % 8, 0, -out % 8])
    elif width == 1:  # `torch._int_mm` of torch 2.13 is wrong there on a CPU
        qdata, weight = torch.nn.functional.pad(qdata, [0, 1]), torch.nn.functional.pad(weight, [0, 1])
    return torch._int_mm(qdata, weight.T)[:count, :out]
