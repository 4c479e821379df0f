"""CP (Hitchcock, 1927; Carroll and Chang, 1970; Harshman, 1970) at a rank, to an error or within a size."""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import CPRank, MaxError, MaxSize, Quantize, check_quantize
from ..errors import AmplificationWarning, InfeasibleError
from ._als import AMPLIFICATION_LIMIT
from ._budget import Budget, Progress
from ._cp_levels import is_small, solve
from ._factors import CPDecomposition
from ._sizes import check_cp_rank, check_weight, cp_bytes, most_rank
from ._source import Source, full_precision

_CLOSE = 1.03  # between a rank that meets an error and one that does not: closer costs more solves than it saves bytes
_LEAST_STEP, _MOST_STEP = 1.1, 3.0  # to the next rank while none meets the error: further, a power law guesses badly
_INSIDE = 0.15  # of a bracket (in log rank) that a step must cut off, so that a bad guess still shrinks it
_SHARE = 0.3  # of the time left, for one solve of a search
_ENOUGH = 0.999  # of the error that is asked for, where the solves of a search stop: the rest is for rounding


def cp(
    weight: Tensor,  # (O, I, J)
    rank: CPRank,
    *,
    seed: int = 0,
    quantize: Quantize | None = None,
    max_seconds: float | None = None,
    progress: Progress | None = None,
) -> CPDecomposition:
    """Decompose a three-way weight into a sum of R rank-one tensors.

    A weight with a mode of size 1 is a matrix and is solved exactly by its SVD.

    Args:
        weight: (O, I, J), any floating dtype, on any device.
        rank: R, which may exceed the modes' sizes, but not the least product of two of them, at which every tensor
            is exact; or `MaxError(e)`, the smallest rank found with relative error at most e, after the factors are
            rounded to the weight's dtype; or `MaxSize(f)`, the largest rank within f of the weight's bytes.
        seed: of the random starts. The same seed gives the same result, up to rounding on another number of threads.
        quantize: the format in which the caller will store the result. It changes the bytes that are counted, and the
            penalty on large components, to what rounding them is expected to add to the squared error.
        max_seconds: time after which the best so far is returned; None goes on to convergence. At least one sweep is
            made. With a limit, results depend on the machine's speed, and a `MaxError` that has not been met by then is
            infeasible.
        progress: called with the part done and the relative error so far.

    Returns:
        A `CPDecomposition` in the weight's dtype and device: unit columns, components by descending weight. Its
        `error` is the true residual in float64 after that rounding. Besides the weight, the solver holds at most
        three times its bytes; twice that for weights of nearly that rank, and of under 2¹⁶ elements: those in float64.

    Warns:
        AmplificationWarning: components cancel, by an `amplification` above 3.

    Raises:
        CompressionError: the weight is not three-way, floating, finite and non-empty.
        ConfigError: the rank is not positive, or above min(OI, OJ, IJ); or `max_seconds` is not positive.
        InfeasibleError: no rank that stores fewer bytes than the weight meets the target, or none did in time.
    """
    check_weight(weight)
    check_quantize(quantize)
    budget = Budget(max_seconds, progress)
    if isinstance(rank, MaxSize):
        rank = _affordable(weight, rank, quantize)
    elif not isinstance(rank, MaxError):
        check_cp_rank(rank, weight.shape)
    with full_precision(weight.device):
        source = Source(weight)
        if isinstance(rank, MaxError):
            result = _least_rank(weight, source, rank, seed, quantize, budget)
        else:
            result = _as_result(weight, source, solve(source, rank, seed, budget, quantize))
    if result.amplification > AMPLIFICATION_LIMIT:
        warnings.warn(
            f"The CP components of rank {result.rank} cancel: amplification {result.amplification:.3g}, error "
            f"{result.error:.3g}. 8-bit rounding of the factors, about 1%, will be amplified as much.",
            AmplificationWarning,
            stacklevel=2,
        )
    return result


def cp_sketch(
    weight: Tensor,  # (O, I, J)
    rank: int,
    *,
    sweeps: int,
    seed: int = 0,
    quantize: Quantize | None = None,
    budget: Budget | None = None,
    begin: CPDecomposition | None = None,
) -> CPDecomposition:
    """`cp` of a weight in the coordinates of its HOSVD (see `ordered`), by a limited number of sweeps.

    Args:
        sweeps: over the whole weight, at most; fewer go over its leading blocks before.
        begin: a decomposition of this rank to go on from, instead of the HOSVD.

    Raises: ConfigError where the rank is not positive, or above min(OI, OJ, IJ).
    """
    check_cp_rank(rank, weight.shape)
    with full_precision(weight.device):
        source = Source(weight)
        start = None if begin is None or source.total == 0 else _resized(source, begin, rank, seed)
        factors = solve(source, rank, seed, budget or Budget(), quantize, start, sweeps=sweeps)
        return _as_result(weight, source, factors)


def _as_result(weight: Tensor, source: Source, factors: Sequence[Tensor]) -> CPDecomposition:
    """Normalised, sorted, rounded to the weight's dtype and measured; factors are of the weight over its norm."""
    wide = [factor.double() for factor in factors]
    norms = torch.stack([factor.norm(dim=0) for factor in wide])
    weights = norms.prod(0)
    order = weights.argsort(descending=True, stable=True)
    columns = [(f / n.where(n > 0, 1.0))[:, order] for f, n in zip(wide, norms, strict=True)]
    out, in1, in2 = (column.to(weight.dtype) for column in columns)
    scaled = weights[order] * (math.sqrt(source.total) / source.scale)
    result = CPDecomposition(scaled.to(torch.promote_types(weight.dtype, torch.float32)), (out, in1, in2))
    return CPDecomposition(result.weights, result.factors, result.relative_error(weight))


