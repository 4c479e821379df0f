"""CP by alternating least squares, penalised and accelerated, on a tensor of norm 1.

Minimises ‖T − [[A, B, C]]‖² + μ Σ_r λ_r² with λ_r = ‖a_r‖‖b_r‖‖c_r‖. The penalty keeps components from growing and
cancelling (degeneracy: de Silva and Lim, 2008; the ridge: Paatero, 1997). With it the exact step for one factor is a
solve with V + μ diag V, V the Hadamard product of the other two Grams. Between sweeps the factors are extrapolated,
which is undone where the objective rises (heavy ball with restarts: Mitchell, Ye, De Sterck, 2020).

Products with the tensor, and with the inverse of a system, are in its dtype; Grams, systems and the objective are in
float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ._budget import Budget

PENALTY = 1e-4  # about the squared relative error that 8-bit factors add: rounding errors grow with the components
AMPLIFICATION_LIMIT = 3.0  # above it, components are said to cancel

_LEAST_ROOM = 2**22  # elements of a partial product that may always be kept: 16 MiB in float32
_SLAB = 2**19  # elements of a partial product that are summed at once: 2 MiB in float32, which caches hold
_LEAST_LEVEL = 27.6  # log of the ratio of the largest squared norm of a column to the least: 1e6 squared
_NARROW_LIMIT = 1e-3  # squared residual, about ten times the penalty
_MOMENTUM = (0.5, 0.1, 0.9)  # after the first sweep that improves, its growth with each further one, and its most


@dataclass
class Iterate:
    """Factors (d_m, R), the objective there, and its parts: the squared residual, Σ λ_r² and the squared norm."""

    factors: list[Tensor]
    objective: float = math.inf
    residual: float = math.inf
    sizes: float = math.inf
    norm: float = 0.0

    @property
    def error(self) -> float:
        """Relative to a tensor of norm 1."""
        return math.sqrt(max(self.residual, 0.0))

    @property
    def amplification(self) -> float:
        """sqrt(Σ λ_r²) relative to the norm of the approximation."""
        return math.sqrt(self.sizes / max(self.norm, 1e-300))


@dataclass(frozen=True)
class Stage:
    """A part of a solve.

    Attributes:
        sweeps: at most so many.
        tolerance: it ends where three sweeps in a row lower the objective by less than this part of it.
        enough: it ends where the squared residual is at most this.
        first, last: the penalty falls geometrically from the one to the other.
        falling: the part of the stage over which it falls.
    """

    sweeps: int
    tolerance: float = 1e-6
    enough: float = 0.0
    first: float = PENALTY
    last: float = PENALTY
    falling: float = 1.0

    def penalty(self, done: float) -> float:
        """Geometrically between the two; objectives under different penalties do not compare."""
        if self.first == self.last:
            return self.last
        return float(self.first * (self.last / self.first) ** min(1.0, done / self.falling))


def descend(
    tensor: Tensor,  # (a, b, c)
    start: Iterate,
    stage: Stage,
    budget: Budget,
    scale: float = 1.0,
) -> Iterate:
    """Accelerated sweeps; returns the best iterate under the last penalty that was reached.

    It makes at least one sweep, and none for which the budget has no time: of that it leaves as much as a sweep takes,
    for the caller to measure the result in.

    Args:
        scale: it times the tensor, or times the tensor that it is the core of, has norm 1.
    """
    best = replace(start, factors=[factor.to(tensor.dtype) for factor in start.factors])
    del start  # so that its memory is freed, if the caller has no other use for it
    sweeper = Sweeper(tensor, best.factors[0].shape[1], max(tensor.numel(), _LEAST_ROOM), scale)
    previous, momentum, settled, penalty = best.factors, 0, 0, math.nan
    begun, limit = budget.elapsed(), max(budget.left(), 1e-9)
    for k in range(stage.sweeps):
        before = budget.elapsed()
        done = max(k / stage.sweeps, (before - begun) / limit)
        if stage.penalty(done) != penalty:
            penalty = stage.penalty(done)
            best.objective = math.inf
        step = min(_MOMENTUM[2], _MOMENTUM[0] + _MOMENTUM[1] * momentum) if momentum else 0.0
        ahead = best.factors
        if step:
            ahead = [torch.lerp(p, b, 1 + step) for b, p in zip(best.factors, previous, strict=True)]
        # Grams and systems in float32 take half the time; the residual that is left has to be far above their rounding
        narrow = tensor.dtype != torch.float64 and best.residual > _NARROW_LIMIT
        new = sweeper.sweep(ahead, penalty, tensor.dtype if narrow else torch.float64)
        del ahead
        budget.report(min(done, 1.0), new.error)
        if new.objective < best.objective:  # not where it is NaN
            settled = settled + 1 if best.objective - new.objective <= stage.tolerance * new.objective else 0
            previous, momentum, best = best.factors, momentum + 1, new
        elif step == 0.0:
            break  # a plain sweep can rise by rounding only: this is the minimum
        else:
            momentum = 0
        if settled >= 3 or best.residual <= stage.enough or budget.left() < 2 * (budget.elapsed() - before):
            break
    return best


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same components with equal norms in the three factors."""
    squares = torch.stack([factor.double().square().sum(0) for factor in factors])
    return _balanced([factor.clone() for factor in factors], squares)


