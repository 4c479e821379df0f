"""Fused CP: y = (σ * (x1 Aᵀ) * (x2 Bᵀ)) Cᵀ + b in one kernel, its product alone, and its backward.

A program owns some rows. For each block of components it projects them in float32 registers, multiplies, and adds
the product's share of the outputs; nothing of size N x R reaches memory. `cp_product` writes the product instead, and
runs in parallel over components too: with a plain GEMM after it, that is better for few rows or many outputs.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import (
    OPTIONS,
    UNIT,
    biased,
    exact,
    load_tile,
    multiply,
    operand,
    precision,
    project,
    scaled,
    store_tile,
    tile,
)

MOST_OUT = 256  # outputs that a program holds, in float32
MOST_IN = 128  # inputs whose gradients a program holds


@triton.jit
def cp_forward(
    x1, x2, in1, in2, out, sigma, bias, y,
    rows, width1, width2, rank, outputs,
    x1_row, x1_column, x2_row, x2_column, in1_row, in1_column, in2_row, in2_column, out_row, out_column,
    sigma_stride, bias_stride, y_row,
    SCALED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """A block of rows, all outputs."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    total = tl.zeros((BN, BO), tl.float32)
    for start in range(0, rank, BR):
        r = start + tl.arange(0, BR)
        zero = tl.zeros((BN, BR), tl.float32)
        product = project(
            x1, in1, n, rows, x1_row, x1_column, r, rank, in1_row, in1_column, width1, zero, BK, PRECISION
        )
        product *= project(
            x2, in2, n, rows, x2_row, x2_column, r, rank, in2_row, in2_column, width2, zero, BK, PRECISION
        )
        if in1.dtype.element_ty == tl.int8:
            product *= UNIT * UNIT
        product = scaled(product, sigma, r, rank, sigma_stride, SCALED).to(x1.dtype.element_ty)
        weight = operand(load_tile(out, r, rank, out_column, o, outputs, out_row), product.dtype)
        total = multiply(product, weight, total, PRECISION)
    if out.dtype.element_ty == tl.int8:
        total *= UNIT
    total = biased(total, bias, o, outputs, bias_stride, BIASED)
    store_tile(y, total, n, rows, y_row, o, outputs, 1)


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
    zero = tl.zeros((BN, BR), tl.float32)
    product = project(x1, in1, n, rows, x1_row, x1_column, r, rank, in1_row, in1_column, width1, zero, BK, PRECISION)
    product *= project(x2, in2, n, rows, x2_row, x2_column, r, rank, in2_row, in2_column, width2, zero, BK, PRECISION)
    if in1.dtype.element_ty == tl.int8:
        product *= UNIT * UNIT
    product = scaled(product, sigma, r, rank, sigma_stride, SCALED)
    store_tile(h, product, n, rows, h_row, r, rank, 1)


