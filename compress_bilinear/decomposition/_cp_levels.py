"""CP at a given rank: a cheap start on a block of a core, refined on ever larger blocks and on the whole tensor.

The core is that of an HOSVD, whose leading blocks hold most of the energy (the compression of Bro and Andersson, 1998,
in several steps). So a coarse solution, which costs a fraction of a sweep over the whole, is a good start for the next
size.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config import Quantize
from ..quantization import FORMATS
from ._als import PENALTY, Iterate, Stage, balanced, descend
from ._budget import Budget
from ._exact import anneal_penalty
from ._hosvd import compressed, hosvd_start, leading_block, random_start
from ._source import Source


class _Level(NamedTuple):
    """A leading block of a core to solve on, and the penalty that it ends under."""

    size: float  # of each of the core's sizes
    share: float  # of the time that is left
    penalty: float


# Blocks of 1/8 and 27/64 of the core: sweeps there are cheap, and components find their places under large penalties
_LEVELS = (_Level(0.5, 0.08, 2e-2), _Level(0.75, 0.22, 4e-3))
_LEVEL_SWEEPS = 30
_FIRST_PENALTY = 1e-1  # a tenth of the weight's norm: large components cannot yet cancel
_STARTS = 24  # for tensors of a few entries, whose minima differ most: one from the HOSVD, the others random
_CHEAP = 2**17  # elements of a core times the rank with which a sweep takes less time than its calls do
_CORE_SWEEPS = 40  # on a core that is smaller than the weight
_SWEEPS = 150  # on the whole, after the core: all but slow weights settle before
_QUICK_SWEEPS = 45  # on the whole, from the result at another rank: enough to see whether it meets an error
_LAST_SWEEPS = 400  # on a core that is the whole, where nothing follows
_SETTLED = 1e-4  # of the objective in a sweep: the next twenty would lower the error by less than a tenth of a per cent


def solve(
    source: Source,
    rank: int,
    seed: int,
    budget: Budget,
    quantize: Quantize | None = None,
    begin: Sequence[Tensor] | None = None,
    enough: float = 0.0,
    sweeps: int | None = None,
) -> list[Tensor]:
    """Factors (d_m, R) for the weight over its norm, in the order of its axes.

    Args:
        quantize: the format that factors will be rounded to. Its expected squared error is the last penalty, so that
            what is minimised is the expected squared error after rounding.
        begin: factors (d_m, R) to begin with, instead of the starts.
        enough: an error at which to stop.
        sweeps: of a weight in the coordinates of its HOSVD: at most so many over the whole, a quarter of them on each
            of two leading blocks before, and none of what finds exact solutions.
    """
    if source.total == 0:
        return [torch.zeros(size, rank, dtype=source.dtype, device=source.weight.device) for size in source.shape]
    if 1 in source.shape:
        return _of_matrix(source, rank)
    order, generator = _order(source.shape), torch.Generator().manual_seed(seed)
    penalty = first = PENALTY if quantize is None else max(PENALTY, FORMATS[quantize].error ** 2)
    done, most = False, _SWEEPS if begin is None else _QUICK_SWEEPS
    best = Iterate([] if begin is None else balanced([begin[m] for m in order]))
    if begin is None and sweeps is None:
        best, done = _from_core(source, rank, order, generator, budget, penalty)
    tensor, scale = source.permuted(order)
    if begin is None and sweeps is not None:
        best, first = _over_blocks(tensor, rank, generator, budget, max(sweeps // 4, 1), penalty, scale)
    if not done:
        tolerance = 1e-6 if sweeps is None else _SETTLED
        stage = Stage(sweeps or most, tolerance, enough**2, first, penalty, falling=0.5)
        best = descend(tensor, best, stage, budget.child(span=(0.3, 1.0)), scale)
        best = anneal_penalty(tensor, best, budget, scale=scale) if sweeps is None else best
    return [best.factors[order.index(mode)] for mode in range(3)]


def _from_core(
    source: Source, rank: int, order: Sequence[int], generator: torch.Generator, budget: Budget, penalty: float
) -> tuple[Iterate, bool]:
    """The CP of the core that CP of this rank is solved on, with axes in this order, and whether that is the whole."""
    basis, core = compressed(source, [min(size, rank) for size in source.shape])
    done = core.shape == source.weight.shape
    outside = 0.0 if done else max(1 - float(core.double().square().sum()), 0.0)
    best = _on_core(core.permute(*order).contiguous(), outside, rank, generator, budget, penalty)
    factors = [basis[m].to(f.dtype) @ f for m, f in zip(order, best.factors, strict=True)]
    return replace(best, factors=factors), done


def _over_blocks(
    core: Tensor, rank: int, generator: torch.Generator, budget: Budget, sweeps: int, last: float, scale: float = 1.0
) -> tuple[Iterate, float]:
    """Factors for the core from its leading blocks, and the penalty, of at least `last`, that these ended under."""
    best, first = Iterate(hosvd_start(leading_block(core, _LEVELS[0].size), rank, generator)), _FIRST_PENALTY
    for level, span in zip(_LEVELS, ((0.0, 0.2), (0.2, 0.3)), strict=True):
        block = leading_block(core, level.size)
        stage = Stage(sweeps, _SETTLED, first=first, last=max(level.penalty, last))
        best = descend(block, _padded(best, block.shape), stage, budget.child(level.share, span), scale)
        first = stage.last
    return _padded(best, core.shape), first


def _padded(best: Iterate, sizes: Sequence[int]) -> Iterate:
    """The same components in a larger block, whose further rows are zero so far."""
    return Iterate([pad(f, (0, 0, 0, size - len(f))) for f, size in zip(best.factors, sizes, strict=True)])


def is_small(source: Source, rank: int) -> bool:
    """Whether sweeps on the core cost next to nothing."""
    return math.prod(min(size, rank) for size in source.shape) * rank <= _CHEAP


def _order(shape: Sequence[int]) -> tuple[int, int, int]:
    """The longest mode last, for partial products are smallest so; of equal ones, that which needs no copy."""
    longest = max((2, 0, 1), key=lambda mode: shape[mode])
    return ((1, 2, 0), (0, 2, 1), (0, 1, 2))[longest]


def _on_core(
    core: Tensor, outside: float, rank: int, generator: torch.Generator, budget: Budget, penalty: float
) -> Iterate:
    """The best CP that the starts on a core lead to, which leaves out `outside` of a squared norm of 1."""
    first = penalty
    if core.numel() * rank <= _CHEAP:
        begun = _best_start(core, rank, generator, budget, penalty)
    else:
        begun, first = _over_blocks(core, rank, generator, budget, _LEVEL_SWEEPS, penalty)
    if outside:
        last = Stage(_CORE_SWEEPS, 1e-5, first=first, last=penalty)
    else:
        last = Stage(_LAST_SWEEPS, first=first, last=penalty, falling=0.25)
    best = descend(core, begun, last, budget.child(span=(0.3, 0.5 if outside else 0.9)))
    return anneal_penalty(core, best, budget, outside)


def _best_start(core: Tensor, rank: int, generator: torch.Generator, budget: Budget, penalty: float) -> Iterate:
    """The best of what some sweeps make of each of many starts."""
    # the objectives are compared, for which the penalty must have settled
    stage = Stage(_LEVEL_SWEEPS, first=_FIRST_PENALTY, last=penalty, falling=0.7)
    count = min(_STARTS, 3 * _CHEAP // (core.numel() * rank))
    scouting = budget.child(_LEVELS[0].share, (0.0, 0.3))
    found: list[Iterate] = []
    for k in range(count):
        begin = (random_start if k else hosvd_start)(core, rank, generator)
        part = scouting.child(span=(k / count, (k + 1) / count))
        found.append(descend(core, Iterate(begin), stage, part))
        if scouting.left() < part.elapsed():
            break
    return min(found, key=lambda start: start.objective)


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
