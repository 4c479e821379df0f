"""Fused Tucker: y = G(x1 Aᵀ, x2 Bᵀ) Uᵀ + b in one kernel, and fused products of pairs for CP and Tucker.

The projections, the core's sum over (R_i, R_j) and the output's projection stay in a program's registers: for each
component a of the first input, the second input's components times that column are multiplied with the slice
G[:, a, :], so there is no R_i x R_j intermediate. int8 factors have the step 2⁻⁷, applied in float32.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_tiles import (
    OPTIONS,
    UNIT,
    exact,
    load_scales,
    load_tile,
    multiply,
    operand,
    precision,
    project,
    scale_layout,
    store_tile,
    tile,
)

MOST_RANK = 128  # R_o and R_j, which a program holds whole
_CHUNK = tl.constexpr(16)  # components of the first input that are projected at once


@triton.jit
def tucker_forward(
    x1, x2, in1, in2, core, out, bias, core_scale, y,
    rows, width1, width2, outputs, rank1, rank2, rank_out,
    x1_row, x1_column, x2_row, x2_column, in1_row, in1_column, in2_row, in2_column,
    core_out, core_in1, core_in2, out_row, out_column, s_out, s_in1, s_in2, b_out, b_in1, b_in2, bias_stride, y_row,
    SCALED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """A block of rows, all outputs."""
    dtype = x1.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j, r, chunk = tl.arange(0, BJ), tl.arange(0, BR), tl.arange(0, _CHUNK)
    right = tl.zeros((BN, BJ), tl.float32)
    right = project(x2, in2, n, rows, x2_row, x2_column, j, rank2, in2_row, in2_column, width2, right, BK, PRECISION)
    if SCALED:
        right *= UNIT
    total = tl.zeros((BN, BR), tl.float32)
    for start in range(0, rank1, _CHUNK):
        i = start + chunk
        left = tl.zeros((BN, _CHUNK), tl.float32)
        left = project(x1, in1, n, rows, x1_row, x1_column, i, rank1, in1_row, in1_column, width1, left, BK, PRECISION)
        if SCALED:
            left *= UNIT
        for k in range(tl.minimum(rank1 - start, _CHUNK)):
            column = tl.sum(tl.where(chunk[None, :] == k, left, 0.0), 1)
            weight = load_tile(core + (start + k) * core_in1, j, rank2, core_in2, r, rank_out, core_out)
            if SCALED:
                at = core_scale + (start + k) // b_in1 * s_in1
                step = load_scales(at, j, rank2, s_in2, b_in2, r, rank_out, s_out, b_out)
                weight = (weight.to(tl.float32) * step).to(dtype)
            total = multiply((column[:, None] * right).to(dtype), weight, total, PRECISION)
    if SCALED:
        total *= UNIT
    inner = total.to(dtype)
    for start in range(0, outputs, BO):
        o = start + tl.arange(0, BO)
        weight = operand(load_tile(out, r, rank_out, out_column, o, outputs, out_row), dtype)
        result = multiply(inner, weight, tl.zeros((inner.shape[0], BO), tl.float32), PRECISION)
        if BIASED:
            result += tl.load(bias + o * bias_stride, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
        store_tile(y, result, n, rows, y_row, o, outputs, 1)


@triton.jit
def cp_pairs(
    p, q, out, sigma, bias, y,
    length1, length2, rank, outputs, tiles1, tiles2, out_row, out_column, sigma_stride, bias_stride,
    SCALED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BL1: tl.constexpr, BL2: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """A tile of L1 x L2 pairs by a block of outputs: Σ_r σ_r p_kr q_lr C_or."""
    program = tl.program_id(0)
    batch = (program // (tiles1 * tiles2)).to(tl.int64)
    pair = tl.arange(0, BL1 * BL2)
    k = (program // tiles2 % tiles1) * BL1 + pair // BL2
    column2 = (program % tiles2) * BL2 + pair % BL2
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    total = tl.zeros((BL1 * BL2, BO), tl.float32)
    for start in range(0, rank, BR):
        r = start + tl.arange(0, BR)
        left = load_tile(p + batch * length1 * rank, k, length1, rank, r, rank, 1).to(tl.float32)
        right = load_tile(q + batch * length2 * rank, column2, length2, rank, r, rank, 1).to(tl.float32)
        product = left * right
        if SCALED:
            product *= tl.load(sigma + r * sigma_stride, mask=r < rank, other=0.0)[None, :]
        product = product.to(p.dtype.element_ty)
        weight = operand(load_tile(out, r, rank, out_column, o, outputs, out_row), product.dtype)
        total = multiply(product, weight, total, PRECISION)
    if out.dtype.element_ty == tl.int8:
        total *= UNIT
    if BIASED:
        total += tl.load(bias + o * bias_stride, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
    row = (batch * length1 + k) * length2 + column2
    mask = ((k < length1) & (column2 < length2))[:, None] & (o < outputs)[None, :]
    tl.store(y + row[:, None] * outputs + o[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def tucker_pairs(
    t, q, out, bias, y,
    length1, length2, rank2, rank_out, outputs, tiles2, out_row, out_column, bias_stride,
    SCALED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
    BL1: tl.constexpr, BL2: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """A tile of L1 x L2 pairs, all outputs: U (t_k q_l), where t_k = Σ_a p_ka G[:, a, :] is (R_o, R_j)."""
    tiles1 = tl.cdiv(length1, BL1)
    program = tl.program_id(0)
    batch = (program // (tiles1 * tiles2)).to(tl.int64)
    first = (program // tiles2 % tiles1) * BL1
    column2 = (program % tiles2) * BL2 + tl.arange(0, BL2)
    r = tl.arange(0, BR)
    dtype = q.dtype.element_ty
    for k in range(first, tl.minimum(first + BL1, length1)):
        row = batch * length1 + k
        total = tl.zeros((BL2, BR), tl.float32)
        for start in range(0, rank2, BJ):
            j = start + tl.arange(0, BJ)
            right = load_tile(q + batch * length2 * rank2, column2, length2, rank2, j, rank2, 1)
            left = load_tile(t + row * rank_out * rank2, j, rank2, 1, r, rank_out, rank2)
            total = multiply(right, left, total, PRECISION)
        if SCALED:
            total *= UNIT
        inner = total.to(dtype)
        for start in range(0, outputs, BO):
            o = start + tl.arange(0, BO)
            weight = operand(load_tile(out, r, rank_out, out_column, o, outputs, out_row), dtype)
            result = multiply(inner, weight, tl.zeros((inner.shape[0], BO), tl.float32), PRECISION)
            if BIASED:
                result += tl.load(bias + o * bias_stride, mask=o < outputs, other=0.0).to(tl.float32)[None, :]
            store_tile(y + row * length2 * outputs, result, column2, length2, outputs, o, outputs, 1)


@cache
def tucker_tiles(
    rows: int, width: int, rank2: int, rank_out: int, outputs: int, bits: int, exact: bool
) -> dict[str, int]:
    """Block sizes and warps of the forward."""
    wide = max(rank2, rank_out) > 64
    blocks = {"BN": 16 if exact else tile(rows, 32 if wide or bits == 32 else 64), "BK": tile(width, 32)}
    blocks |= {"BJ": tile(rank2, MOST_RANK), "BR": tile(rank_out, MOST_RANK), "BO": tile(outputs, 32)}
    return blocks | {"num_warps": 4 if blocks["BJ"] * blocks["BR"] < 1024 else 8, "num_stages": 2} | OPTIONS


@cache
def pair_tiles(length2: int, rank: int, outputs: int, exact: bool) -> dict[str, int]:
    """Block sizes and warps of CP's pairs."""
    blocks = {"BL2": 16 if length2 <= 16 else 32, "BR": tile(rank, 32), "BO": tile(outputs, 32 if exact else 128)}
    return blocks | {"BL1": (32 if exact else 64) // blocks["BL2"], "num_warps": 4, "num_stages": 2} | OPTIONS


@cache
def tucker_pair_tiles(length2: int, rank2: int, rank_out: int, outputs: int, bits: int, exact: bool) -> dict[str, int]:
    """Block sizes and warps of Tucker's pairs."""
    blocks = {"BL1": 2, "BL2": tile(length2, 16 if exact else 64 if bits == 16 else 32), "BJ": tile(rank2, 32)}
    blocks |= {"BR": tile(rank_out, MOST_RANK), "BO": tile(outputs, 32)}
    return blocks | {"num_warps": 8, "num_stages": 2} | OPTIONS


def launch_tucker(
    x1: Tensor,  # (N, I)
    x2: Tensor,  # (N, J)
    in1: Tensor,  # (R_i, I)
    in2: Tensor,  # (R_j, J)
    core: Tensor,  # (R_o, R_i, R_j)
    out: Tensor,  # (O, R_o)
    bias: Tensor | None,  # (O,)
    scale: Tensor | None,  # of an int8 core, one for each block of entries; the factors are int8 of step 2⁻⁷ then
) -> Tensor:  # (N, O)
    """The whole layer, one launch; R_j and R_o at most `MOST_RANK`."""
    rows, (rank_out, rank1, rank2), outputs = x1.shape[0], core.shape, out.shape[0]
    y = torch.empty(rows, outputs, dtype=x1.dtype, device=x1.device)
    blocks = tucker_tiles(
        rows, max(x1.shape[1], x2.shape[1]), rank2, rank_out, outputs, 8 * x1.element_size(), exact(x1)
    )
    tucker_forward[(triton.cdiv(rows, blocks["BN"]),)](
        x1, x2, in1, in2, core, out, bias, scale, y,
        rows, x1.shape[1], x2.shape[1], outputs, rank1, rank2, rank_out,
        *x1.stride(), *x2.stride(), *in1.stride(), *in2.stride(), *core.stride(), *out.stride(),
        *scale_layout(scale, core),
        1 if bias is None else bias.stride(0), outputs,
        SCALED=scale is not None, BIASED=bias is not None, PRECISION=precision(x1.dtype), **blocks,
    )  # fmt: skip
    return y


def launch_cp_pairs(
    p: Tensor,  # (B, L1, R), contiguous
    q: Tensor,  # (B, L2, R), contiguous
    out: Tensor,  # (O, R)
    sigma: Tensor | None,  # (R,)
    bias: Tensor | None,  # (O,)
) -> Tensor:  # (B, L1, L2, O)
    """All pairs of projected inputs, one launch."""
    (batch, length1, rank), length2, outputs = p.shape, q.shape[1], out.shape[0]
    y = torch.empty(batch, length1, length2, outputs, dtype=p.dtype, device=p.device)
    blocks = pair_tiles(length2, rank, outputs, exact(p))
    tiles1, tiles2 = triton.cdiv(length1, blocks["BL1"]), triton.cdiv(length2, blocks["BL2"])
    cp_pairs[batch * tiles1 * tiles2, triton.cdiv(outputs, blocks["BO"])](
        p, q, out, sigma, bias, y, length1, length2, rank, outputs, tiles1, tiles2, *out.stride(),
        1 if sigma is None else sigma.stride(0), 1 if bias is None else bias.stride(0),
        SCALED=sigma is not None, BIASED=bias is not None, PRECISION=precision(p.dtype), **blocks,
    )  # fmt: skip
    return y


def launch_tucker_pairs(
    t: Tensor,  # (B, L1, R_o, R_j), contiguous
    q: Tensor,  # (B, L2, R_j), contiguous
    out: Tensor,  # (O, R_o)
    bias: Tensor | None,  # (O,)
) -> Tensor:  # (B, L1, L2, O)
    """All pairs, one launch; R_o at most `MOST_RANK`."""
    (batch, length1, rank_out, rank2), length2, outputs = t.shape, q.shape[1], out.shape[0]
    y = torch.empty(batch, length1, length2, outputs, dtype=q.dtype, device=q.device)
    blocks = tucker_pair_tiles(length2, rank2, rank_out, outputs, 8 * q.element_size(), exact(q))
    tiles2 = triton.cdiv(length2, blocks["BL2"])
    tucker_pairs[(batch * triton.cdiv(length1, blocks["BL1"]) * tiles2,)](
        t, q, out, bias, y, length1, length2, rank2, rank_out, outputs, tiles2, *out.stride(),
        1 if bias is None else bias.stride(0),
        SCALED=out.dtype == torch.int8, BIASED=bias is not None, PRECISION=precision(q.dtype), **blocks,
    )  # fmt: skip
    return y
