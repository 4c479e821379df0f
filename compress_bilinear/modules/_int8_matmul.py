"""Products of int8 matrices, with the inputs' rows rounded to int8 at each call."""

import math
from typing import Any

import torch
from torch import Tensor

from ..quantization import LEVELS, UNIT

_LEAST = 1e-30  # of a row's largest magnitude, for a row of zeros


class _Int8Linear(torch.autograd.Function):
    """x Qᵀ / 128 with x rounded to int8, row by row; its gradient is that of the product without rounding."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        rows = input.reshape(-1, input.shape[-1]).to(wide)
        peak = rows.abs().amax(-1, keepdim=True).clamp_min_(_LEAST)
        qdata = (rows * (LEVELS / peak)).round_().to(torch.int8)
        product = torch._int_mm(qdata, weight.T)
        output = product.to(wide).mul_(peak * (UNIT / LEVELS)).to(input.dtype)
        return output.reshape(*input.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        (grad,) = grads
        return (grad @ weight.to(grad.dtype)) * UNIT, None


def int8_linear(
    input: Tensor,  # (..., I)
    weight: Tensor,  # (O, I), int8 in steps of 2⁻⁷
) -> Tensor:  # (..., O)
    """x Wᵀ through `torch._int_mm`; the inputs' rounding costs about 1% of the output.

    Where CUDA's kernel does not take the sizes (it needs more than 16 rows, and multiples of 8), integers are padded.
    """
    rows, (out, width) = math.prod(input.shape[:-1]), weight.shape
    if input.device.type == "cuda" and (rows <= 16 or out % 8 or width % 8):
        flat = torch.nn.functional.pad(input.reshape(rows, width), [0, -width % 8, 0, max(0, 17 - rows)])
        padded = torch.nn.functional.pad(weight, [0, -width % 8, 0, -out % 8])
        output: Tensor = _Int8Linear.apply(flat, padded)  # type: ignore[no-untyped-call]
        return output[:rows, :out].reshape(*input.shape[:-1], out)
    output = _Int8Linear.apply(input, weight)  # type: ignore[no-untyped-call]
    return output
