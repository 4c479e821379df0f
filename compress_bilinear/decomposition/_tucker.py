"""Tucker: HOSVD for the start and for the choice of ranks, HOOI to refine.

Sources: De Lathauwer, De Moor, Vandewalle, "A multilinear singular value decomposition" and "On the best rank-1 and
rank-(R1, ..., RN) approximation" (SIAM J. Matrix Anal. Appl., 2000). Grams and cores are in float64: a float32 Gram
loses every singular value below 1e-3 of the largest.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..config import MaxError, MaxSize, Quantize, TuckerRank, check_quantize
from ..errors import InfeasibleError
from ._rank import check_tucker_rank, check_weight, tucker_bytes
from ._types import Factors, TuckerDecomposition

_MAX_SWEEPS = 30
_TOLERANCE = 1e-7  # HOOI stops where a sweep lowers the error by less than this part of it


def tucker(
    weight: Tensor,  # (O, I, J)
    rank: TuckerRank,
    *,
    quantize: Quantize | None = None,
) -> TuckerDecomposition:
    """Decompose a three-way weight into a core and three factors with orthonormal columns.

    Args:
        weight: (O, I, J), any floating dtype, on any device.
        rank: the triple (R_o, R_i, R_j); or `MaxError(e)`, the fewest bytes with relative error at most e,
            before the factors are rounded to the weight's dtype; or `MaxSize(f)`, the lowest error within f of the
            weight's bytes.
        quantize: the format in which the caller will store the result; it only changes the bytes that are counted.

    Returns:
        A `TuckerDecomposition` in the weight's dtype and device; its `error` is the true residual in float64 after
        that rounding.

    Raises:
        CompressionError: the weight is not three-way, floating, finite and non-empty.
        ConfigError: a rank is not within 1..size of its mode.
        InfeasibleError: no triple meets the target.
    """
    check_weight(weight)
    check_quantize(quantize)
    wide = weight.detach().double()
    peak = float(wide.abs().max())
    wide = wide / peak if peak > 0 else wide  # squares of 1e-200 or 1e+200 leave float64's range
    if isinstance(rank, (MaxError, MaxSize)):
        basis = [leading(wide, mode, wide.shape[mode]) for mode in range(3)]
        rank = _choose(project(wide, basis), rank, weight.element_size(), quantize)
        basis = [u[:, :r] for u, r in zip(basis, rank, strict=True)]
    else:
        check_tucker_rank(rank, weight.shape)
        basis = truncated(wide, rank)
    basis = refine(wide, basis)
    core = project(wide, basis) * (peak if peak > 0 else 1.0)
    result = TuckerDecomposition(core.to(weight.dtype), cast(Factors, tuple(u.to(weight.dtype) for u in basis)))
    return TuckerDecomposition(result.core, result.factors, result.relative_error(weight))


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """The mode's unfolding: (d_mode, product of the others)."""
    return tensor.movedim(mode, 0).flatten(1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Tensor ×_mode matrixᵀ for a matrix (d_mode, r): the axis d_mode becomes r."""
    return torch.tensordot(tensor, matrix, dims=([mode], [0])).movedim(-1, mode)


def leading(tensor: Tensor, mode: int, count: int) -> Tensor:
    """The `count` leading left singular vectors of an unfolding (d, count), by its Gram matrix."""
    flat = unfold(tensor, mode)
    vectors: Tensor = torch.linalg.eigh(flat @ flat.T)[1]
    return vectors.flip(1)[:, :count].contiguous()


def project(tensor: Tensor, basis: Sequence[Tensor], skip: int | None = None) -> Tensor:
    """Tensor ×_m U_mᵀ over all modes but `skip`, those that shrink most first."""
    order = sorted((mode for mode in range(3) if mode != skip), key=lambda m: basis[m].shape[1] / basis[m].shape[0])
    for mode in order:
        tensor = mode_product(tensor, basis[mode], mode)
    return tensor


def truncated(tensor: Tensor, rank: Sequence[int]) -> list[Tensor]:
    """The sequentially truncated HOSVD (Vannieuwenhoven et al., 2012), the mode that shrinks most first."""
    basis: dict[int, Tensor] = {}
    for mode in sorted(range(3), key=lambda m: rank[m] / tensor.shape[m]):
        basis[mode] = leading(tensor, mode, rank[mode])
        tensor = mode_product(tensor, basis[mode], mode)
    return [basis[mode] for mode in range(3)]


def refine(tensor: Tensor, basis: list[Tensor]) -> list[Tensor]:
    """Higher-order orthogonal iteration: each factor is optimal for the other two, until the error settles."""
    if all(u.shape[0] == u.shape[1] for u in basis):
        return basis
    total = float(tensor.square().sum())
    kept = float(project(tensor, basis).square().sum())
    for _ in range(_MAX_SWEEPS):
        for mode in range(3):
            if basis[mode].shape[0] > basis[mode].shape[1]:  # a square factor has nothing to gain
                basis[mode] = leading(project(tensor, basis, skip=mode), mode, basis[mode].shape[1])
        now = float(project(tensor, basis).square().sum())
        if now - kept <= 2 * _TOLERANCE * max(total - now, 0.0):
            break
        kept = now
    return basis


def _tail(tensor: Tensor, axis: int) -> Tensor:
    """The sum of all entries after each, along an axis."""
    sums = tensor.flip(axis).cumsum(axis).flip(axis)
    return torch.cat([sums.narrow(axis, 1, sums.shape[axis] - 1), torch.zeros_like(sums.narrow(axis, 0, 1))], axis)


def _choose(
    core: Tensor,  # the full HOSVD core (O, I, J)
    target: MaxError | MaxSize,
    itemsize: int,
    quantize: Quantize | None,
) -> tuple[int, int, int]:
    """The best triple under the target, by exact search over all of them.

    The factors are orthogonal, so the squared error of keeping the leading (a, b, c) block of the full core is what
    lies outside that block: cumulative sums give it for every triple.
    """
    energy = core.square()
    total = energy.sum()
    if float(total) == 0:
        return 1, 1, 1
    # summed from the outside, all positive: the total less what is inside would lose errors below 1e-8
    beyond_out = _tail(energy.sum((1, 2)), 0)
    beyond_in1 = _tail(energy.sum(2).cumsum(0), 1)
    beyond_in2 = _tail(energy.cumsum(0).cumsum(1), 2)
    error = ((beyond_out[:, None, None] + beyond_in1[:, :, None] + beyond_in2) / total).sqrt()
    axes = [torch.arange(1, size + 1, device=core.device) for size in core.shape]
    ranks = [axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]]
    size = tucker_bytes(ranks, core.shape, itemsize, quantize).double()
    original = core.numel() * itemsize
    match target:
        case MaxError(error=limit):
            size[error > limit] = torch.inf
            # of the triples that cost the same, the more accurate; the error is below 1 byte's weight
            best = int((size + error).argmin())
        case MaxSize(fraction=fraction):
            budget = fraction * original
            if float(size[0, 0, 0]) > budget:
                raise InfeasibleError(
                    f"Rank (1, 1, 1) stores {int(size[0, 0, 0])} bytes. MaxSize({fraction:.4g}) of the weight's "
                    f"{original} bytes allows {int(budget)}."
                )
            error[size > budget] = torch.inf
            best = int(error.argmin())
    out, in1, in2 = (int(i) for i in torch.unravel_index(torch.tensor(best), core.shape))
    return out + 1, in1 + 1, in2 + 1
