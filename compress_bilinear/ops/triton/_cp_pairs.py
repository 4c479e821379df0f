"""CP of all pairs of projected inputs: fused outputs, and gradients that read the outputs' gradient once each.

The products of the projections, B x L1 x L2 x R, and their gradients are as large as the outputs. They stay in a
program's registers, and each gradient recomputes them.
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
    load_pairs,
    load_tile,
    multiply,
    operand,
    precision,
    scaled,
    shares,
    store_tile,
    tile,
)


@triton.jit
def pair_product(p, q, sigma, batch, k, length1, column2, length2, r, rank, sigma_stride, SCALED: tl.constexpr):
    """σ_r p_kr q_lr of some pairs (k, l), in the dtype of p."""
    product = load_tile(p + batch * length1 * rank, k, length1, rank, r, rank, 1).to(tl.float32)
    product *= load_tile(q + batch * length2 * rank, column2, length2, rank, r, rank, 1).to(tl.float32)
    return scaled(product, sigma, r, rank, sigma_stride, SCALED).to(p.dtype.element_ty)


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
        product = pair_product(p, q, sigma, batch, k, length1, column2, length2, r, rank, sigma_stride, SCALED)
        weight = operand(load_tile(out, r, rank, out_column, o, outputs, out_row), product.dtype)
        total = multiply(product, weight, total, PRECISION)
    if out.dtype.element_ty == tl.int8:
        total *= UNIT
    total = biased(total, bias, o, outputs, bias_stride, BIASED)
    row = (batch * length1 + k) * length2 + column2
    mask = ((k < length1) & (column2 < length2))[:, None] & (o < outputs)[None, :]
    tl.store(y + row[:, None] * outputs + o[None, :], total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def cp_pairs_gradient(
    dy, other, out, sigma, dx,
    length, length_other, rank, outputs, tiles,
    dy_batch, dy_row, dy_other, dy_column, out_row, out_column, sigma_stride,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BL1: tl.constexpr, BL2: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Some rows k of one input by a block of components: σ_r Σ_l q_lr Σ_o dy_klo C_or, over the other's rows l."""
    blocks = tl.cdiv(rank, BR)  # of the same rows next to each other, so that dy comes from memory once
    program = tl.program_id(0) // blocks
    r = (tl.program_id(0) % blocks) * BR + tl.arange(0, BR)
    batch = (program // tiles).to(tl.int64)
    first = (program % tiles) * BL1
    pair = tl.arange(0, BL1 * BL2)
    k = first + pair // BL2
    total = tl.zeros((BL1 * BL2, BR), tl.float32)
    for begin in range(0, length_other, BL2):
        row = begin + pair % BL2
        dh = tl.zeros((BL1 * BL2, BR), tl.float32)
        for start in range(0, outputs, BO):
            o = start + tl.arange(0, BO)
            at = dy + batch * dy_batch
            left = load_pairs(at, k, length, dy_row, row, length_other, dy_other, o, outputs, dy_column)
            weight = operand(load_tile(out, o, outputs, out_row, r, rank, out_column), left.dtype)
            dh = multiply(left, weight, dh, PRECISION)
        total += dh * load_tile(other + batch * length_other * rank, row, length_other, rank, r, rank, 1).to(tl.float32)
    if out.dtype.element_ty == tl.int8:
        total *= UNIT
    total = tl.sum(tl.reshape(scaled(total, sigma, r, rank, sigma_stride, SCALED), (BL1, BL2, BR)), 1)
    store_tile(dx + batch * length * rank, total, first + tl.arange(0, BL1), length, rank, r, rank, 1)


@triton.jit
def cp_pairs_weight_gradient(
    dy, p, q, sigma, dw,
    length1, length2, rank, outputs, tiles, tiles1, tiles2, part,
    dy_batch, dy_row, dy_other, dy_column, sigma_stride,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BL1: tl.constexpr, BL2: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """A block of outputs by a block of components, of `part` of the tiles of pairs: Σ_kl dy_klo σ_r p_kr q_lr."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    split = tl.program_id(2)
    pair = tl.arange(0, BL1 * BL2)
    wide = tl.full([], 0, tl.int64)
    total = tl.zeros((BO, BR), tl.float32)
    for index in range(split * part, tl.minimum(split * part + part, tiles)):
        batch = wide + index // (tiles1 * tiles2)
        k = (index // tiles2 % tiles1) * BL1 + pair // BL2
        row = (index % tiles2) * BL2 + pair % BL2
        product = pair_product(p, q, sigma, batch, k, length1, row, length2, r, rank, sigma_stride, SCALED)
        gradient = load_pairs(dy + batch * dy_batch, k, length1, dy_row, row, length2, dy_other, o, outputs, dy_column)
        total = multiply(tl.trans(gradient), product, total, PRECISION)
    store_tile(dw + (wide + split) * outputs * rank, total, o, outputs, rank, r, rank, 1)


@cache
def pair_tiles(length2: int, outputs: int, exact: bool) -> dict[str, int]:
    """Block sizes and warps of CP's pairs."""
    blocks = {"BL2": 16 if length2 <= 16 else 32, "BR": 32, "BO": tile(outputs, 32 if exact else 128)}
    warps = 8 if blocks["BO"] > 16 else 4
    return blocks | {"BL1": (32 if exact else 64) // blocks["BL2"], "num_warps": warps, "num_stages": 2} | OPTIONS


@cache
def gradient_tiles(length2: int, rank: int, outputs: int, weight: bool, exact: bool) -> dict[str, int]:
    """Block sizes and warps of the backward.

    Args:
        length2: rows of the input that the gradient sums over.
        weight: whether that of the output's projection is taken.
    """
    blocks = {"BL2": 16 if length2 <= 16 else 32, "BR": 32 if exact or rank <= 32 else 64}
    if weight:
        blocks |= {"BO": tile(outputs, 32 if exact else 64)}
    else:
        blocks |= {"BO": 16 if exact else 32}
    warps = 8 if weight and blocks["BO"] * blocks["BR"] > 2048 else 4
    return blocks | {"BL1": (32 if exact else 64) // blocks["BL2"], "num_warps": warps, "num_stages": 2} | OPTIONS


def launch_cp_pairs(p: Tensor, q: Tensor, out: Tensor, sigma: Tensor | None, bias: Tensor | None) -> Tensor:
    """All pairs of contiguous projected inputs in one launch; shapes as of `fused_cp_pairs`."""
    (batch, length1, rank), length2, outputs = p.shape, q.shape[1], out.shape[0]
    y = torch.empty(batch, length1, length2, outputs, dtype=p.dtype, device=p.device)
    blocks = pair_tiles(length2, outputs, exact(p))
    tiles1, tiles2 = triton.cdiv(length1, blocks["BL1"]), triton.cdiv(length2, blocks["BL2"])
    cp_pairs[batch * tiles1 * tiles2, triton.cdiv(outputs, blocks["BO"])](
        p, q, out, sigma, bias, y, length1, length2, rank, outputs, tiles1, tiles2, *out.stride(),
        1 if sigma is None else sigma.stride(0), 1 if bias is None else bias.stride(0),
        SCALED=sigma is not None, BIASED=bias is not None, PRECISION=precision(p.dtype), **blocks,
    )  # fmt: skip
    return y


def launch_cp_pairs_gradient(
    dy: Tensor,  # (B, L, M, O)
    other: Tensor,  # (B, M, R), contiguous
    out: Tensor,  # (O, R)
    sigma: Tensor | None,  # (R,)
) -> Tensor:  # (B, L, R)
    """The gradient of the first projected input; of the second with `dy` transposed and the first as `other`."""
    (batch, length, length_other, outputs), rank = dy.shape, other.shape[2]
    dx = torch.empty(batch, length, rank, dtype=other.dtype, device=other.device)
    blocks = gradient_tiles(length_other, rank, outputs, False, exact(other))
    tiles = triton.cdiv(length, blocks["BL1"])
    cp_pairs_gradient[(batch * tiles * triton.cdiv(rank, blocks["BR"]),)](
        dy, other, out, sigma, dx, length, length_other, rank, outputs, tiles, *dy.stride(), *out.stride(),
        1 if sigma is None else sigma.stride(0),
        SCALED=sigma is not None, PRECISION=precision(other.dtype), **blocks,
    )  # fmt: skip
    return dx


def launch_cp_pairs_weight_gradient(dy: Tensor, p: Tensor, q: Tensor, sigma: Tensor | None) -> Tensor:
    """The gradient (O, R) of the output's projection, summed from a few parts of the pairs."""
    (batch, length1, length2, outputs), rank = dy.shape, p.shape[2]
    blocks = gradient_tiles(length2, rank, outputs, True, exact(p))
    tiles1, tiles2 = triton.cdiv(length1, blocks["BL1"]), triton.cdiv(length2, blocks["BL2"])
    blocks_r, blocks_o = triton.cdiv(rank, blocks["BR"]), triton.cdiv(outputs, blocks["BO"])
    part, splits = shares(batch * tiles1 * tiles2, blocks_r * blocks_o)
    dw = torch.empty(splits, outputs, rank, dtype=p.dtype if splits == 1 else torch.float32, device=p.device)
    cp_pairs_weight_gradient[blocks_r, blocks_o, splits](
        dy, p, q, sigma, dw, length1, length2, rank, outputs, batch * tiles1 * tiles2, tiles1, tiles2, part,
        *dy.stride(), 1 if sigma is None else sigma.stride(0),
        SCALED=sigma is not None, PRECISION=precision(p.dtype), **blocks,
    )  # fmt: skip
    return dw[0] if splits == 1 else dw.sum(0).to(p.dtype)
