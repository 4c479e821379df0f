"""Tucker of all pairs of projected inputs: fused outputs, and gradients that read the outputs' gradient once each.

The core's outputs for all pairs, B x L1 x L2 x R_o, and their gradient stay in a program's registers. Each gradient
recomputes them.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._choice import MOST_RANK
from ._tiles import (
    OPTIONS,
    UNIT,
    exact,
    load_tile,
    multiply,
    precision,
    project,
    shares,
    store_tile,
    tile,
    write_outputs,
)


@triton.jit
def core_outputs(
    t, q, row, batch, column2, length2, r, rank_out, rank2,
    BL2: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_j q_lj t_cj for some rows l of the second input and one of t: (BL2, BR), in float32."""
    total = tl.zeros((BL2, BR), tl.float32)
    for start in range(0, rank2, BJ):
        j = start + tl.arange(0, BJ)
        right = load_tile(q + batch * length2 * rank2, column2, length2, rank2, j, rank2, 1)
        left = load_tile(t + row * rank_out * rank2, j, rank2, 1, r, rank_out, rank2)
        total = multiply(right, left, total, PRECISION)
    return total


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
    for k in range(first, tl.minimum(first + BL1, length1)):
        row = batch * length1 + k
        total = core_outputs(t, q, row, batch, column2, length2, r, rank_out, rank2, BL2, BJ, BR, PRECISION)
        if SCALED:
            total *= UNIT
        inner = total.to(q.dtype.element_ty)
        write_outputs(
            inner, out, bias, y + row * length2 * outputs, column2, length2, r, rank_out, outputs,
            out_row, out_column, bias_stride, outputs, BIASED, BO, PRECISION,
        )  # fmt: skip