def _affordable(weight: Tensor, target: MaxSize, quantize: Quantize | None) -> int:
    """The largest rank within the budget; InfeasibleError where there is none."""
    each = cp_bytes(1, weight.shape, weight.element_size(), quantize)
    original = weight.numel() * weight.element_size()
    budget = target.fraction * original
    if each > budget:
        raise InfeasibleError(
            f"Rank 1 stores {each} bytes. MaxSize({target.fraction:.4g}) of the weight's {original} bytes allows "
            f"{int(budget)}."
        )
    return min(int(budget // each), most_rank(weight.shape))


def _least_rank(
    weight: Tensor, source: Source, target: MaxError, seed: int, quantize: Quantize | None, budget: Budget
) -> CPDecomposition:
    """The smallest rank found whose error, after rounding to the weight's dtype, meets the target."""
    limit, itemsize = target.error, weight.element_size()
    original = weight.numel() * itemsize
    most = max(1, min((original - 1) // cp_bytes(1, weight.shape, itemsize, quantize), most_rank(weight.shape)))
    least = _rank_floor(source, limit)
    if least > most:
        raise InfeasibleError(
            f"A relative error of {limit:g} needs a CP rank of at least {least} (the rank of an unfolding to that "
            f"error): {cp_bytes(least, weight.shape, itemsize, quantize)} bytes, where the weight has {original}."
        )
    rank, tried = least, 0
    missed: CPDecomposition | None = None  # of the largest rank that misses the limit
    found: CPDecomposition | None = None  # of the least rank that meets it
    while tried == 0 or (not _is_close(missed, found, most) and budget.left() > 0):
        part = budget.child(_SHARE, (tried / (tried + 4), (tried + 1) / (tried + 5)))
        near = found or missed
        if near is None or is_small(source, rank):
            factors = solve(source, rank, seed, part, quantize)
        else:
            begin = _resized(source, near, rank, seed)
            factors = solve(source, rank, seed, part, quantize, begin, _ENOUGH * limit)
        result = _as_result(weight, source, factors)
        tried += 1
        if _error(result) <= limit:
            found = result
        else:
            missed = result
            rank = min(_larger(result, limit), most)
        if missed is not None and found is not None:
            rank = _between(missed, found, limit)
    if found is not None:
        return found
    assert missed is not None
    if missed.rank == most:
        raise InfeasibleError(
            f"A relative error of {limit:g} needs a CP rank above {most}, the largest that is smaller than the "
            f"weight's {original} bytes; the error there is {missed.error:.4g}."
        )
    raise InfeasibleError(
        f"No CP met a relative error of {limit:g} within {budget.max_seconds:g} s; the lowest was "
        f"{missed.error:.4g}, at rank {missed.rank}."
    )


def _error(found: CPDecomposition) -> float:
    return math.inf if found.error is None else found.error


def _is_close(missed: CPDecomposition | None, found: CPDecomposition | None, most: int) -> bool:
    """Whether another rank is not worth trying: there is none between the two, or none below or above them."""
    if missed is None or found is None:
        return missed is None or missed.rank == most
    return found.rank <= max(_CLOSE * missed.rank, missed.rank + 1)


def _larger(missed: CPDecomposition, limit: float) -> int:
    """A rank that meets the limit, if the error falls with the square root of the rank; not too far away."""
    step = min(max((_error(missed) / limit) ** 2, _LEAST_STEP), _MOST_STEP)
    return max(math.ceil(missed.rank * step), missed.rank + 1)


def _between(missed: CPDecomposition, found: CPDecomposition, limit: float) -> int:
    """Where a power law through the two meets the limit, but well within them."""
    part = math.log(_error(missed) / limit) / math.log(_error(missed) / max(_error(found), 1e-300))
    rank = missed.rank * (found.rank / missed.rank) ** min(max(part, _INSIDE), 1 - _INSIDE)
    return min(max(round(rank), missed.rank + 1), found.rank - 1)


def _resized(source: Source, near: CPDecomposition, rank: int, seed: int) -> list[Tensor]:
    """Factors for the weight over its norm: the strongest components of `near`, and small random ones for the rest."""
    kept = min(rank, near.rank)
    weights = near.weights[:kept].double() * (source.scale / math.sqrt(source.total))
    factors = [(factor[:, :kept].double() * weights.pow(1 / 3)) for factor in near.factors]
    generator = torch.Generator().manual_seed(seed)
    scale = float(weights.min().pow(1 / 3))
    fresh = [torch.randn(len(f), rank - kept, generator=generator, dtype=torch.float64, device="cpu") for f in factors]
    fresh = [f * (scale / f.norm(dim=0).clamp_min(1e-300)) for f in fresh]
    return [torch.cat([f, g.to(f)], dim=1).to(source.dtype) for f, g in zip(factors, fresh, strict=True)]


def _rank_floor(source: Source, limit: float) -> int:
    """A rank that CP needs for the error: the largest matrix rank that one of the unfoldings needs for it."""
    floor = 1
    for mode in range(3):
        energy = torch.linalg.eigvalsh(source.gram(mode)).clamp_min(0)  # ascending, so tails are summed exactly
        lost = energy.cumsum(0) / energy.sum().clamp_min(1e-300)
        floor = max(floor, int((lost > limit**2 * (1 + 1e-9) + 1e-15).sum()))
    return floor
