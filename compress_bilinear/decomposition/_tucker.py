"""Tucker: HOSVD for the start and for the choice of ranks, HOOI to refine.

Sources: De Lathauwer, De Moor, Vandewalle, "A multilinear singular value decomposition" and "On the best rank-1 and
rank-(R1, ..., RN) approximation" (SIAM J. Matrix Anal. Appl., 2000); Vannieuwenhoven, Vandebril, Meerbergen, "A new
truncation strategy for the higher-order singular value decomposition" (SIAM J. Sci. Comput., 2012).
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..config import MaxError, MaxSize, Quantize, TuckerRank, check_quantize
from ._budget import Budget, Progress
from ._factors import Factors, TuckerDecomposition, relative
from ._hosvd import start, truncated
from ._search import tightened
from ._sizes import check_tucker_rank, check_weight
from ._source import Basis, Source, full_precision, gram, leading, mode_product, turned_
from ._tucker_ranks import Target, Triple, best_block

_MAX_SWEEPS = 30
_TOLERANCE = 5e-4  # HOOI stops where a sweep lowers the error by less than this part of it
_GRAM_LIMIT = 1e-11  # squared relative error near which singular values are lost in a Gram's rounding
_NARROW_LIMIT = 1e-4  # the same for float32, with room
_ITERATED = 1024  # size of a mode from which on eigenvectors cost more than an orthogonal iteration
_FEW_SWEEPS = 4  # while ranks are still being chosen
_ROUNDS = 2  # of widening the ranks and choosing again; the first gains a few per cent, a third nothing


def tucker(
    weight: Tensor,  # (O, I, J)
    rank: TuckerRank,
    *,
    quantize: Quantize | None = None,
    max_seconds: float | None = None,
    progress: Progress | None = None,
) -> TuckerDecomposition:
    """Decompose a three-way weight into a core and three factors with orthonormal columns.

    A mode whose rank is its size has the identity for its factor: it is absorbed into the core, which is smaller and
    loses nothing. So a target may give Tucker-2 or tensor-train shapes, wherever these are the cheapest. Costs are
    those of `TuckerBilinear`, which stores a factor (d, r) with r > 3 d / 4 as r (d − r) numbers: see `interpolation`.

    Args:
        weight: (O, I, J), any floating dtype, on any device.
        rank: the triple (R_o, R_i, R_j); or `MaxError(e)`, the fewest bytes with a relative error of at most e, after
            the factors are rounded to the weight's dtype; or `MaxSize(f)`, the lowest error within f of the weight's
            bytes.
        quantize: the format in which the caller will store the result; it only changes the bytes that are counted.
        max_seconds: time to refine in; the start, an HOSVD, is always completed. None refines to convergence.
        progress: called with the part done and the relative error so far.

    Returns:
        A `TuckerDecomposition` in the weight's dtype and device; its `error` is the true residual in float64 after
        that rounding. Besides the weight, the solver holds at most three times its bytes; more for weights of under
        2¹⁶ elements, which it works on in float64.

    Raises:
        CompressionError: the weight is not three-way, floating, finite and non-empty.
        ConfigError: a rank is not within 1..size of its mode, or an option is not one of those above.
        InfeasibleError: not even the smallest ranks are within a `MaxSize`.
    """
    check_weight(weight)
    check_quantize(quantize)
    budget = Budget(max_seconds, progress)
    with full_precision(weight.device):
        if isinstance(rank, (MaxError, MaxSize)):
            return _to_target(weight, rank, quantize, budget)
        check_tucker_rank(rank, weight.shape)
        source = Source(weight)
        basis = start(source, rank, torch.Generator().manual_seed(0))[0]  # the core goes
        return _result(weight, source, refine(source, basis, budget))


def _to_target(
    weight: Tensor, target: MaxError | MaxSize, quantize: Quantize | None, budget: Budget
) -> TuckerDecomposition:
    source = Source(weight)
    square = [leading(source.gram(mode), size, source.dtype) for mode, size in enumerate(source.shape)]

    def attempt(wanted: MaxError | MaxSize) -> TuckerDecomposition:
        aim = Target(wanted, source.shape, weight.element_size(), quantize)
        return _result(weight, source, _chosen(source, square, aim, budget))

    def within(error: float) -> tuple[TuckerDecomposition, float]:
        result = attempt(MaxError(error))
        return result, result.error or 0.0

    if isinstance(target, MaxSize):
        return attempt(target)
    result, error = tightened(within, target.error)  # the factors are rounded to the weight's dtype
    # else the weight itself, with all modes absorbed, for which nothing is rounded
    return result if error <= target.error else _result(weight, source, (None, None, None))


def _result(weight: Tensor, source: Source, basis: Basis) -> TuckerDecomposition:
    core = source.project(basis)
    core = core if source.scale == 1.0 else core.double() / source.scale
    factors = [
        torch.eye(size, dtype=weight.dtype, device=weight.device) if u is None else u.to(weight.dtype)
        for size, u in zip(source.shape, basis, strict=True)
    ]
    result = TuckerDecomposition(core.to(weight.dtype), cast(Factors, tuple(factors)))
    return TuckerDecomposition(result.core, result.factors, result.relative_error(weight))


def refine(
    source: Source, basis: Basis, budget: Budget, sweeps: int = _MAX_SWEEPS, *, quiet: bool = False
) -> list[Tensor | None]:
    """Higher-order orthogonal iteration: each factor is the best for the other two, until the error settles.

    `quiet` reports no progress: the error is not that of ranks that were asked for.
    """
    basis = list(basis)
    part: Tensor | None = None
    modes = [mode for mode in range(3) if basis[mode] is not None]
    energy, exact, narrow = 0.0, False, source.dtype != torch.float64
    # the product with the last mode serves the first two, unless it is nearly as large as the weight
    shared = {0, 1, 2} == set(modes) and 2 * basis[2].shape[1] <= basis[2].shape[0]  # type: ignore[union-attr]
    for k in range(sweeps if modes else 0):
        before, part = energy, None
        partial = source.project((None, None, basis[2])) if shared else None
        for mode in modes:
            part = None  # before the next is made
            if partial is None or mode == 2:
                part = source.project(basis, skip=mode)
            else:
                part = mode_product(partial, basis[1 - mode], 1 - mode)
            if mode == 1:
                partial = None
            precision = source.dtype if narrow else torch.float64
            basis[mode], energy = _dominant(part, mode, basis[mode], exact, precision)  # type: ignore[arg-type]
        lost = max(source.total - energy, 0.0)
        used, narrow = narrow, narrow and lost > _NARROW_LIMIT * source.total
        if not quiet:
            budget.report(k / sweeps, relative(lost, source.total))
        # with one mode there is nothing to alternate with
        settled = len(modes) == 1 or (k and energy - before <= 2 * _TOLERANCE * lost)
        if budget.left() <= 0 or (settled and (narrow or not used)):
            if exact or lost > _GRAM_LIMIT * source.total or source.dtype != torch.float64:
                break
            exact = True  # and go on, for what Grams cannot see
    return basis


def _dominant(tensor: Tensor, mode: int, current: Tensor, exact: bool, precision: torch.dtype) -> tuple[Tensor, float]:
    """The dominant left singular vectors of an unfolding, as many as there are now, and their energy.

    Where they are few among many, by one step of orthogonal iteration from the present ones: near convergence it is
    as good, and costs a fraction of the eigenvectors. `exact` takes no Gram, which would square small singular values;
    else `precision` is that of the Gram.
    """
    size, kept = current.shape
    if exact:
        flat = tensor.movedim(mode, 0).flatten(1)
        left, singular, _ = torch.linalg.svd(flat, full_matrices=False)
        if left.shape[1] < kept:  # of fewer columns than asked for, completed to an orthonormal basis
            left = torch.linalg.qr(torch.cat([left, current], dim=1))[0]
        return left[:, :kept].contiguous(), float(singular[:kept].square().sum())
    if size >= _ITERATED and 3 * kept <= size:
        flat = tensor.movedim(mode, 0).flatten(1)
        basis = torch.linalg.qr(flat @ (flat.T @ current))[0]
        return basis, float((basis.T @ flat).double().square().sum())
    values, vectors = torch.linalg.eigh(gram(tensor, mode, precision))
    return vectors[:, -kept:].flip(1).to(tensor.dtype), float(values[-kept:].sum(dtype=torch.float64))


def _chosen(source: Source, square: Sequence[Tensor], target: Target, budget: Budget) -> Basis:
    """The best ranks for a target, and bases for them.

    The first choice is exact for the full HOSVD. From it, HOOI at slightly larger ranks packs more energy into a
    smaller block, in which the choice is made again; within that block ranks are then lowered while HOOI still meets
    the target.
    """
    target.check_feasible()
    first = best_block(source.rotate(square), 0.0, source.total, target) if source.total else None
    if first is None:
        return truncated(source, (1, 1, 1))[0]
    best_key, rank = first
    best: Basis = _columns(square, rank)
    budget.report(0.1, relative(source.lost(best), source.total))
    ordered = square
    for k in range(_ROUNDS):
        if budget.left() <= 0:
            break
        ordered, rank, packed = _packed(source, ordered, rank, target, budget)
        lost = source.lost(packed)
        budget.report(0.1 + 0.8 * (k + 1) / _ROUNDS, relative(lost, source.total))
        if not target.key(rank, lost) < best_key or not target.meets(rank, lost, source.total):
            break
        best_key, best = target.key(rank, lost), packed
    refined = refine(source, best, budget.child(span=(0.9, 1.0)))
    lost = source.lost(refined)
    rank = _rank(source, best)
    return refined if target.meets(rank, lost, source.total) and target.key(rank, lost) <= best_key else best


def _packed(
    source: Source, basis: Sequence[Tensor], rank: Triple, target: Target, budget: Budget
) -> tuple[list[Tensor], Triple, Basis]:
    """Bases of slightly larger ranks, ordered; and in them the best ranks for the target, and their bases."""
    wide = [min(size, r + max(2, r // 6)) for size, r in zip(source.shape, rank, strict=True)]
    found = refine(source, _columns(basis, wide), budget, _FEW_SWEEPS, quiet=True)
    outside = source.lost(found)
    ordered, core = _ordered(source, found)
    again = best_block(core, outside, source.total, target)
    if again is None:  # too little is inside
        return ordered, rank, _columns(basis, rank)
    rank, inner = _lowered(Source(core), outside, again[1], source.total, target, budget)
    return ordered, rank, [_lift(u, v, d) for u, v, d in zip(ordered, inner, source.shape, strict=True)]


def _rank(source: Source, basis: Basis) -> Triple:
    out, in1, in2 = (size if u is None else u.shape[1] for size, u in zip(source.shape, basis, strict=True))
    return out, in1, in2


def _columns(basis: Sequence[Tensor], rank: Sequence[int]) -> Basis:
    """The leading columns; None where all of them are kept, which is the identity in other coordinates."""
    return [None if r == u.shape[0] else u[:, :r].contiguous() for u, r in zip(basis, rank, strict=True)]


def _lift(basis: Tensor, inner: Tensor | None, size: int) -> Tensor | None:
    """A basis within a subspace, as one of the whole space."""
    lifted = basis if inner is None else basis @ inner.to(basis.dtype)
    return None if lifted.shape[1] == size else lifted


def _ordered(source: Source, basis: Basis) -> tuple[list[Tensor], Tensor]:
    """The same subspaces in the coordinates of the HOSVD of their own core, and that core."""
    core = source.project(basis)
    ordered: list[Tensor] = []
    for mode, u in enumerate(basis):
        turn = leading(gram(core, mode), core.shape[mode], source.dtype)
        turned_(core, turn, mode)
        ordered.append(turn if u is None else u @ turn)
    return ordered, core


def _cheaper(rank: Triple, target: Target) -> list[Triple]:
    """For each mode, the next lower rank that costs less: near three quarters of a size, one below may cost more."""
    found: list[Triple] = []
    for mode in range(3):
        for lower in range(rank[mode] - 1, 0, -1):
            out, in1, in2 = (lower if m == mode else r for m, r in enumerate(rank))
            if target.price((out, in1, in2)) < target.price(rank):
                found.append((out, in1, in2))
                break
    return found


def _lowered(
    core: Source, outside: float, rank: Triple, total: float, target: Target, budget: Budget
) -> tuple[Triple, Basis]:
    """Ranks lowered one at a time while HOOI within the core meets a `MaxError`; the core's leading block meets it."""
    identity = [torch.eye(size, dtype=core.dtype, device=core.weight.device) for size in core.shape]
    basis: Basis = _columns(identity, rank)
    del identity
    if not isinstance(target.wanted, MaxError):
        return rank, basis
    lowered = True
    while lowered and budget.left() > 0:
        lowered = False
        ordered = _ordered(core, basis)[0]
        for candidate in sorted(_cheaper(rank, target), key=target.price):
            trial = refine(core, _columns(ordered, candidate), budget, _FEW_SWEEPS, quiet=True)
            if target.meets(candidate, outside + core.lost(trial) / core.scale**2, total):
                rank, basis, lowered = candidate, trial, True
                break
    return rank, basis