@triton.jit
def cp_backward(
    x1, x2, in1, in2, out, sigma, dy, h, dp, dq, dx1, dx2,
    rows, width1, width2, rank, outputs,
    x1_row, x1_column, x2_row, x2_column, in1_row, in1_column, in2_row, in2_column, out_row, out_column,
    sigma_stride, dy_row, dy_column,
    SCALED: tl.constexpr, WEIGHTS: tl.constexpr, INPUTS: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """A block of rows, projected again: the inputs' gradients, or the factors of all gradients, or both."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    i, j = tl.arange(0, BI), tl.arange(0, BJ)
    if INPUTS:
        total1, total2 = tl.zeros((BN, BI), tl.float32), tl.zeros((BN, BJ), tl.float32)
    for start in range(0, rank, BR):
        r = start + tl.arange(0, BR)
        zero = tl.zeros((BN, BR), tl.float32)
        p = project(x1, in1, n, rows, x1_row, x1_column, r, rank, in1_row, in1_column, width1, zero, BK, PRECISION)
        q = project(x2, in2, n, rows, x2_row, x2_column, r, rank, in2_row, in2_column, width2, zero, BK, PRECISION)
        dh = project(dy, out, n, rows, dy_row, dy_column, r, rank, out_column, out_row, outputs, zero, BK, PRECISION)
        if in1.dtype.element_ty == tl.int8:
            dh *= UNIT * UNIT  # of `out` and of the other projection
        if SCALED:
            scale = tl.load(sigma + r * sigma_stride, mask=r < rank, other=0.0)[None, :]
            dh *= scale
        if WEIGHTS:
            product = p * q
            if SCALED:
                product *= scale
            store_tile(h, product, n, rows, rank, r, rank, 1)
        p, q = dh * q, dh * p
        if WEIGHTS:
            store_tile(dp, p, n, rows, rank, r, rank, 1)
            store_tile(dq, q, n, rows, rank, r, rank, 1)
        if INPUTS:
            dtype = x1.dtype.element_ty
            weight1 = operand(load_tile(in1, r, rank, in1_row, i, width1, in1_column), dtype)
            total1 = multiply(p.to(dtype), weight1, total1, PRECISION)
            weight2 = operand(load_tile(in2, r, rank, in2_row, j, width2, in2_column), dtype)
            total2 = multiply(q.to(dtype), weight2, total2, PRECISION)
    if INPUTS:
        if in1.dtype.element_ty == tl.int8:
            total1, total2 = total1 * UNIT, total2 * UNIT
        store_tile(dx1, total1, n, rows, width1, i, width1, 1)
        store_tile(dx2, total2, n, rows, width2, j, width2, 1)


@cache
def cp_tiles(kind: str, width: int, rank: int, outputs: int, bits: int, exact: bool, scaled: bool) -> dict[str, int]:
    """Block sizes, warps and stages with which no register is spilled, as `tests/unit/ops/compiled.py` checks.

    Args:
        kind: "forward", "product" or "backward".
        width: of the wider input whose gradient is taken, 1 where none is; of no effect but on "backward".
        exact: float32 without TF32, whose products take registers instead of tensor cores.
    """
    blocks, warps = {"BK": 16 if exact else 32, "BR": 16 if exact else 32}, 4
    match kind:
        case "forward":
            most = 64 if exact else MOST_OUT
            blocks |= {"BN": 32 if bits == 32 else 64, "BO": tile(outputs, most)}
            if blocks["BO"] > 128 and bits == 32:
                blocks |= {"BR": 16}
            elif blocks["BO"] > 128 and scaled:
                blocks |= {"BN": 32}
            warps = 8 if blocks["BO"] > 32 or (bits == 32 and not exact) else 4
        case "product":
            blocks |= {"BN": 32 if exact else 64, "BR": tile(rank, 32 if exact else 64)}
        case "backward":
            side = tile(width, MOST_IN)
            blocks |= {"BN": 16 if exact else 32, "BI": side, "BJ": side}
            warps = 4 if exact else 8
    stages = 1 if exact or (kind == "backward" and bits == 32) else 2
    return blocks | {"num_warps": warps, "num_stages": stages} | OPTIONS


def launch_forward(
    x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, sigma: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The whole layer in one launch; shapes as of `fused_cp`."""
    rows, (rank, width1), width2, outputs = x1.shape[0], in1.shape, in2.shape[1], out.shape[0]
    y = torch.empty(rows, outputs, dtype=x1.dtype, device=x1.device)
    blocks = cp_tiles("forward", 1, rank, outputs, 8 * x1.element_size(), exact(x1), sigma is not None)
    grid = (triton.cdiv(rows, blocks["BN"]), triton.cdiv(outputs, blocks["BO"]))
    cp_forward[grid](
        x1, x2, in1, in2, out, sigma, bias, y, rows, width1, width2, rank, outputs,
        *x1.stride(), *x2.stride(), *in1.stride(), *in2.stride(), *out.stride(),
        1 if sigma is None else sigma.stride(0), 1 if bias is None else bias.stride(0), outputs,
        SCALED=sigma is not None, BIASED=bias is not None, PRECISION=precision(x1.dtype), **blocks,
    )  # fmt: skip
    return y


def launch_product(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, sigma: Tensor | None) -> Tensor:
    """σ * (x1 Aᵀ) * (x2 Bᵀ), (N, R)."""
    rows, (rank, width1), width2 = x1.shape[0], in1.shape, in2.shape[1]
    h = torch.empty(rows, rank, dtype=x1.dtype, device=x1.device)
    blocks = cp_tiles("product", 1, rank, 1, 8 * x1.element_size(), exact(x1), sigma is not None)
    cp_product[triton.cdiv(rows, blocks["BN"]), triton.cdiv(rank, blocks["BR"])](
        x1, x2, in1, in2, sigma, h, rows, width1, width2, rank,
        *x1.stride(), *x2.stride(), *in1.stride(), *in2.stride(), 1 if sigma is None else sigma.stride(0), rank,
        SCALED=sigma is not None, PRECISION=precision(x1.dtype), **blocks,
    )  # fmt: skip
    return h


def launch_backward(
    dy: Tensor, x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, sigma: Tensor | None,
    inputs: bool, weights: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """With `inputs` the gradients of x1 and x2; with `weights` the product and the gradients of both projections.

    Of inputs wider than `MOST_IN` the gradients are None: the caller computes them from those of the projections.
    """
    rows, (rank, width1), width2, outputs = x1.shape[0], in1.shape, in2.shape[1], out.shape[0]
    inputs = inputs and max(width1, width2) <= MOST_IN
    factors = [x1.new_empty(rows, rank) for _ in range(3)] if weights else [None] * 3
    dx1, dx2 = (x1.new_empty(rows, width) if inputs else None for width in (width1, width2))
    widest = max(width1, width2) if inputs else 1
    blocks = cp_tiles("backward", widest, rank, outputs, 8 * x1.element_size(), exact(x1), sigma is not None)
    cp_backward[(triton.cdiv(rows, blocks["BN"]),)](
        x1, x2, in1, in2, out, sigma, dy, *factors, dx1, dx2, rows, width1, width2, rank, outputs,
        *x1.stride(), *x2.stride(), *in1.stride(), *in2.stride(), *out.stride(),
        1 if sigma is None else sigma.stride(0), *dy.stride(),
        SCALED=sigma is not None, WEIGHTS=weights, INPUTS=inputs, PRECISION=precision(x1.dtype), **blocks,
    )  # fmt: skip
    return dx1, dx2, *factors
