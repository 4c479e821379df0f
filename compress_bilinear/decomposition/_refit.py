"""Factors fitted to rows: least squares between their outputs and the weight's.

Few rows do not determine many factors, so shuffled pairs of inputs join them. The weight gives their outputs without
noise. Their second moments are those of independent inputs, so that they shrink the rows' empirical fourth moment
towards the metric in which the factors were found (the idea of Ledoit and Wolf, "A well-conditioned estimator for
large-dimensional covariance matrices", 2004).

Solved by L-BFGS (Liu and Nocedal, 1989) on all factors at once, in coordinates in which each factor's own system is
close to the identity.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._budget import Budget
from ._factors import CPDecomposition, TuckerDecomposition
from ._source import full_precision

SHUFFLED_WEIGHT = 0.3  # of a shuffled pair, where a row has 1
_STEPS = 30
_EVALUATIONS = 20  # of the objective, in one step's line search
_TOLERANCE = 1e-4  # a step that lowers the objective by less than this part of it is the last
_HISTORY = 20
_CHUNK = 2**23  # elements of the largest intermediate that is held for a gradient
_DAMPING = 1e-3

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""Inputs (N, I) and (N, J), the outputs to reach (N, O), and the rows' weights (N,)."""


def refit_cp(found: CPDecomposition, rows: Rows, budget: Budget) -> CPDecomposition:
    """The best factors on the rows, beginning from `found`; a constant offset of the outputs is not counted."""
    rows, scale = _normalised(rows)
    root = (found.weights.double() * scale).pow(1 / 3)
    factors = [factor.double() * root for factor in found.factors]
    grams = [factor.T @ factor for factor in factors]
    turns = [_inverse_root(grams[a] * grams[b]) for a, b in ((1, 2), (0, 2), (0, 1))]

    def forward(parts: Sequence[Tensor], input1: Tensor, input2: Tensor) -> Tensor:
        out, in1, in2 = parts
        return ((input1 @ in1) * (input2 @ in2)) @ out.T

    width = sum(factor.shape[0] for factor in factors) + 3 * found.rank
    out, in1, in2 = _minimised(factors, turns, forward, rows, width, budget)
    return CPDecomposition(out.new_full((found.rank,), 1 / scale), (out, in1, in2))


def refit_tucker(found: TuckerDecomposition, rows: Rows, budget: Budget) -> TuckerDecomposition:
    """As `refit_cp`; a mode of full rank stays absorbed into the core. Factors should have orthonormal columns."""
    rows, scale = _normalised(rows)
    core = found.core.double() * scale
    factors = [factor.double() for factor in found.factors]
    free = [mode for mode, factor in enumerate(factors) if factor.shape[0] != factor.shape[1]]
    turns = []
    for mode in free:
        flat = core.movedim(mode, 0).flatten(1)
        turns.append(_inverse_root(flat @ flat.T))

    def forward(parts: Sequence[Tensor], input1: Tensor, input2: Tensor) -> Tensor:
        by_mode = dict(zip(free, parts[1:], strict=True))
        left = input1 @ by_mode[1] if 1 in by_mode else input1
        right = input2 @ by_mode[2] if 2 in by_mode else input2
        core = parts[0]
        if core.shape[2] > core.shape[1]:  # the longer input axis is summed first
            core, left, right = core.mT, right, left
        half = (left @ core.transpose(0, 1).flatten(1)).unflatten(1, (core.shape[0], core.shape[2]))
        inner = torch.bmm(half, right.unsqueeze(2)).squeeze(2)
        return inner @ by_mode[0].T if 0 in by_mode else inner

    width = 3 * core.shape[0] * min(core.shape[1:]) + sum(factor.shape[0] for factor in factors)
    parts = _minimised([core, *(factors[m] for m in free)], [None, *turns], forward, rows, width, budget)
    for mode, part in zip(free, parts[1:], strict=True):
        factors[mode] = part
    out, in1, in2 = factors
    return TuckerDecomposition(parts[0] / scale, (out, in1, in2))


def _normalised(rows: Rows) -> tuple[Rows, float]:
    """Inputs with entries of mean square 1, outputs of mean squared norm 1, and the scale that the weight then has."""
    input1, input2, wanted, weights = rows
    first, second = (float(value.double().square().mean().sqrt()) or 1.0 for value in (input1, input2))
    size = float((weights.double() @ wanted.double().square()).sum() / weights.double().sum()) ** 0.5 or 1.0
    return (input1 / first, input2 / second, wanted / size, weights), first * second / size


def _inverse_root(gram: Tensor) -> Tensor:
    """V^-½ of a Gram matrix, damped."""
    values, vectors = torch.linalg.eigh(gram)
    floor = _DAMPING * float(values[-1]) if len(values) else 0.0
    return (vectors * (values.clamp_min(0) + max(floor, 1e-30)).rsqrt()) @ vectors.T


def _minimised(
    start: Sequence[Tensor],
    turns: Sequence[Tensor | None],
    forward: Callable[[Sequence[Tensor], Tensor, Tensor], Tensor],
    rows: Rows,
    width: int,
    budget: Budget,
) -> list[Tensor]:
    """The parts that minimise the weighted squared error of `forward` on the rows; part k moves by Δ·turn."""
    input1, input2, wanted, weights = rows
    dtype = wanted.dtype
    total = float(weights.double().sum())
    base = [part.to(dtype) for part in start]
    scales = [None if turn is None else turn.to(dtype) for turn in turns]
    moves = [torch.zeros_like(b, memory_format=torch.contiguous_format).requires_grad_() for b in base]
    offset = wanted.new_zeros(wanted.shape[1]).requires_grad_()
    step = max(1, _CHUNK // width)
    chunks = list(zip(*(tensor.split(step) for tensor in (input1, input2, wanted, weights)), strict=True))

    def moved() -> list[Tensor]:
        return [b + (m if s is None else m @ s) for b, m, s in zip(base, moves, scales, strict=True)]

    optimizer = torch.optim.LBFGS(
        [*moves, offset],
        max_iter=1,
        max_eval=_EVALUATIONS,
        history_size=_HISTORY,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        optimizer.zero_grad()
        parts = moved()
        leaves = [part.detach().requires_grad_() for part in parts]
        value = 0.0
        for first, second, target, weight in chunks:  # each chunk's graph goes before the next is made
            difference = forward(leaves, first, second) + offset - target
            loss = (weight @ difference.square()).sum() / total
            loss.backward()
            value += float(loss.detach())
        torch.autograd.backward(parts, [leaf.grad for leaf in leaves])
        return value

    best, least = list(base), float("inf")
    with full_precision(wanted.device), torch.enable_grad():
        for k in range(_STEPS):
            begun, before = budget.elapsed(), [part.detach() for part in moved()]
            value = float(optimizer.step(objective))  # of the point before the step
            if not value < least:
                break
            gain, best, least = least - value, before, value
            budget.report(k / _STEPS, value**0.5)
            if gain < _TOLERANCE * value or budget.left() < budget.elapsed() - begun:
                break
    return [part.double() for part in best]