def _balanced(factors: Sequence[Tensor], squares: Tensor) -> list[Tensor]:
    """`balanced`, given the columns' squared norms (3, R); in place."""
    logs = squares.clamp_min(1e-300).log_()
    level = logs.mean(0)
    # a component that a penalty has shrunk to nothing may still grow again; as denormal numbers it slows all products
    level = torch.maximum(level, level.max() - _LEAST_LEVEL) if level.numel() else level
    scale = torch.exp((level - logs) / 2).clamp_max_(1e30)  # of a column of zeros, which it leaves
    return [factor.mul_(s) for factor, s in zip(factors, scale.to(factors[0].dtype), strict=True)]


def wide_gram(factor: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """(R, R) in this dtype."""
    wide = factor.to(dtype)
    return wide.T @ wide


class _Slab(NamedTuple):
    """Part of a tensor (a, b, c) along its first axis, and buffers; `product` is `scratch` where it is not kept."""

    rows: slice
    tensor: Tensor  # (· b, c)
    scratch: Tensor  # (·, b, R)
    product: Tensor  # (·, b, R)
    flat_product: Tensor  # (· b, R)


class Sweeper:
    """Sweeps over one tensor (a, b, c), slab by slab along its first axis.

    The partial product T ×_3 C of shape (a, b, R) serves the updates of two factors. It is kept from the first to the
    second where it has at most `room` elements, and computed twice otherwise. Buffers are reused across sweeps: to
    allocate them anew would take as long as the arithmetic. No buffer of a slab has more than `slab` elements, but for
    a slab of one index.
    """

    def __init__(self, tensor: Tensor, rank: int, room: int, scale: float = 1.0, slab: int = _SLAB) -> None:
        self._sizes, self._scale = tensor.shape, scale
        a, b, _ = tensor.shape
        self._kept = a * b * rank <= room
        product = tensor.new_empty(a if self._kept else 0, b, rank)
        step = min(a, max(1, min(slab, room // 2) // (b * rank)))
        scratch = tensor.new_empty(step, b, rank)
        self._slabs: list[_Slab] = []
        for begin in range(0, a, step):
            rows = slice(begin, min(begin + step, a))
            part = scratch[: rows.stop - begin]
            out = product[rows] if self._kept else part
            self._slabs.append(_Slab(rows, tensor[rows].flatten(0, 1), part, out, out.flatten(0, 1)))

    def sweep(self, factors: Sequence[Tensor], penalty: float, dtype: torch.dtype = torch.float64) -> Iterate:
        """Each factor in turn replaced by the best for the others, with Grams and systems in `dtype`."""
        # at ranks above the sizes, these R x R matrices are most of the memory: each goes as soon as it can
        _, second, third = factors
        gram3 = wide_gram(third, dtype)
        normal = wide_gram(second, dtype).mul_(gram3)
        first = self._update(self._first(second, third), normal, penalty)
        gram1 = wide_gram(first, dtype)
        torch.mul(gram1, gram3, out=normal)
        del gram3
        second = self._update(self._second(first, third), normal, penalty)
        gram2 = wide_gram(second, dtype)
        torch.mul(gram1, gram2, out=normal)
        squares = [gram1.diagonal().clone(), gram2.diagonal().clone()]
        del gram1, gram2
        right = self._third(first, second)
        third = self._update(right, normal, penalty)
        gram3 = wide_gram(third, dtype)
        # ‖T − Ŵ‖² = ‖T‖² − 2⟨T, Ŵ⟩ + ‖Ŵ‖², with what the core leaves out counted as residual
        inner = self._scale * float(torch.sum(right * third, dtype=torch.float64))
        model = normal.mul_(gram3)
        norm, sizes = (float(part.sum(dtype=torch.float64)) for part in (model, model.diagonal()))
        residual = 1.0 - 2 * inner + norm if math.isfinite(norm) else math.nan
        balance = _balanced((first, second, third), torch.stack((*squares, gram3.diagonal())))
        return Iterate(balance, residual + penalty * sizes, residual, sizes, norm)

    def _first(self, second: Tensor, third: Tensor) -> Tensor:  # (a, R)
        """Σ_jk T_ijk B_jr C_kr."""
        result = second.new_empty(self._sizes[0], second.shape[1])
        for slab in self._slabs:
            torch.mm(slab.tensor, third, out=slab.flat_product)
            torch.sum(torch.mul(slab.product, second, out=slab.scratch), 1, out=result[slab.rows])
        return result

    def _second(self, first: Tensor, third: Tensor) -> Tensor:  # (b, R)
        """Σ_ik T_ijk A_ir C_kr, after `_first` with the same C."""
        result = first.new_zeros(self._sizes[1], first.shape[1])
        for slab in self._slabs:
            if not self._kept:
                torch.mm(slab.tensor, third, out=slab.flat_product)
            result += torch.mul(slab.product, first[slab.rows, None], out=slab.scratch).sum(0)
        return result

    def _third(self, first: Tensor, second: Tensor) -> Tensor:  # (c, R)
        """Σ_ij T_ijk A_ir B_jr. Of the Khatri-Rao product of A and B, only a slab is held at once."""
        total = first.new_zeros(first.shape[1], self._sizes[2])
        for slab in self._slabs:
            pairs = torch.mul(first[slab.rows, None], second, out=slab.scratch)
            total.addmm_(pairs.flatten(0, 1).T, slab.tensor)
        return total.T

    def _update(self, right: Tensor, normal: Tensor, penalty: float) -> Tensor:
        """The factor F that solves F (V + μ diag V) = M times the scale; the least-norm one where that is singular."""
        diagonal = normal.diagonal()
        plain = diagonal.clone()
        diagonal.mul_(1 + penalty + 1e-15)
        triangle, failed = torch.linalg.cholesky_ex(normal)  # as exact as with a diagonal of ones
        wide = right.to(normal.dtype)
        solved = _deficient(wide.double(), normal.double()) if int(failed) else torch.cholesky_solve(wide.T, triangle).T
        diagonal.copy_(plain)
        return solved.to(right.dtype).mul_(self._scale)


def _deficient(right: Tensor, system: Tensor) -> Tensor:
    """The least-norm solution of F V = M where V is singular; NaN, which no descent accepts, where it is not finite."""
    if not bool(torch.isfinite(system).all()):
        return torch.full_like(right, torch.nan)
    diagonal = system.diagonal()
    diagonal.add_(diagonal == 0)  # a component that has died has a zero row and column: this leaves it at zero
    triangle, failed = torch.linalg.cholesky_ex(system)
    if not int(failed):
        return torch.cholesky_solve(right.T, triangle).T
    scale = diagonal.rsqrt()
    values, vectors = torch.linalg.eigh(system * scale[:, None] * scale)
    inverse = torch.where(values > 1e-14 * values[-1], 1 / values, 0.0)
    return (right * scale @ vectors * inverse) @ vectors.T * scale
