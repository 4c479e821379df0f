"""CP by alternating least squares, penalised and accelerated, on a tensor of norm 1.

Minimises ‖T − [[A, B, C]]‖² + μ Σ_r λ_r² with λ_r = ‖a_r‖‖b_r‖‖c_r‖. The penalty keeps components from growing and
cancelling (degeneracy: de Silva and Lim, 2008; the ridge: Paatero, 1997). With it the exact step for one factor is a
solve with V + μ diag V, V the Hadamard product of the other two Grams. Between sweeps the factors are extrapolated,
which is undone where the objective rises (heavy ball with restarts: Mitchell, Ye, De Sterck, 2020).

Products with the tensor, and with the inverse of a system, are in its dtype; Grams, systems and the objective are in
float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._budget import Budget

_TOLERANCE = 1e-6
_SETTLED = 3
_LEAST_ROOM = 2**15  # elements of a partial product that may always be held
_SCRATCH = 2**19  # elements of what is summed at once, at most, which caches hold
PENALTY = 1e-4  # about the squared relative error of 8-bit factors: what it discourages is what rounding would destroy
_MOMENTUM = (0.5, 0.1, 0.9)  # after the first sweep, its growth with each further one, and where that ends


@dataclass
class Iterate:
    """Factors (d_m, R), the objective there, and its parts: the squared residual, Σ λ_r² and the squared norm.

    `previous` and `momentum` are what a descent goes on with: the factors before, and how often they have improved.
    """

    factors: list[Tensor]
    objective: float = math.inf
    residual: float = math.inf
    sizes: float = math.inf
    norm: float = 0.0
    previous: list[Tensor] | None = None
    momentum: int = 0

    @property
    def error(self) -> float:
        """Relative to a tensor of norm 1."""
        return math.sqrt(max(self.residual, 0.0))

    @property
    def amplification(self) -> float:
        """sqrt(Σ λ_r²) relative to the norm of the approximation."""
        return math.sqrt(self.sizes / max(self.norm, 1e-300))

    def moved(self, transform: Callable[[int, Tensor], Tensor]) -> "Iterate":
        """In other coordinates: each factor is what `transform` makes of its mode and itself, without loss."""
        factors = [transform(mode, factor) for mode, factor in enumerate(self.factors)]
        previous = self.previous and [transform(mode, factor) for mode, factor in enumerate(self.previous)]
        return replace(self, factors=factors, previous=previous)


@dataclass(frozen=True)
class Stage:
    """A part of a solve: at most `sweeps`, and no longer than until this fraction of the budget's time is spent.

    `reserve` keeps time for so many more sweeps. `tolerance` ends it where sweeps lower the objective by less than
    this part of it, three times in a row; `enough`, where the squared residual is at most that. `first` and `last` are
    the penalties, from the one to the other geometrically over the first `falling` of the stage. `span` is the part of
    the whole solve that it is.
    """

    sweeps: int
    until: float = 1.0
    reserve: float = 0.0
    tolerance: float = _TOLERANCE
    enough: float = 0.0
    first: float = PENALTY
    last: float = PENALTY
    falling: float = 0.7
    span: tuple[float, float] = (0.0, 1.0)

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
    room: int = 0,
) -> Iterate:
    """Accelerated sweeps; returns the best iterate under the last penalty reached. At least one sweep is made.

    The tensor is meant times `scale`, which gives it, or the tensor that it is the core of, norm 1. `room` elements
    may be held besides, or as many as it has.
    """
    best = start.moved(lambda _, factor: factor.to(tensor.dtype))
    del start  # a caller may have let go of it
    sweeper = Sweeper(tensor, best.factors[0].shape[1], scale, room)
    settled = 0
    begun, penalty = budget.elapsed(), math.nan
    limit = budget.left(stage.until)
    for k in range(stage.sweeps):
        before = budget.elapsed()
        done = max(k / stage.sweeps, (before - begun) / max(limit, 1e-9))
        if stage.penalty(done) != penalty:
            penalty = stage.penalty(done)
            best.objective = math.inf
        step = min(_MOMENTUM[2], _MOMENTUM[0] + _MOMENTUM[1] * best.momentum) if best.momentum else 0.0
        ahead = best.factors
        if step and best.previous is not None:
            ahead = [torch.lerp(p, b, 1 + step) for b, p in zip(best.factors, best.previous, strict=True)]
        new = sweeper.sweep(ahead, penalty)
        del ahead
        budget.report(stage.span[0] + (stage.span[1] - stage.span[0]) * min(done, 1.0), new.error)
        if new.objective < best.objective:  # not where it is NaN
            settled = settled + 1 if best.objective - new.objective <= stage.tolerance * new.objective else 0
            new.previous, new.momentum = best.factors, best.momentum + 1
            best = new
        elif step == 0.0:
            break  # a plain sweep cannot rise but by rounding: this is the minimum
        else:
            best.momentum = 0
        if (
            settled >= _SETTLED
            or best.residual <= stage.enough
            or budget.left(stage.until) < (1 + stage.reserve) * (budget.elapsed() - before)
        ):
            break
    return best


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same components with equal norms in the three factors."""
    squares = torch.stack([factor.double().square().sum(0) for factor in factors])
    return _balanced([factor.clone() for factor in factors], squares)


