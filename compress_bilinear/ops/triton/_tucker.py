"""Fused Tucker: y = G(x1 Aᵀ, x2 Bᵀ) Uᵀ + b in one kernel.

The projections, the core's sum over (R_i, R_j) and the output's projection stay in a program's registers: for each
component a of the first input, the second input's components times that column are multiplied with the slice
G[:, a, :], so there is no R_i x R_j intermediate. int8 factors have the step 2⁻⁷, applied in float32.
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
    load_scales,
    load_tile,
    multiply,
    precision,
    project,
    scale_layout,
    tile,
    write_outputs,
)

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
    write_outputs(
        inner, out, bias, y, n, rows, r, rank_out, outputs, out_row, out_column, bias_stride, y_row,
        BIASED, BO, PRECISION,
    )  # fmt: skip


@cache
def tucker_tiles(rows: int, rank2: int, rank_out: int, bits: int, exact: bool) -> dict[str, int]:
    """Block sizes and warps of the forward."""
    wide = max(rank2, rank_out) > 64
    blocks = {"BN": 16 if exact else tile(rows, 32 if wide or bits == 32 else 64)}
    blocks |= {"BK": 16 if exact else 32, "BO": 16 if exact else 32}
    blocks |= {"BJ": tile(rank2, MOST_RANK), "BR": tile(rank_out, MOST_RANK)}
    warps = 4 if blocks["BJ"] * blocks["BR"] < 1024 else 8
    return blocks | {"num_warps": warps, "num_stages": 1 if bits == 32 else 2} | OPTIONS


def launch_tucker(
    x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, core: Tensor, out: Tensor, bias: Tensor | None,
    scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The whole layer in one launch, shapes as of `fused_tucker`; R_j and R_o at most `MOST_RANK`.

    With a scale the core and the factors are int8, else none of them is.
    """
    rows, (rank_out, rank1, rank2), outputs = x1.shape[0], core.shape, out.shape[0]
    y = torch.empty(rows, outputs, dtype=x1.dtype, device=x1.device)
    blocks = tucker_tiles(rows, rank2, rank_out, 8 * x1.element_size(), exact(x1))
    tucker_forward[(triton.cdiv(rows, blocks["BN"]),)](
        x1, x2, in1, in2, core, out, bias, scale, y,
        rows, x1.shape[1], x2.shape[1], outputs, rank1, rank2, rank_out,
        *x1.stride(), *x2.stride(), *in1.stride(), *in2.stride(), *core.stride(), *out.stride(),
        *scale_layout(scale, core),
        1 if bias is None else bias.stride(0), outputs,
        SCALED=scale is not None, BIASED=bias is not None, PRECISION=precision(x1.dtype), **blocks,
    )  # fmt: skip
    return y
