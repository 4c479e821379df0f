"""CP at a given rank: cheap starts on a small core, the best one refined on ever larger ones and on the whole tensor.

The core is that of an HOSVD, whose leading blocks hold most of the energy (the compression of Bro and Andersson, 1998,
in several steps). So a coarse solution, which costs a fraction of a sweep over the whole, is a good start for the next
size. On the whole, sweeps alternate with sweeps on the core that the factors then span.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import Quantize
from ..quantization import FORMATS
from ._als import PENALTY, Iterate, Stage, balanced, descend
from ._budget import Budget
from ._exact import finish, measured_exactly
from ._factors import CPDecomposition
from ._hosvd import Core, Whole, compressed
from ._source import Basis, Source, mode_product
from ._starts import hosvd_start, pencil_start, random_start

AMPLIFICATION_LIMIT = 3.0

_FIRST_PENALTY = 1e-1  # while components find their places
_LEVELS = (0.5, 0.75, 1.0)  # of the core's sizes; starts are tried on the first
_LEVEL_SWEEPS = (30, 30, 40)
_LEVEL_TIMES = (0.08, 0.28, 0.7)  # of the time budget, when each ends; the rest is for the whole tensor
_PENALTIES = (_FIRST_PENALTY, 2e-2, 4e-3, PENALTY, PENALTY)  # where each begins and the last ends
_HURRIED = 0.8  # of a time budget, until the penalty has fallen
_STARTS = 3  # one from the HOSVD, the others random; more where they cost next to nothing
_MOST_STARTS = 24
_SCOUTING = 0.05  # of the time left, at most, for the starts beyond the first
_CHEAP = 2**17  # elements of a core times the rank with which a sweep costs next to nothing
_CYCLES = 4  # of a few sweeps on the whole and more on the core that the factors span
_CYCLE_SWEEPS = 20
_PROJECTION = 0.7  # of a sweep on the whole, about: the time that its core takes
_SWEEPS = 150  # on the whole, after the core
_LAST_SWEEPS = 400  # on a core that is the whole
_FAR_SMALLER = 16  # times fewer elements allow a core that is wider than the rank
_SMALLER = 3  # times fewer elements make a core worth cycles
_EXACT = 1e-3  # squared residual under which a tensor may be exactly of low rank
_FLOAT32_LIMIT = 1e-5  # squared residual under which float64 is needed
_PROMISING = 0.1  # squared residual above which none of that is to be hoped for
_NEWTON_CHEAP = 600  # unknowns with which Newton's method costs less than sweeps
_NEWTON_UNKNOWNS = 3000
_KEPT = 4  # of the starts of a small tensor that are followed to their minima
_ZERO = 1e-13  # squared residual
_FORMAT_ZERO = 1e-8  # the same where factors will have 16 bits or fewer: far below what rounding them adds
_ROUNDING = 1e-12  # squared norm left out by a core that holds the whole tensor
_PROBE = 2**17  # elements of a weight in which its closing is timed
_LEAST_PENALTY = 1e-16


def as_result(weight: Tensor, source: Source, factors: Sequence[Tensor]) -> CPDecomposition:
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


def solve(
    source: Source,
    rank: int,
    seed: int,
    budget: Budget,
    start: Sequence[Tensor] | None = None,
    effort: float = 1.0,
    enough: float = 0.0,
    quantize: Quantize | None = None,
) -> Iterate:
    """Factors for the weight over its norm, in the order of its axes.

    Args:
        quantize: the format that factors will be rounded to, whose expected squared error the last penalty is: what is
            minimised is then the expected squared error after rounding.
        start: factors (d_m, R) to go on from, instead of the starts.
        effort, enough: where there is a start, a factor on the number of sweeps, and an error at which to stop.
    """
    if source.total == 0:
        device, dtype = source.weight.device, source.dtype
        return Iterate([torch.zeros(size, rank, dtype=dtype, device=device) for size in source.shape], 0.0, 0.0, 0.0)
    if 1 in source.shape:
        return _matrix(source, rank)
    generator = torch.Generator().manual_seed(seed)
    order = _order(source.shape)
    zero = _zero(source, rank, quantize)
    if start is None:
        basis, found, outside = _compressed_solve(source, rank, order, generator, budget, zero)
        if found.residual < _FLOAT32_LIMIT and source.dtype != torch.float64 and budget.left() > budget.elapsed():
            # float32 cannot tell so small a residual from rounding
            wide = Source(source.weight, torch.float64)
            again = _compressed_solve(wide, rank, order, generator, budget, zero)
            if again[1].residual <= max(abs(found.residual), 1e-7):
                source, (basis, found, outside) = wide, again
        begun = found.moved(_lifting(basis))
        settled = outside <= _ROUNDING
    else:
        settled = False
        begun = Iterate(balanced([start[m] for m in order]))
        if budget.limited:
            budget.prepared(_closing_seconds(source, rank))
    tensor, scale = source.permuted(order)
    best = begun if settled else _on_whole(tensor, scale, begun, budget, effort, enough, zero)
    penalty = PENALTY if quantize is None else max(PENALTY, FORMATS[quantize].error ** 2)
    if penalty > PENALTY and best.residual > _EXACT:  # an exact CP is one in any format
        sweeps = max(1, round(effort * _SWEEPS))
        stage = Stage(sweeps, reserve=0.2, enough=enough**2, first=penalty, last=penalty, span=(0.9, 1.0))
        best = descend(tensor, replace(best, momentum=0), stage, budget, scale)
    return replace(best, factors=_in_order(best.factors, order))


def _zero(source: Source, rank: int, quantize: Quantize | None) -> float:
    """The squared residual below which rounding the factors is all that is left of it, where less costs time."""
    if sum(min(size, rank) for size in source.shape) * rank <= _NEWTON_CHEAP:
        return 0.0
    if quantize is not None or source.weight.dtype.itemsize < 4:
        return _FORMAT_ZERO
    return _ZERO if source.weight.dtype == torch.float32 else 0.0


def _closing_seconds(source: Source, rank: int) -> float:
    """About what `as_result` will take, from a part of it: that is cold, and the rest will be about twice as fast."""
    begun = time.perf_counter()
    part = source.weight[: max(1, _PROBE // math.prod(source.shape[1:]))]
    factors = [torch.ones(size, rank, dtype=part.dtype, device=part.device) for size in part.shape]
    CPDecomposition(factors[0][0], (factors[0], factors[1], factors[2])).relative_error(part)
    return (time.perf_counter() - begun) * source.shape[0] / len(part) / 2


def _order(shape: Sequence[int]) -> tuple[int, int, int]:
    """The longest mode last, for partial products are smallest so; of equal ones, that which needs no copy."""
    longest = max((2, 0, 1), key=lambda mode: shape[mode])
    return ((1, 2, 0), (0, 2, 1), (0, 1, 2))[longest]


def is_small(source: Source, rank: int) -> bool:
    """Whether sweeps cost next to nothing."""
    return math.prod(min(size, rank) for size in source.shape) * rank <= _CHEAP


def _in_order(factors: Sequence[Tensor], order: Sequence[int]) -> list[Tensor]:
    return [factors[order.index(mode)] for mode in range(3)]


def _compressed_solve(
    source: Source, rank: int, order: Sequence[int], generator: torch.Generator, budget: Budget, zero: float
) -> tuple[Basis, Iterate, float]:
    """The bases and the CP of the core, with the axes in this order, and the squared norm that the core leaves out."""
    sizes = [min(size, 3 * rank // 2) for size in source.shape]
    if math.prod(sizes) * _FAR_SMALLER > math.prod(source.shape):
        sizes = [min(size, rank) for size in source.shape]
    if tuple(sizes) == source.shape and not _is_cheap(sizes, rank):
        core: Core = Whole(source, order)
        basis: Basis = (None, None, None)
    else:
        turns, tensor = compressed(source, sizes, generator)
        tensor = tensor.permute(*order).contiguous()
        full = all(u.shape[0] == u.shape[1] for u in turns)
        outside = 0.0 if full else max(1 - float(tensor.double().square().sum()), 0.0)
        core = Core(tensor, outside, source.weight.numel())
        basis = [turns[m] for m in order]
    if budget.limited:
        budget.prepared(_closing_seconds(source, rank))
    return basis, _on_core(core, rank, generator, budget, zero), core.outside


def _is_cheap(sizes: Sequence[int], rank: int) -> bool:
    """Whether sweeps over a core of this size cost next to nothing, or Newton's method less than they do."""
    return math.prod(sizes) * rank <= _CHEAP or sum(sizes) * rank <= _NEWTON_CHEAP


