"""Products of int8 matrices, with the inputs' rows rounded to int8 at each call."""

from typing import Any

import torch
from torch import Tensor

from ..quantization import LEVELS, UNIT

CHUNK = 2**20  # of the weight's values that are de-quantized at once (or one row of them)
_LEAST = 1e-30  # of a row's largest magnitude, for a row of zeros


def int8_linear(
    input: Tensor,  # (..., I)
    weight: Tensor,  # (O, I), int8 in steps of 2⁻⁷
) -> Tensor:  # (..., O)
    """x Wᵀ through `torch._int_mm`; the inputs' rounding costs about 1% of the output.

    The gradient is that of the product without rounding; the weight's parts are read for it one by one. Where CUDA's
    kernel does not take the sizes (it needs more than 16 rows, and multiples of 8), integers are padded.
    """
    if torch.is_grad_enabled() and input.requires_grad:
        output: Tensor = _Int8Linear.apply(input, weight)  # type: ignore[no-untyped-call]
        return output
    return _product(input, weight)


class _Int8Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor) -> Tensor:
        return _product(input, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,), (grad,) = ctx.saved_tensors, grads
        rows = max(1, CHUNK // max(1, weight.shape[1]))
        parts = zip(grad.split(rows, dim=-1), weight.split(rows), strict=True)
        total = sum((part @ values.to(grad.dtype) for part, values in parts), start=grad.new_zeros(()))
        return total * UNIT, None


def _product(input: Tensor, weight: Tensor) -> Tensor:
    (out, width), wide = weight.shape, torch.promote_types(input.dtype, torch.float32)
    rows = input.reshape(-1, width).to(wide)
    peak = rows.abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    qdata = (rows * (LEVELS / peak)).round().to(torch.int8)
    count = rows.shape[0]
    if input.is_cuda and (count <= 16 or out % 8 or width % 8):
        qdata = torch.nn.functional.pad(qdata, [0, -width % 8, 0, max(0, 17 - count)])
        weight = torch.nn.functional.pad(weight, [0, -width % 8, 0, -out % 8])
    elif width == 1:  # `torch._int_mm` of torch 2.13 is wrong there on a CPU
        qdata, weight = torch.nn.functional.pad(qdata, [0, 1]), torch.nn.functional.pad(weight, [0, 1])
    product = torch._int_mm(qdata, weight.T)[:count, :out]
    return (product * (peak * (UNIT / LEVELS))).to(input.dtype).reshape(*input.shape[:-1], out)
