"""The smallest CP rank for an error: growth until it is met, then a closing bracket, each solve begun from the last."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..config import MaxError, Quantize
from ..errors import InfeasibleError
from ._budget import Budget
from ._cp_solve import as_result, is_small, solve
from ._factors import CPDecomposition
from ._sizes import cp_bytes, most_rank
from ._source import Source

_QUICK = 0.3  # effort of the solves that only tell where to look
_ENOUGH = 0.999  # of the error asked for, to leave room for rounding
_SHARE = 0.3  # of the time left, for one solve


def search(
    weight: Tensor, source: Source, target: MaxError, seed: int, quantize: Quantize | None, budget: Budget
) -> CPDecomposition:
    """The smallest rank found whose error, after rounding to the weight's dtype, meets the target.

    Ranks are bracketed to within 3%. The error falls about as a power of the rank, which tells where to look next.
    """
    limit, itemsize = target.error, weight.element_size()
    original = weight.numel() * itemsize
    most = max(1, min((original - 1) // cp_bytes(1, weight.shape, itemsize, quantize), most_rank(weight.shape)))
    low = _rank_floor(source, limit) - 1  # known to fail
    if low >= most:
        raise InfeasibleError(
            f"A relative error of {limit:g} needs a CP rank of at least {low + 1} (the rank of an unfolding to that "
            f"error): {cp_bytes(low + 1, weight.shape, itemsize, quantize)} bytes, where the weight has {original}."
        )
    attempt = _attempts(weight, source, seed, quantize, budget, _ENOUGH * limit)
    rank, low_error = low + 1, 1.0
    found = best = attempt(rank, None)
    while found.error > limit:  # type: ignore[operator]
        if found.error < best.error:  # type: ignore[operator]
            best = found
        if rank >= most:
            raise InfeasibleError(
                f"A relative error of {limit:g} needs a CP rank above {most}, the largest that is smaller than the "
                f"weight's {original} bytes; the error there is {found.error:.4g}."
            )
        if budget.left() <= 0:
            raise InfeasibleError(
                f"No CP met a relative error of {limit:g} within {budget.max_seconds:g} s; the lowest was "
                f"{best.error:.4g}, at rank {best.rank}."
            )
        low, low_error = rank, found.error or 0.0
        rank = min(most, max(rank + 1, min(3 * rank, _guess(rank, low_error, limit))))
        found = attempt(rank, found)
    while found.rank - low > max(1, found.rank // 32) and budget.left() > 0:
        rank = _between(low, low_error, found.rank, found.error or 0.0, limit)
        trial = attempt(rank, found)
        if trial.error <= limit:  # type: ignore[operator]
            found = trial
        else:
            low, low_error = rank, trial.error or 0.0
    return found


def _attempts(
    weight: Tensor, source: Source, seed: int, quantize: Quantize | None, budget: Budget, enough: float
) -> Callable[[int, CPDecomposition | None], CPDecomposition]:
    """A solve at a rank, begun from a solution at another, or from scratch where that costs little."""
    count = 0

    def attempt(rank: int, near: CPDecomposition | None) -> CPDecomposition:
        nonlocal count
        begin, end = count / (count + 4), (count + 1) / (count + 5)
        count += 1
        seconds = _SHARE * max(budget.left(), 1e-3) if budget.limited else None
        limited = Budget(seconds, lambda done, error: budget.report(begin + (end - begin) * done, error))
        if near is None or is_small(source, rank):
            solved = solve(source, rank, seed, limited, quantize=quantize)
        else:
            solved = solve(source, rank, seed, limited, _resized(source, near, rank, seed), _QUICK, enough, quantize)
        return as_result(weight, source, solved.factors)

    return attempt


def _resized(source: Source, near: CPDecomposition, rank: int, seed: int) -> list[Tensor]:
    """Its strongest components, and small random ones for what is missing; of the weight over its norm."""
    kept = min(rank, near.rank)
    weights = near.weights[:kept].double() * (source.scale / math.sqrt(source.total))
    factors = [(factor[:, :kept].double() * weights.pow(1 / 3)) for factor in near.factors]
    generator = torch.Generator().manual_seed(seed)
    scale = float(weights.min().pow(1 / 3))
    fresh = [torch.randn(len(f), rank - kept, generator=generator, dtype=torch.float64, device="cpu") for f in factors]
    fresh = [f * (scale / f.norm(dim=0).clamp_min(1e-300)) for f in fresh]
    return [torch.cat([f, g.to(f)], dim=1).to(source.dtype) for f, g in zip(factors, fresh, strict=True)]


def _guess(rank: int, error: float, limit: float) -> int:
    """A rank that may meet the limit: beyond one point, the error is taken to fall with the square root of the rank."""
    return math.ceil(rank * min(3.0, (error / limit) ** 2))


def _between(low: int, low_error: float, high: int, high_error: float, limit: float) -> int:
    """Where a power law through the two points meets the limit, but well within them."""
    margin = max(1, (high - low) // 5)
    fall = math.log(low_error / high_error) if low_error > high_error > 0 else 0.0
    part = math.log(low_error / limit) / fall if fall > 0 else 0.5
    rank = round(low * (high / low) ** min(max(part, 0.0), 1.0)) if low > 0 else (low + high) // 2
    return min(max(rank, low + margin), high - margin)


def _rank_floor(source: Source, limit: float) -> int:
    """The largest over the modes of the matrix rank that the unfolding needs for the error: CP needs it too."""
    floor = 1
    for mode in range(3):
        energy = torch.linalg.eigvalsh(source.gram(mode)).clamp_min(0)  # ascending, so tails are summed exactly
        lost = energy.cumsum(0) / energy.sum().clamp_min(1e-300)
        floor = max(floor, int((lost > limit**2 * (1 + 1e-9) + 1e-15).sum()))
    return floor