def _on_core(core: Core, rank: int, generator: torch.Generator, budget: Budget, zero: float) -> Iterate:
    """The best CP of the core that the starts lead to, over its leading blocks."""
    shape, elements = core.tensor.shape, core.tensor.numel()
    small = elements * rank <= _CHEAP
    coarse = core.block(1.0 if small else _LEVELS[0])
    starts = max(_STARTS, min(_MOST_STARTS, _CHEAP * _STARTS // (elements * rank)))
    scouts: list[Iterate] = []
    for k in range(starts):
        begin = (random_start if k else hosvd_start)(coarse, rank, generator)
        before, span = budget.elapsed(), (0.3 * k / starts, 0.3 * (k + 1) / starts)
        highest, lowest = (_FIRST_PENALTY, PENALTY) if small else _penalties(0, budget)
        falling = 0.7 if small else 1.0
        stage = Stage(_LEVEL_SWEEPS[0], _LEVEL_TIMES[0], first=highest, last=lowest, falling=falling, span=span)
        scouts.append(descend(coarse, Iterate(begin), stage, budget, room=core.room))
        taken = budget.elapsed() - before
        if budget.left(_LEVEL_TIMES[0]) < taken or (not small and budget.left() * _SCOUTING < starts * taken):
            break
    del coarse, begin
    newton = sum(shape) * rank <= _NEWTON_CHEAP
    scouts = sorted(scouts, key=lambda scout: scout.objective)[: _KEPT if newton else 1]
    best: Iterate | None = None
    while scouts:
        found = _settled(core, scouts.pop(0), newton, budget, zero)
        best = found if best is None or found.objective < best.objective else best
        if best.residual < max(zero, _ZERO):
            break
    assert best is not None
    promising = max(zero, _ZERO) <= best.residual < _PROMISING and core.outside < _EXACT
    if promising and budget.left() > budget.elapsed():
        pencil = pencil_start(core.tensor * core.scale, rank, generator)
        begun = pencil and Iterate([core.turned(mode, factor) for mode, factor in enumerate(pencil)])
        found = _settled(core, begun, newton, budget, zero) if begun else best
        best = found if found.objective < best.objective else best
    return best


def _settled(core: Core, start: Iterate, newton: bool, budget: Budget, zero: float) -> Iterate:
    """The minimum of the core that these factors of a leading block lead to, by way of larger blocks."""
    best, last = start, core.outside <= _ROUNDING
    whole = all(len(factor) == size for factor, size in zip(start.factors, core.tensor.shape, strict=True))
    del start
    for k, level in enumerate(_LEVELS[1:], start=1):
        if level < 1 and whole:
            continue
        block = core.block(level)
        final = last and level == 1
        first, least = (PENALTY, PENALTY) if whole else _penalties(k, budget)  # where it begins, it has fallen already
        stage = Stage(
            _LAST_SWEEPS if final else _LEVEL_SWEEPS[k],
            1.0 if final else _LEVEL_TIMES[k],
            reserve=0.2 if final else 0.0,
            tolerance=1e-6 if final else 1e-5,
            first=first,
            last=PENALTY if final else least,
            falling=1.0 if not final else _HURRIED if budget.limited else 0.25,
            span=(0.3, 0.9 if last else 0.5),
        )
        sizes = block.shape
        best = best.moved(lambda mode, factor, sizes=sizes: core.padded(mode, factor, sizes[mode]))  # type: ignore[misc]
        best = descend(block, best, stage, budget, core.scale if level == 1 else 1.0, core.room)
    if newton and budget.left() > 0 and best.residual < _PROMISING:
        best = finish(core.tensor, best.factors, PENALTY, core.outside, budget)
    return _released(core.tensor, best, budget, zero, core.outside, core.scale)


def _penalties(level: int, budget: Budget) -> tuple[float, float]:
    """With which the descent on a level, or on the whole after the last, begins and ends."""
    if not budget.limited:
        return _PENALTIES[level], _PENALTIES[level + 1]
    fall = PENALTY / _FIRST_PENALTY
    times = (0.0, *_LEVEL_TIMES, 1.0)
    begin, end = (_FIRST_PENALTY * fall ** min(1.0, time / _HURRIED) for time in times[level : level + 2])
    return begin, end


def _on_whole(
    tensor: Tensor, scale: float, start: Iterate, budget: Budget, effort: float, enough: float, zero: float
) -> Iterate:
    """Sweeps on the whole turn the subspaces that the factors span; within these, sweeps are cheap at first."""
    rank = start.factors[0].shape[1]
    best = start
    smaller = _FAR_SMALLER if budget.limited else _SMALLER
    small = math.prod(min(size, rank) for size in tensor.shape) * smaller < tensor.numel()
    sweep = 0.0  # seconds
    for k in range(_CYCLES if small else 0):
        span = (0.5 + 0.1 * k, 0.6 + 0.1 * k)
        begun = budget.elapsed()
        # plain: one accelerated sweep may rise, and there may be no time for another
        best = descend(tensor, replace(best, momentum=0), Stage(1, span=span), budget, scale)
        sweep = budget.elapsed() - begun
        if budget.left() <= _PROJECTION * sweep:
            break
        basis = [torch.linalg.qr(f)[0] if f.shape[0] > rank else None for f in best.factors]
        core = tensor
        for mode in (2, 1, 0):
            core = mode_product(core, basis[mode], mode)
        inside = best.moved(_lifting([None if u is None else u.T for u in basis]))
        stage = Stage(_CYCLE_SWEEPS, tolerance=1e-5, span=span)
        best = descend(core.contiguous(), inside, stage, budget, scale).moved(_lifting(basis))
        if budget.left() <= sweep:
            break
    if not small or budget.left() > sweep:
        first, last = _penalties(3, budget) if start.previous and not small else (PENALTY, PENALTY)
        sweeps = max(1, round(effort * _SWEEPS))
        stage = Stage(sweeps, reserve=0.2, enough=enough**2, first=first, last=last, falling=_HURRIED, span=(0.5, 1.0))
        best = descend(tensor, best, stage, budget, scale)
    return _released(tensor, best, budget, zero, scale=scale)


def _lifting(basis: Basis) -> Callable[[int, Tensor], Tensor]:
    """Takes factors in a subspace of each mode to the coordinates of the whole; with transposed bases, back."""

    def lift(mode: int, factor: Tensor) -> Tensor:
        u = basis[mode]
        return factor if u is None else u.to(factor.dtype) @ factor

    return lift


def _released(
    tensor: Tensor, best: Iterate, budget: Budget, zero: float, outside: float = 0.0, scale: float = 1.0
) -> Iterate:
    """Lower the penalty while it is what holds the error up, as it does on weights that are exactly low rank."""
    if best.residual > _EXACT:
        return best
    narrow = tensor.dtype != torch.float64 or best.factors[0].dtype != torch.float64
    tensor = tensor.double() * scale
    if narrow:  # float32's residual is mostly rounding
        best = measured_exactly(tensor, [factor.double() for factor in best.factors], PENALTY, outside)
    # with many more unknowns than entries, sweeps find one of the many solutions sooner
    unknowns = sum(tensor.shape) * best.factors[0].shape[1]
    newton = unknowns <= max(_NEWTON_CHEAP, min(_NEWTON_UNKNOWNS, tensor.numel()))
    penalty = PENALTY
    # where Newton's steps are dear, they are for what sweeps leave: with components to spare, that is nothing
    for by_newton in [newton] if not newton or unknowns <= _NEWTON_CHEAP else [False, True]:
        enough = 10 * zero if by_newton else zero
        while enough < best.residual < 10 * penalty and penalty > _LEAST_PENALTY and budget.left() > 0:
            penalty *= 1e-3 if by_newton else 1e-1
            lower = (
                finish(tensor, best.factors, penalty, outside, budget)
                if by_newton
                else descend(tensor, best, Stage(_SWEEPS, first=penalty, last=penalty), budget)
            )
            if not lower.residual < best.residual:
                break
            best = lower
            if best.amplification > AMPLIFICATION_LIMIT and best.residual > _ZERO:
                return best  # it buys accuracy by cancelling, and `cp` will say so
        penalty *= 10  # at which sweeps still followed
    return best


def _matrix(source: Source, rank: int) -> Iterate:
    """The best CP of a tensor with a mode of size 1: the truncated SVD (Eckart and Young, 1936)."""
    single = next(mode for mode in range(3) if source.shape[mode] == 1)
    first, second = (mode for mode in range(3) if mode != single)
    tensor, scale = source.permuted((0, 1, 2))
    unit = tensor * scale
    left, values, right = torch.linalg.svd(unit.squeeze(single), full_matrices=False)
    kept = min(rank, values.shape[0])
    factors = [unit.new_zeros(size, rank) for size in unit.shape]  # rank above the matrix's: zero components
    factors[single][0, :kept] = 1.0
    factors[first][:, :kept] = left[:, :kept] * values[:kept].sqrt()
    factors[second][:, :kept] = right[:kept].T * values[:kept].sqrt()
    lost = float(values[kept:].double().square().sum())
    return Iterate(factors, lost, lost, 1 - lost, 1 - lost)