def _balanced(factors: Sequence[Tensor], squares: Tensor) -> list[Tensor]:
    """`balanced`, given the columns' squared norms (3, R); in place."""
    logs = squares.clamp_min(1e-300).log_()
    scale = torch.exp((logs.mean(0) - logs) / 2).clamp_max_(1e30)  # of a column of zeros, which it leaves
    return [factor.mul_(s) for factor, s in zip(factors, scale.to(factors[0].dtype), strict=True)]


def wide_gram(factor: Tensor) -> Tensor:
    """(R, R) in float64."""
    wide = factor.double()
    return wide.T @ wide


class Sweeper:
    """Sweeps over one tensor. Its buffers are kept from sweep to sweep: fresh memory would cost as much as the work.

    A partial product T ×_3 C of shape (a, b, R) serves two updates. Where it has more than `room` elements, it is not
    held, but made some rows at a time for the one, and done without for the other.
    """

    def __init__(self, tensor: Tensor, rank: int, scale: float = 1.0, room: int = 0) -> None:
        self._tensor, self._scale = tensor, scale
        a, b, c = tensor.shape
        elements, room = a * b * rank, max(room, tensor.numel(), _LEAST_ROOM)
        held = elements <= room
        whole = 2 * elements <= room * 3 // 2 and elements <= _SCRATCH  # nothing is done in parts
        most = min(_SCRATCH, room // 4 if held else room // 2)
        self._scratch = tensor.new_empty(elements if whole else max(most, max(b, c) * rank))
        self._whole = self._scratch.view(a, b, rank) if whole else None
        self._product = tensor.new_empty(a, b, rank) if held else None

    def sweep(self, factors: Sequence[Tensor], penalty: float) -> Iterate:
        """Each factor in turn replaced by the best for the others."""
        # at ranks above the sizes, these R x R matrices are most of the memory: each goes as soon as it can
        _, second, third = factors
        gram3 = wide_gram(third)
        normal = wide_gram(second).mul_(gram3)
        first = self._update(self._first(second, third), normal, penalty)
        gram1 = wide_gram(first)
        torch.mul(gram1, gram3, out=normal)
        del gram3
        second = self._update(self._second(first, third), normal, penalty)
        gram2 = wide_gram(second)
        torch.mul(gram1, gram2, out=normal)
        squares = [gram1.diagonal().clone(), gram2.diagonal().clone()]
        del gram1, gram2
        right = self.last(first, second)
        third = self._update(right, normal, penalty)
        gram3 = wide_gram(third)
        # ‖T − Ŵ‖² = ‖T‖² − 2⟨T, Ŵ⟩ + ‖Ŵ‖², with what the core leaves out counted as residual
        inner = self._scale * float(torch.sum(right * third, dtype=torch.float64))
        model = normal.mul_(gram3)
        norm, sizes = float(model.sum()), float(model.diagonal().sum())
        residual = 1.0 - 2 * inner + norm if math.isfinite(norm) else math.nan
        balance = _balanced((first, second, third), torch.stack((*squares, gram3.diagonal())))
        return Iterate(balance, residual + penalty * sizes, residual, sizes, norm)

    def _rows(self, width: int) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the first axis, and scratch of shape (rows, width) for each."""
        a = self._tensor.shape[0]
        step = self._scratch.numel() // width
        for start in range(0, a, step):
            rows = slice(start, min(start + step, a))
            yield rows, self._scratch[: (rows.stop - start) * width].view(-1, width)

    def _partial(self, third: Tensor, rows: slice, out: Tensor) -> Tensor:
        """T ×_3 C, of some rows: (rows, b, R)."""
        flat = self._tensor[rows].flatten(0, 1)
        product = torch.mm(flat, third, out=out.view(flat.shape[0], -1))
        return product.view(-1, self._tensor.shape[1], third.shape[1])

    def _first(self, second: Tensor, third: Tensor) -> Tensor:
        """Σ_jk T_ijk B_jr C_kr: (a, R)."""
        if self._product is not None:
            self._partial(third, slice(None), self._product)
            if self._whole is not None:
                return torch.mul(self._product, second, out=self._whole).sum(1)
        result = second.new_empty(self._tensor.shape[0], second.shape[1])
        for rows, scratch in self._rows(second.numel()):
            if self._product is None:
                part = self._partial(third, rows, scratch).mul_(second)
            else:
                part = torch.mul(self._product[rows], second, out=scratch.view(-1, *second.shape))
            torch.sum(part, 1, out=result[rows])
        return result

    def _second(self, first: Tensor, third: Tensor) -> Tensor:
        """Σ_ik T_ijk A_ir C_kr: (b, R)."""
        if self._product is None:
            return self._paired(self._tensor.transpose(1, 2), first, third).T
        if self._whole is not None:
            return torch.mul(self._product, first[:, None], out=self._whole).sum(0)
        shape = self._product.shape[1:]
        result = first.new_zeros(shape)
        for rows, scratch in self._rows(shape.numel()):
            result += torch.mul(self._product[rows], first[rows, None], out=scratch.view(-1, *shape)).sum(0)
        return result

    def last(self, first: Tensor, second: Tensor) -> Tensor:
        """Σ_ij T_ijk A_ir B_jr: (c, R)."""
        if self._whole is not None:
            pairs = torch.mul(first[:, None], second, out=self._whole)
            return torch.mm(pairs.flatten(0, 1).T, self._tensor.flatten(0, 1)).T  # faster than its transpose
        return self._paired(self._tensor, first, second).T

    def _paired(self, tensor: Tensor, first: Tensor, other: Tensor) -> Tensor:
        """Σ_ij T_ijk A_ir B_jr: (R, c). Of the Khatri-Rao product of A and B, only some rows are held at once."""
        total = first.new_zeros(first.shape[1], tensor.shape[2])
        for rows, scratch in self._rows(other.numel()):
            pairs = torch.mul(first[rows, None], other, out=scratch.view(-1, *other.shape))
            total.addmm_(pairs.flatten(0, 1).T, tensor[rows].flatten(0, 1))
        return total

    def _update(self, right: Tensor, normal: Tensor, penalty: float) -> Tensor:
        """The factor F that solves F (V + μ diag V) = M times the scale; the least-norm one where that is singular."""
        diagonal = normal.diagonal()
        plain = diagonal.clone()
        diagonal.mul_(1 + penalty + 1e-15)
        triangle, failed = torch.linalg.cholesky_ex(normal)  # as exact as with a diagonal of ones
        if int(failed):
            solved = _deficient(right.double() * self._scale, normal.clone()).to(right.dtype)
        elif right.dtype == torch.float64:
            solved = torch.cholesky_solve(right.T, triangle).T.mul_(self._scale)
        else:
            # M is no more exact than float32, so a rounded inverse loses no more, and costs less than a solve
            inverse = torch.cholesky_inverse(triangle, out=triangle).to(right.dtype)
            del triangle
            solved = torch.addmm(right.new_empty(right.shape), right, inverse, beta=0, alpha=self._scale)
        diagonal.copy_(plain)
        return solved


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
