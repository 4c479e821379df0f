"""A plain Triton dense bilinear, as public ones are: for each output, x1 W_o by tiles, times x2, summed."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    x1, x2, weight, y, rows, width1, width2, outputs,
    PRECISION: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    o = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BN,), tl.float32)
    for first in range(0, width2, BJ):
        j = first + tl.arange(0, BJ)
        part = tl.zeros((BN, BJ), tl.float32)
        for start in range(0, width1, BI):
            i = start + tl.arange(0, BI)
            inside = (n < rows)[:, None] & (i < width1)[None, :]
            left = tl.load(x1 + n[:, None] * width1 + i[None, :], mask=inside, other=0.0)
            inside = (i < width1)[:, None] & (j < width2)[None, :]
            right = tl.load(weight + o * width1 * width2 + i[:, None] * width2 + j[None, :], mask=inside, other=0.0)
            part = tl.dot(left, right, part, input_precision=PRECISION)
        inside = (n < rows)[:, None] & (j < width2)[None, :]
        total += tl.sum(part * tl.load(x2 + n[:, None] * width2 + j[None, :], mask=inside, other=0.0).to(tl.float32), 1)
    tl.store(y + n.to(tl.int64) * outputs + o, total.to(y.dtype.element_ty), mask=n < rows)


def plain_dense(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y_no = x1ᵀ W_o x2 + b_o of contiguous operands."""
    rows, (outputs, width1, width2) = x1.shape[0], weight.shape
    y = torch.empty(rows, outputs, dtype=x1.dtype, device=x1.device)
    tf32 = x1.dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    precision = "tf32" if tf32 else "ieee"
    _kernel[triton.cdiv(rows, 64), outputs](
        x1, x2, weight, y, rows, width1, width2, outputs,
        PRECISION=precision, BN=64, BI=32, BJ=64, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y + bias
