"""CP at a given rank: cheap starts on a small core, the best one refined on ever larger ones and on the whole tensor.

The core is that of an HOSVD, whose leading blocks hold most of the energy (the compression of Bro and Andersson, 1998,
in several steps). So a coarse solution, which costs a fraction of a sweep over the whole, is a good start for the next
size. On the whole, sweeps alternate with sweeps on the core that the factors then span.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config import Quantize
from ..quantization import FORMATS
from ._als import PENALTY, Iterate, Stage, balanced, descend
from ._budget import Budget
from ._exact import EXACT, ZERO, anneal_penalty, finish, is_newton_cheap, negligible, pencil_start
from ._hosvd import Core, compressed, hosvd_start, leading_block, random_start
from ._source import Basis, Source, mode_product


class _Level(NamedTuple):
    """A leading block of the core to solve on, and under which penalty that ends."""

    size: float  # of each of the core's sizes
    sweeps: int
    share: float  # of the time that is left
    penalty: float


# Blocks of 1/8 and 27/64 of the core: sweeps there are cheap, and components find their places under large penalties
_LEVELS = (_Level(0.5, 30, 0.08, 2e-2), _Level(0.75, 30, 0.22, 4e-3), _Level(1.0, 40, 0.6, PENALTY))
_FIRST_PENALTY = 1e-1  # a tenth of the weight's norm: large components cannot yet cancel
_STARTS = 3  # one from the HOSVD, the others random; more where they cost next to nothing
_MOST_STARTS = 24  # for tensors of a few entries, whose minima differ most
_KEPT = 4  # of the starts of such a tensor that are followed to their minima: the best after 30 sweeps may not stay it
_CHEAP = 2**17  # elements of a core times the rank with which a sweep takes less time than its calls do
_CYCLES = 4  # of a sweep on the whole and up to 20 on the core that the factors span; more gain nothing
_CYCLE_SWEEPS = 20
_SMALLER = 3  # times fewer elements than the weight make a core worth such cycles
_FAR_SMALLER = 16  # times fewer elements allow a core that is wider than the rank, which loses less of the weight
_SWEEPS = 150  # on the whole, after the core: all but slow weights settle before
_QUICK_SWEEPS = 45  # on the whole, from the result at another rank: enough to see whether it meets an error
_LAST_SWEEPS = 400  # on a core that is the whole, where nothing follows
_SETTLED = 1e-4  # of the objective in a sweep: the next twenty would lower the error by less than a tenth of a per cent
_FLOAT32_LIMIT = 1e-5  # squared residual that float32 cannot tell from rounding
_PROMISING = 0.1  # squared residual above which a tensor is not nearly of this rank
_ROUNDING = 1e-12  # squared norm left out by a core that holds the whole tensor


def solve(
    source: Source,
    rank: int,
    seed: int,
    budget: Budget,
    quantize: Quantize | None = None,
    begin: Sequence[Tensor] | None = None,
    enough: float = 0.0,
) -> list[Tensor]:
    """Factors (d_m, R) for the weight over its norm, in the order of its axes.

    Args:
        quantize: the format that factors will be rounded to. Its expected squared error is the last penalty, so that
            what is minimised is the expected squared error after rounding.
        begin: factors (d_m, R) to begin with, instead of the starts.
        enough: an error at which to stop.
    """
    if source.total == 0:
        return [torch.zeros(size, rank, dtype=source.dtype, device=source.weight.device) for size in source.shape]
    if 1 in source.shape:
        return _of_matrix(source, rank)
    order = _order(source.shape)
    zero = negligible(source, rank, quantize)
    penalty = _last_penalty(quantize)
    plain = budget if penalty == PENALTY else budget.child(0.8, (0.0, 0.9))
    done = False
    if begin is None:
        source, best, done = _from_core(source, rank, order, torch.Generator().manual_seed(seed), plain, zero)
    else:
        best = Iterate(balanced([begin[m] for m in order]))
    tensor, scale = source.permuted(order)
    sweeps = _SWEEPS if begin is None else _QUICK_SWEEPS
    if not done:
        best = _on_whole(tensor, scale, best, plain, Stage(sweeps, enough=enough**2))
        best = anneal_penalty(tensor, best, plain, zero, scale=scale)
    if penalty > PENALTY and best.residual > EXACT:  # an exact CP is one in any format
        stage = Stage(sweeps, enough=enough**2, first=penalty, last=penalty)
        best = descend(tensor, replace(best, momentum=0), stage, budget.child(span=(0.9, 1.0)), scale)
    return [best.factors[order.index(mode)] for mode in range(3)]


def sketch(
    source: Source,
    rank: int,
    seed: int,
    budget: Budget,
    sweeps: int,
    quantize: Quantize | None = None,
    begin: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """As `solve`, of a weight in the coordinates of its HOSVD, in at most `sweeps` sweeps over the whole.

    One start, a quarter of the sweeps on each of two leading blocks, and none of what finds exact solutions.
    """
    order = _order(source.shape)
    tensor, scale = source.permuted(order)
    last = _last_penalty(quantize)
    if begin is not None:
        best, first = Iterate(balanced([begin[m] for m in order])), last
    else:
        block = leading_block(tensor, _LEVELS[0].size)
        generator = torch.Generator().manual_seed(seed)
        best, first = Iterate(hosvd_start(block, rank, generator)), _FIRST_PENALTY
        for level in _LEVELS[:-1]:
            block = leading_block(tensor, level.size)
            best = _padded(best, block.shape)
            stage = Stage(max(sweeps // 4, 1), _SETTLED, first=first, last=max(level.penalty, last))
            best = descend(block, best, stage, budget.child(level.share, (0.0, 0.3)), scale, source.weight.numel())
            first = stage.last
        best = _padded(best, tensor.shape)
    stage = Stage(sweeps, _SETTLED, first=first, last=last, falling=0.5)
    best = descend(tensor, best, stage, budget.child(span=(0.3, 1.0)), scale)
    return [best.factors[order.index(mode)] for mode in range(3)]


def _last_penalty(quantize: Quantize | None) -> float:
    """What rounding the factors is expected to add to the squared error."""
    return PENALTY if quantize is None else max(PENALTY, FORMATS[quantize].error ** 2)


def _padded(best: Iterate, sizes: Sequence[int]) -> Iterate:
    """The same components in a larger block, whose further rows are zero so far."""
    return best.moved(lambda mode, factor: pad(factor, (0, 0, 0, sizes[mode] - len(factor))))


def is_small(source: Source, rank: int) -> bool:
    """Whether sweeps on the core cost next to nothing."""
    return math.prod(min(size, rank) for size in source.shape) * rank <= _CHEAP


def _order(shape: Sequence[int]) -> tuple[int, int, int]:
    """The longest mode last, for partial products are smallest so; of equal ones, that which needs no copy."""
    longest = max((2, 0, 1), key=lambda mode: shape[mode])
    return ((1, 2, 0), (0, 2, 1), (0, 1, 2))[longest]


def _from_core(
    source: Source, rank: int, order: Sequence[int], generator: torch.Generator, budget: Budget, zero: float
) -> tuple[Source, Iterate, bool]:
    """The source in the dtype that it needs, the CP of its core, axes in this order, and whether that is the whole."""

    def solved(source: Source) -> tuple[Iterate, bool]:
        core, basis = _core(source, rank, order, generator)
        found = _on_core(core, rank, generator, budget.child(span=(0.0, 0.9)), zero)
        return found.moved(_lifting(basis)), core.outside <= _ROUNDING

    best, done = solved(source)
    if best.residual < _FLOAT32_LIMIT and source.dtype != torch.float64 and budget.left() > budget.elapsed():
        wide = Source(source.weight, torch.float64)
        again, done_again = solved(wide)
        if again.residual <= max(abs(best.residual), 1e-7):
            return wide, again, done_again
    return source, best, done


def _core(source: Source, rank: int, order: Sequence[int], generator: torch.Generator) -> tuple[Core, Basis]:
    """The core that CP of this rank is solved on, and the bases (d_m, k_m) of its modes; both in this order."""
    sizes = [min(size, 3 * rank // 2) for size in source.shape]
    if math.prod(sizes) * _FAR_SMALLER > math.prod(source.shape):
        sizes = [min(size, rank) for size in source.shape]
    basis, tensor = compressed(source, sizes, generator)
    full = all(u.shape[0] == u.shape[1] for u in basis)
    outside = 0.0 if full else max(1 - float(tensor.double().square().sum()), 0.0)
    return Core(tensor.permute(*order).contiguous(), outside, source.weight.numel()), [basis[m] for m in order]


def _on_core(core: Core, rank: int, generator: torch.Generator, budget: Budget, zero: float) -> Iterate:
    """The best CP of the core that the starts lead to, over its leading blocks."""
    newton = is_newton_cheap(core.tensor.shape, rank)
    starts = sorted(_starts(core, rank, generator, budget), key=lambda start: start.objective)
    best: Iterate | None = None
    for start in starts[: _KEPT if newton else 1]:
        found = _over_levels(core, start, newton, budget, zero)
        best = found if best is None or found.objective < best.objective else best
        if best.residual < max(zero, ZERO):
            return best
    assert best is not None
    if best.residual < _PROMISING and core.outside < EXACT and budget.left() > budget.elapsed():
        # as one more start it also helps where spectra fall fast: 5% less error on second moments of digits
        pencil = pencil_start(core.tensor, rank, generator)
        found = _over_levels(core, Iterate(pencil), newton, budget, zero) if pencil else best
        best = found if found.objective < best.objective else best
    return best


def _starts(core: Core, rank: int, generator: torch.Generator, budget: Budget) -> list[Iterate]:
    """Some sweeps from each start, on the first level; on the core itself where that costs next to nothing."""
    cost = core.tensor.numel() * rank
    small = cost <= _CHEAP
    block = leading_block(core.tensor, 1.0 if small else _LEVELS[0].size)
    # on the core itself, the objectives are compared, for which the penalty must have settled
    last, falling = (PENALTY, 0.7) if small else (_LEVELS[0].penalty, 1.0)
    stage = Stage(_LEVELS[0].sweeps, first=_FIRST_PENALTY, last=last, falling=falling)
    count = max(_STARTS, min(_MOST_STARTS, _CHEAP * _STARTS // cost))
    scouting = budget.child(_LEVELS[0].share, (0.0, 0.3))
    found: list[Iterate] = []
    for k in range(count):
        begin = (random_start if k else hosvd_start)(block, rank, generator)
        part = scouting.child(span=(k / count, (k + 1) / count))
        found.append(descend(block, Iterate(begin), stage, part, room=core.room))
        if scouting.left() < part.elapsed():
            break
    return found


def _over_levels(core: Core, best: Iterate, newton: bool, budget: Budget, zero: float) -> Iterate:
    """The minimum of the core that factors of one of its leading blocks lead to, by way of larger blocks."""
    whole = all(len(factor) == size for factor, size in zip(best.factors, core.tensor.shape, strict=True))
    last = core.outside <= _ROUNDING  # nothing follows
    first = PENALTY if whole else _LEVELS[0].penalty
    for level in _LEVELS[1:]:
        if whole and level.size < 1:
            continue
        if last and level.size == 1:
            stage, part = Stage(_LAST_SWEEPS, first=first, falling=0.25), budget.child(span=(0.4, 0.9))
        else:
            stage = Stage(level.sweeps, 1e-5, first=first, last=PENALTY if whole else level.penalty)
            part = budget.child(level.share, (0.3, 0.4) if level.size < 1 else (0.4, 0.5))
        block = leading_block(core.tensor, level.size)
        best = _padded(best, block.shape)
        best = descend(block, best, stage, part, room=core.room)
        first = stage.last
    if newton and budget.left() > 0 and best.residual < _PROMISING:
        best = finish(core.tensor, best.factors, PENALTY, core.outside, budget)
    return anneal_penalty(core.tensor, best, budget, zero, core.outside)


def _on_whole(tensor: Tensor, scale: float, best: Iterate, budget: Budget, last: Stage) -> Iterate:
    """Sweeps on the whole turn the subspaces that the factors span; within these, sweeps are cheap at first."""
    rank = best.factors[0].shape[1]
    smaller = _FAR_SMALLER if budget.limited else _SMALLER
    small = math.prod(min(size, rank) for size in tensor.shape) * smaller < tensor.numel()
    sweep = 0.0  # seconds
    for k in range(_CYCLES if small else 0):
        span = (0.5 + 0.1 * k, 0.6 + 0.1 * k)
        begun = budget.elapsed()
        # plain: one accelerated sweep may rise, and there may be no time for another
        best = descend(tensor, replace(best, momentum=0), Stage(1), budget.child(span=span), scale)
        sweep = budget.elapsed() - begun
        if budget.left() <= sweep:
            break
        basis = [torch.linalg.qr(f)[0] if f.shape[0] > rank else None for f in best.factors]
        core = tensor
        for mode in (2, 1, 0):
            core = mode_product(core, basis[mode], mode)
        inside = best.moved(_lifting([None if u is None else u.T for u in basis]))
        part = budget.child(span=span)
        best = descend(core.contiguous(), inside, Stage(_CYCLE_SWEEPS, 1e-5), part, scale).moved(_lifting(basis))
        if budget.left() <= 2 * sweep:
            break
    if not small or budget.left() > 2 * sweep:
        best = descend(tensor, best, last, budget.child(span=(0.5, 1.0)), scale)
    return best


def _lifting(basis: Basis) -> Callable[[int, Tensor], Tensor]:
    """Takes factors in a subspace of each mode to the coordinates of the whole; with transposed bases, back."""

    def lift(mode: int, factor: Tensor) -> Tensor:
        u = basis[mode]
        return factor if u is None else u.to(factor.dtype) @ factor

    return lift


def _of_matrix(source: Source, rank: int) -> list[Tensor]:
    """The best CP of a tensor with a mode of size 1: the truncated SVD (Eckart and Young, 1936)."""
    single = source.shape.index(1)
    first, second = (mode for mode in range(3) if mode != single)
    tensor, scale = source.permuted((0, 1, 2))
    unit = tensor * scale
    left, values, right = torch.linalg.svd(unit.squeeze(single), full_matrices=False)
    kept = min(rank, values.shape[0])
    factors = [unit.new_zeros(size, rank) for size in unit.shape]  # components beyond the matrix's rank stay zero
    factors[single][0, :kept] = 1.0
    factors[first][:, :kept] = left[:, :kept] * values[:kept].sqrt()
    factors[second][:, :kept] = right[:kept].T * values[:kept].sqrt()
    return factors
