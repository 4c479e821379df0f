"""The end of a CP whose residual vanishes: what finds an exact low rank to the last digit.

ALS alone needs thousands of sweeps there. Small tensors are finished by Levenberg-Marquardt steps, which converge
quadratically: their Gauss-Newton matrix is assembled from R x R Grams (Tomasi and Bro, 2006; Sorber, Van Barel, De
Lathauwer, 2013). The penalty μ Σ λ_r² is itself a sum of squares, of the components' entries: it multiplies what a
component has in common with itself by 1 + μ.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import Quantize
from ._als import AMPLIFICATION_LIMIT, PENALTY, Iterate, Stage, balanced, descend, wide_gram
from ._budget import Budget
from ._source import Source

EXACT = 1e-3  # squared residual under which a tensor may be exactly of low rank: ten times the penalty
ZERO = 1e-13  # squared residual that is float32's rounding of the weight

_FORMAT_ZERO = 1e-8  # the same where factors will have 16 bits or fewer: far below what their rounding adds
_SWEEPS = 150  # under each lower penalty
_LEAST_PENALTY = 1e-16  # below which it is lost in float64's rounding
_CHEAP_UNKNOWNS = 600  # whose Newton steps cost less than sweeps; they grow with the cube of the unknowns
_MOST_UNKNOWNS = 3000  # whose Newton steps take about a second each: matrix multiplication tensors have fewer
_STEPS = 100
_DAMPING = 1e-2  # at the start, relative to the mean of the diagonal
_LEAST_DAMPING = 1e-15  # relative too: below it, float64 does not see it


def is_newton_cheap(sizes: Sequence[int], rank: int) -> bool:
    """Whether Newton steps on a CP of these sizes cost less than sweeps."""
    return sum(sizes) * rank <= _CHEAP_UNKNOWNS


def negligible(source: Source, rank: int, quantize: Quantize | None) -> float:
    """The squared residual below which a smaller one is lost when the factors are rounded to how they are stored."""
    if is_newton_cheap([min(size, rank) for size in source.shape], rank):
        return 0.0
    if quantize is not None or source.weight.dtype.itemsize < 4:
        return _FORMAT_ZERO
    return ZERO if source.weight.dtype == torch.float32 else 0.0


def anneal_penalty(
    tensor: Tensor,  # (a, b, c)
    best: Iterate,
    budget: Budget,
    zero: float,
    outside: float = 0.0,
    scale: float = 1.0,
) -> Iterate:
    """Reduce the penalty as long as it dominates the residual, as it does on weights that are exactly of low rank.

    Args:
        zero: the squared residual at which to stop.
        outside: squared norm that the tensor leaves out of one of norm 1.
        scale: of the tensor, as in `descend`.
    """
    if best.residual > EXACT:
        return best
    narrow = tensor.dtype != torch.float64 or best.factors[0].dtype != torch.float64
    tensor = tensor.double() * scale
    if narrow:  # float32's residual is mostly rounding
        best = measured_exactly(tensor, [factor.double() for factor in best.factors], PENALTY, outside)
    unknowns = sum(tensor.shape) * best.factors[0].shape[1]
    # with many more unknowns than entries, sweeps find one of the many solutions sooner
    newton = unknowns <= max(_CHEAP_UNKNOWNS, min(_MOST_UNKNOWNS, tensor.numel()))
    penalty = PENALTY
    # expensive Newton steps come after the sweeps, which with components to spare leave nothing to do
    for by_newton in [newton] if not newton or unknowns <= _CHEAP_UNKNOWNS else [False, True]:
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
            if best.amplification > AMPLIFICATION_LIMIT and best.residual > ZERO:
                return best  # lower residuals are bought by components that cancel, of which `cp` warns
        penalty *= 10  # the last at which sweeps still helped
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


def pencil_start(core: Tensor, rank: int, generator: torch.Generator) -> list[Tensor] | None:
    """The components of a tensor of exactly this rank, from the eigenvectors of a matrix pencil.

    Needs two modes that are no smaller than the rank (Leurgans, Ross, Abel, 1993; Sanchez and Kowalski, 1990); None
    where there are none, or where the pencil is singular.
    """
    modes = sorted(range(3), key=lambda m: core.shape[m])
    small, first, second = modes
    if min(core.shape[first], core.shape[second]) < rank or core.shape[small] < 2:
        return None
    cube = core.double().permute(small, first, second)[:, :rank, :rank].cpu()
    mixes = torch.randn(2, core.shape[small], generator=generator, dtype=torch.float64, device="cpu")
    one, two = torch.einsum("ms,sij->mij", mixes, cube)
    solved, failed = torch.linalg.solve_ex(two.T, one.T)  # (one two⁻¹)ᵀ
    if int(failed) or not bool(torch.isfinite(solved).all()):
        return None
    values, vectors = torch.linalg.eig(solved.T)
    # of a complex pair, which a tensor of this real rank would not have, the parts span the same plane
    basis = torch.where(values.imag < 0, vectors.imag, vectors.real)
    left = basis / basis.norm(dim=0).clamp_min(1e-300)
    slices = torch.linalg.lstsq(left, cube.movedim(1, 0).flatten(1)).solution.unflatten(1, (core.shape[small], rank))
    u, s, vh = torch.linalg.svd(slices, full_matrices=False)  # each (small, rank) slice is of rank one
    factors = [torch.empty(0)] * 3
    factors[small] = (u[:, :, 0] * s[:, :1]).T
    factors[first], factors[second] = left, vh[:, 0].T
    full = [torch.zeros(size, rank, dtype=torch.float64, device="cpu") for size in core.shape]
    for target, factor in zip(full, factors, strict=True):
        target[: factor.shape[0]] = factor
    return [factor.to(core) for factor in full]
