"""Fused dense bilinear: y_no = Σ_ij x1_ni W_oij x2_nj, never N x O x J.

For each i the rows of x2, times column i of x1, are multiplied with the slice W[:, i, :] on tensor cores and summed in
float32. The inputs' gradients are dense bilinears of the weight with its axes in another order: the same kernel.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import OPTIONS, exact, load_tile, multiply, precision, shares, store_tile, tile, times


@triton.jit
def dense_forward(
    x1, x2, weight, y,
    rows, width1, width2, outputs, part,
    x1_row, x1_column, x2_row, x2_column, w_out, w_in1, w_in2, y_part, y_row,
    PRECISION: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """A block of rows by a block of outputs, of the share `part` of the sum over i."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    split = tl.program_id(2)
    total = tl.zeros((BN, BO), tl.float32)
    wide = tl.full([], 0, tl.int64)  # 64-bit also where an index added to it is specialised to a constant
    first = split * part
    last = tl.minimum(first + part, width1)
    for start in range(0, width2, BJ):
        j = start + tl.arange(0, BJ)
        right = load_tile(x2, n, rows, x2_row, j, width2, x2_column)
        for i in range(first, last):
            offset = n.to(tl.int64) * x1_row + (wide + i) * x1_column
            column = tl.load(x1 + offset, mask=n < rows, other=0.0)
            part_weight = load_tile(weight + (wide + i) * w_in1, j, width2, w_in2, o, outputs, w_out)
            total = multiply(times(right, column[:, None]), part_weight, total, PRECISION)
    store_tile(y + split.to(tl.int64) * y_part, total, n, rows, y_row, o, outputs, 1)


@cache
def dense_tiles(rows: int, width2: int, outputs: int, bits: int, exact: bool, aligned: bool) -> dict[str, int]:
    """Block sizes and warps of the forward.

    Args:
        aligned: whether rows of x2 and of the weight begin at multiples of 16 entries, else loads take registers.
    """
    most = 32 if exact else (64 if bits == 32 else 128)
    blocks = {"BN": tile(rows, most), "BO": tile(outputs, most)}
    blocks["BJ"] = tile(width2, 16 if blocks["BN"] * blocks["BO"] == 2**14 and not aligned else 32)
    return blocks | {"num_warps": 4 if exact else 8, "num_stages": 3} | OPTIONS


def launch_dense(x1: Tensor, x2: Tensor, weight: Tensor) -> Tensor:
    """All outputs, shapes as of `fused_dense`; the products sum over the wider input."""
    if x1.shape[1] > x2.shape[1]:
        x1, x2, weight = x2, x1, weight.mT
    rows, (outputs, width1, width2) = x1.shape[0], weight.shape
    aligned = all(stride == 1 or stride % 16 == 0 for stride in (*x2.stride(), *weight.stride()))
    blocks = dense_tiles(rows, width2, outputs, 8 * x1.element_size(), exact(x1), aligned)
    programs = triton.cdiv(rows, blocks["BN"]) * triton.cdiv(outputs, blocks["BO"])
    part, splits = shares(width1, programs)
    dtype = x1.dtype if splits == 1 else torch.float32
    y = torch.empty(splits, rows, outputs, dtype=dtype, device=x1.device)
    dense_forward[triton.cdiv(rows, blocks["BN"]), triton.cdiv(outputs, blocks["BO"]), splits](
        x1, x2, weight, y, rows, width1, width2, outputs, part,
        *x1.stride(), *x2.stride(), *weight.stride(), rows * outputs, outputs,
        PRECISION=precision(x1.dtype), **blocks,
    )  # fmt: skip
    return y[0] if splits == 1 else y.sum(0).to(x1.dtype)