@triton.jit
def tucker_pairs_first_gradient(
    dy, q, out, dt,
    length1, length2, rank2, rank_out, outputs,
    dy_batch, dy_row, dy_other, dy_column, out_row, out_column,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BL2: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """One k and a block of j: Σ_l dz_lc q_lj, where dz = dy_k U is the gradient of the core's outputs."""
    blocks = tl.cdiv(rank2, BJ)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * BJ + tl.arange(0, BJ)
    r = tl.arange(0, BR)
    batch = row // length1
    dtype = q.dtype.element_ty
    total = tl.zeros((BR, BJ), tl.float32)
    for start in range(0, length2, BL2):
        n = start + tl.arange(0, BL2)
        dz = tl.zeros((BL2, BR), tl.float32)
        at = dy + batch * dy_batch + row % length1 * dy_row
        dz = project(
            at, out, n, length2, dy_other, dy_column, r, rank_out, out_column, out_row, outputs, dz, BO, PRECISION
        )
        if SCALED:
            dz *= UNIT
        right = load_tile(q + batch * length2 * rank2, n, length2, rank2, j, rank2, 1)
        total = multiply(tl.trans(dz.to(dtype)), right, total, PRECISION)
    store_tile(dt + row * rank_out * rank2, total, r, rank_out, rank2, j, rank2, 1)


@triton.jit
def tucker_pairs_second_gradient(
    dy, t, out, dq,
    length1, length2, rank2, rank_out, outputs, tiles2, part, dq_part,
    dy_batch, dy_row, dy_other, dy_column, out_row, out_column,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BL2: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Some rows l and a block of j, of `part` of the rows k: Σ_kc dz_klc t_kcj, where dz = dy U."""
    blocks = tl.cdiv(rank2, BJ)
    program = tl.program_id(0) // blocks
    j = (tl.program_id(0) % blocks) * BJ + tl.arange(0, BJ)
    batch = (program // tiles2).to(tl.int64)
    n = (program % tiles2) * BL2 + tl.arange(0, BL2)
    r = tl.arange(0, BR)
    split = tl.program_id(1)
    wide = tl.full([], 0, tl.int64)  # 64-bit also where an index added to it is specialised to a constant
    total = tl.zeros((BL2, BJ), tl.float32)
    for k in range(split * part, tl.minimum(split * part + part, length1)):
        dz = tl.zeros((BL2, BR), tl.float32)
        at = dy + batch * dy_batch + (wide + k) * dy_row
        dz = project(
            at, out, n, length2, dy_other, dy_column, r, rank_out, out_column, out_row, outputs, dz, BO, PRECISION
        )
        if SCALED:
            dz *= UNIT
        weight = load_tile(t + (batch * length1 + k) * rank_out * rank2, r, rank_out, rank2, j, rank2, 1)
        total = multiply(dz.to(t.dtype.element_ty), weight, total, PRECISION)
    store_tile(dq + split * dq_part + batch * length2 * rank2, total, n, length2, rank2, j, rank2, 1)


@triton.jit
def tucker_pairs_weight_gradient(
    dy, t, q, dw,
    rows, length1, length2, rank2, rank_out, outputs, part,
    dy_batch, dy_row, dy_other, dy_column,
    PRECISION: tl.constexpr,
    BL2: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """A block of outputs, of `part` of the rows of t: Σ_kl dy_klo z_klc, where z_kl = t_k q_l."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    split = tl.program_id(1)
    wide = tl.full([], 0, tl.int64)
    total = tl.zeros((BO, BR), tl.float32)
    for index in range(split * part, tl.minimum(split * part + part, rows)):
        row = wide + index
        batch = row // length1
        at = dy + batch * dy_batch + row % length1 * dy_row
        for start in range(0, length2, BL2):
            n = start + tl.arange(0, BL2)
            z = core_outputs(t, q, row, batch, n, length2, r, rank_out, rank2, BL2, BJ, BR, PRECISION)
            gradient = load_tile(at, n, length2, dy_other, o, outputs, dy_column)
            total = multiply(tl.trans(gradient), z.to(gradient.dtype), total, PRECISION)
    store_tile(dw + (wide + split) * outputs * rank_out, total, o, outputs, rank_out, r, rank_out, 1)


@cache
def tucker_pair_tiles(length2: int, rank_out: int, bits: int, exact: bool) -> dict[str, int]:
    """Block sizes and warps of Tucker's pairs."""
    blocks = {"BL1": 2, "BL2": tile(length2, 16 if exact else 64 if bits == 16 else 32)}
    blocks |= {"BJ": 16 if exact else 32, "BR": tile(rank_out, MOST_RANK), "BO": 16 if exact else 32}
    return blocks | {"num_warps": 8, "num_stages": 2} | OPTIONS


@cache
def gradient_tiles(rank2: int, rank_out: int, weight: bool, exact: bool) -> dict[str, int]:
    """Block sizes and warps of the backward; wide tiles leave registers for little else.

    Args:
        weight: of the gradient of the output's projection, which recomputes the core's outputs.
    """
    wide = tile(rank_out, MOST_RANK)
    blocks = {"BL2": 32, "BJ": 32 if rank2 <= 32 or wide == 128 else 64, "BR": wide, "BO": 32}
    if weight:
        blocks |= {"BJ": 16 if wide == 128 else 32}
    if exact:
        blocks |= {"BL2": 16, "BJ": 16, "BO": 16}
    return blocks | {"num_warps": 8 if wide > 32 else 4, "num_stages": 1 if exact else 2} | OPTIONS


def launch_tucker_pairs(t: Tensor, q: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    """All pairs in one launch, t and q contiguous, shapes as of `fused_tucker_pairs`; R_o at most `MOST_RANK`."""
    (batch, length1, rank_out, rank2), length2, outputs = t.shape, q.shape[1], out.shape[0]
    y = torch.empty(batch, length1, length2, outputs, dtype=q.dtype, device=q.device)
    blocks = tucker_pair_tiles(length2, rank_out, 8 * q.element_size(), exact(q))
    tiles2 = triton.cdiv(length2, blocks["BL2"])
    tucker_pairs[(batch * triton.cdiv(length1, blocks["BL1"]) * tiles2,)](
        t, q, out, bias, y, length1, length2, rank2, rank_out, outputs, tiles2, *out.stride(),
        1 if bias is None else bias.stride(0),
        SCALED=out.dtype == torch.int8, BIASED=bias is not None, PRECISION=precision(q.dtype), **blocks,
    )  # fmt: skip
    return y


def launch_tucker_pairs_first_gradient(dy: Tensor, q: Tensor, out: Tensor) -> Tensor:
    """The gradient of t, from q contiguous and dy (B, L1, L2, O)."""
    (batch, length1, length2, outputs), rank2, rank_out = dy.shape, q.shape[2], out.shape[1]
    dt = torch.empty(batch, length1, rank_out, rank2, dtype=q.dtype, device=q.device)
    blocks = gradient_tiles(rank2, rank_out, False, exact(q))
    tucker_pairs_first_gradient[(batch * length1 * triton.cdiv(rank2, blocks["BJ"]),)](
        dy, q, out, dt, length1, length2, rank2, rank_out, outputs, *dy.stride(), *out.stride(),
        SCALED=out.dtype == torch.int8, PRECISION=precision(q.dtype), **blocks,
    )  # fmt: skip
    return dt


def launch_tucker_pairs_second_gradient(dy: Tensor, t: Tensor, out: Tensor) -> Tensor:
    """The gradient of q, from t contiguous; with few programs, summed from parts of the first input's rows."""
    (batch, length1, length2, outputs), (rank_out, rank2) = dy.shape, t.shape[2:]
    blocks = gradient_tiles(rank2, rank_out, False, exact(t))
    tiles2 = triton.cdiv(length2, blocks["BL2"])
    programs = batch * tiles2 * triton.cdiv(rank2, blocks["BJ"])
    part, splits = shares(length1, programs)
    dtype = t.dtype if splits == 1 else torch.float32
    dq = torch.empty(splits, batch, length2, rank2, dtype=dtype, device=t.device)
    tucker_pairs_second_gradient[programs, splits](
        dy, t, out, dq, length1, length2, rank2, rank_out, outputs, tiles2, part, batch * length2 * rank2,
        *dy.stride(), *out.stride(), SCALED=out.dtype == torch.int8, PRECISION=precision(t.dtype), **blocks,
    )  # fmt: skip
    return dq[0] if splits == 1 else dq.sum(0).to(t.dtype)


def launch_tucker_pairs_weight_gradient(dy: Tensor, t: Tensor, q: Tensor) -> Tensor:
    """The gradient (O, R_o) of the output's projection, summed from a few parts of t's rows."""
    (batch, length1, length2, outputs), (rank_out, rank2) = dy.shape, t.shape[2:]
    blocks = gradient_tiles(rank2, rank_out, True, exact(t))
    programs = triton.cdiv(outputs, blocks["BO"])
    part, splits = shares(batch * length1, programs)
    dtype = t.dtype if splits == 1 else torch.float32
    dw = torch.empty(splits, outputs, rank_out, dtype=dtype, device=t.device)
    tucker_pairs_weight_gradient[programs, splits](
        dy, t, q, dw, batch * length1, length1, length2, rank2, rank_out, outputs, part, *dy.stride(),
        PRECISION=precision(t.dtype), **blocks,
    )  # fmt: skip
    return dw[0] if splits == 1 else dw.sum(0).to(t.dtype)
