"""The end of a small CP whose residual vanishes: Levenberg-Marquardt, which converges quadratically there.

ALS needs thousands of sweeps on such tensors. The Gauss-Newton matrix is assembled from R x R Grams (Tomasi and Bro,
2006; Sorber, Van Barel, De Lathauwer, 2013). The penalty μ Σ λ_r² is itself a sum of squares, of the components'
entries: it multiplies what a component has in common with itself by 1 + μ.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._als import Iterate, balanced, wide_gram
from ._budget import Budget

_STEPS = 100
_DAMPING = 1e-2  # at the start, relative to the mean of the diagonal
_LEAST_DAMPING = 1e-15


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
