"""The end of a CP whose residual vanishes: what finds an exact low rank to the last digit.

ALS alone needs thousands of sweeps there. Small tensors are finished by Levenberg-Marquardt steps, which converge
quadratically: their Gauss-Newton matrix is assembled from R x R Grams (Tomasi and Bro, 2006; Sorber, Van Barel, De
Lathauwer, 2013). The penalty μ Σ λ_r² is itself a sum of squares, of the components' entries: it multiplies what a
component has in common with itself by 1 + μ.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._als import AMPLIFICATION_LIMIT, PENALTY, Iterate, Stage, balanced, descend, wide_gram
from ._budget import Budget

EXACT = 1e-3  # squared residual under which a tensor may be exactly of low rank: ten times the penalty
ZERO = 1e-20  # squared residual at which nothing is left to gain: what rounding adds is far above it

_SWEEPS = 600  # under each lower penalty
_LEAST_PENALTY = 1e-16  # below which it is lost in float64's rounding
_CHEAP_UNKNOWNS = 600  # whose Newton steps cost less than sweeps; they grow with the cube of the unknowns
_STEPS = 100
_DAMPING = 1e-2  # at the start, relative to the mean of the diagonal
_LEAST_DAMPING = 1e-15  # relative too: below it, float64 does not see it


def is_newton_cheap(sizes: Sequence[int], rank: int) -> bool:
    """Whether Newton steps on a CP of these sizes cost less than sweeps."""
    return sum(sizes) * rank <= _CHEAP_UNKNOWNS


def anneal_penalty(
    tensor: Tensor,  # (a, b, c)
    best: Iterate,
    budget: Budget,
    outside: float = 0.0,
    scale: float = 1.0,
) -> Iterate:
    """Reduce the penalty as long as it dominates the residual, as it does on weights that are exactly of low rank.

    Args:
        outside: squared norm that the tensor leaves out of one of norm 1.
        scale: of the tensor, as in `descend`.
    """
    if best.residual > EXACT:
        return best
    tensor = tensor.double() * scale
    # float32's residual is mostly rounding
    best = measured_exactly(tensor, [factor.double() for factor in best.factors], PENALTY, outside)
    newton = is_newton_cheap(tensor.shape, best.factors[0].shape[1])
    penalty = PENALTY
    while ZERO < best.residual < 10 * penalty and penalty > _LEAST_PENALTY and budget.left() > 0:
        penalty *= 1e-3 if newton else 1e-1
        if newton:
            lower = finish(tensor, best.factors, penalty, outside, budget)
        else:
            lower = descend(tensor, best, Stage(_SWEEPS, first=penalty, last=penalty), budget)
        if not lower.residual < best.residual:
            break
        best = lower
        if best.amplification > AMPLIFICATION_LIMIT:
            break  # lower residuals are bought by components that cancel, of which `cp` warns
    return best


def finish(
    tensor: Tensor, factors: Sequence[Tensor], penalty: float, outside: float = 0.0, budget: Budget | None = None
) -> Iterate:
    """Levenberg-Marquardt steps from the given factors to a minimum of the penalised objective; all in float64."""
    tensor = tensor.double()
    best = measured_exactly(tensor, balanced([factor.double() for factor in factors]), penalty, outside)
    damping = _DAMPING
    matrix, gradient = _normal_equations(tensor, best.factors, penalty)
    for _ in range(_STEPS):
        if budget is not None and budget.left() <= 0:
            break
        mean = matrix.diagonal().mean()
        damped = matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) * (damping * mean)
        triangle, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            damping *= 10
            continue
        step = torch.cholesky_solve(gradient[:, None], triangle).squeeze(1).neg()
        parts = step.split([factor.numel() for factor in best.factors])
        moved = [f + p.view_as(f) for f, p in zip(best.factors, parts, strict=True)]
        new = measured_exactly(tensor, balanced(moved), penalty, outside)
        if not new.objective < best.objective:
            damping *= 10
            if damping > 1e6:
                break
            continue
        gain = best.objective - new.objective
        predicted = -float(gradient @ step) + damping * float(mean) * float(step @ step)
        damping = max(damping / 10 if gain > 0.5 * predicted else damping * 2, _LEAST_DAMPING)
        best = new
        if best.residual < 1e-28 or gain < 1e-9 * best.objective:
            break
        matrix, gradient = _normal_equations(tensor, best.factors, penalty)
    return best


def measured_exactly(tensor: Tensor, factors: list[Tensor], penalty: float, outside: float) -> Iterate:
    """The objective with the residual from the difference itself, for small tensors: it does not cancel."""
    model = wide_gram(factors[0]) * wide_gram(factors[1]) * wide_gram(factors[2])
    norm, sizes = float(model.sum()), float(model.diagonal().sum())
    difference = torch.einsum("ir,jr,kr->ijk", *factors) - tensor
    residual = float(difference.square().sum()) + outside
    return Iterate(factors, residual + penalty * sizes, residual, sizes, norm)


def _normal_equations(tensor: Tensor, factors: Sequence[Tensor], penalty: float) -> tuple[Tensor, Tensor]:
    """JᵀJ and Jᵀr of the penalised residual, for the factors' entries row by row."""
    rank = factors[0].shape[1]
    own = 1.0 + penalty * torch.eye(rank, dtype=tensor.dtype, device=tensor.device)
    grams = [factor.T @ factor for factor in factors]
    sizes = [factor.shape[0] for factor in factors]
    rows: list[Tensor] = []
    gradient: list[Tensor] = []
    products = ("ijk,jr,kr->ir", "ijk,ir,kr->jr", "ijk,ir,jr->kr")
    for n in range(3):
        others = [m for m in range(3) if m != n]
        normal = grams[others[0]] * grams[others[1]] * own
        gradient.append(factors[n] @ normal - torch.einsum(products[n], tensor, *(factors[m] for m in others)))
        blocks = []
        for m in range(3):
            if m == n:
                block = torch.kron(torch.eye(sizes[n], dtype=tensor.dtype, device=tensor.device), normal)
            else:
                shared = grams[3 - n - m] * own
                block = torch.einsum("rs,is,jr->irjs", shared, factors[n], factors[m]).reshape(
                    sizes[n] * rank, sizes[m] * rank
                )
            blocks.append(block)
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows), torch.cat([part.flatten() for part in gradient])
