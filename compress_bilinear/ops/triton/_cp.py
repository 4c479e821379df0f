"""The product of a CP's projections, σ * (x1 Aᵀ) * (x2 Bᵀ), in one kernel. An ordinary matrix product follows it.

A program projects some rows on some components twice, in float32 registers, and writes only the product.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import OPTIONS, exact, load_tile, multiply, precision, store_tile, tile

UNIT = tl.constexpr(2.0**-7)  # the step of an int8 factor, as in `quantization`


@triton.jit
def project(
    x, weight, row, rows, x_row, x_column, component, components, w_row, w_column, width,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[row] weight[component]ᵀ, (BN, BR), in float32; the weight may be int8."""
    total = tl.zeros((row.shape[0], component.shape[0]), tl.float32)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        left = load_tile(x, row, rows, x_row, k, width, x_column)
        right = load_tile(weight, k, width, w_column, component, components, w_row)
        if weight.dtype.element_ty == tl.int8:
            right = right.to(tl.float32)  # the interpreter makes no bfloat16 of integers
        total = multiply(left, right.to(left.dtype), total, PRECISION)
    if weight.dtype.element_ty == tl.int8:
        total *= UNIT
    return total


@triton.jit
def cp_product(
    x1, x2, in1, in2, sigma, h,
    rows, width1, width2, rank,
    x1_row, x1_column, x2_row, x2_column, in1_row, in1_column, in2_row, in2_column, sigma_stride, h_row,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """σ * (x1 Aᵀ) * (x2 Bᵀ): a block of rows by a block of components."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    product = project(x1, in1, n, rows, x1_row, x1_column, r, rank, in1_row, in1_column, width1, BK, PRECISION)
    product *= project(x2, in2, n, rows, x2_row, x2_column, r, rank, in2_row, in2_column, width2, BK, PRECISION)
    if SCALED:
        product *= tl.load(sigma + r * sigma_stride, mask=r < rank, other=0.0)[None, :]
    store_tile(h, product, n, rows, h_row, r, rank, 1)


@cache
def product_tiles(rank: int, exact: bool) -> dict[str, int]:
    """Block sizes, warps and stages with which no register is spilled, as `tests/unit/ops/test_compiled.py` checks.

    Args:
        exact: float32 without TF32, whose products take registers instead of tensor cores.
    """
    if exact:
        return {"BN": 32, "BK": 16, "BR": tile(rank, 32), "num_warps": 4, "num_stages": 1} | OPTIONS
    return {"BN": 64, "BK": 32, "BR": tile(rank, 64), "num_warps": 4, "num_stages": 2} | OPTIONS


def launch_product(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, sigma: Tensor | None) -> Tensor:
    """σ * (x1 Aᵀ) * (x2 Bᵀ), (N, R)."""
    rows, (rank, width1), width2 = x1.shape[0], in1.shape, in2.shape[1]
    h = torch.empty(rows, rank, dtype=x1.dtype, device=x1.device)
    blocks = product_tiles(rank, exact(x1))
    cp_product[triton.cdiv(rows, blocks["BN"]), triton.cdiv(rank, blocks["BR"])](
        x1, x2, in1, in2, sigma, h, rows, width1, width2, rank,
        *x1.stride(), *x2.stride(), *in1.stride(), *in2.stride(), 1 if sigma is None else sigma.stride(0), rank,
        SCALED=sigma is not None, PRECISION=precision(x1.dtype), **blocks,
    )  # fmt: skip
    return h
