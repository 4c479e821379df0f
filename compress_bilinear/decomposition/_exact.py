"""The end of a CP whose residual vanishes: what finds an exact low rank to float64's last digits.

The penalty on large components then is most of the objective. It falls by tenths, and sweeps follow, as long as it is
more than the residual. (Levenberg-Marquardt steps end at 1e-13 where this ends at 1e-8, in no more cases and no less
time.)
"""

import torch
from torch import Tensor

from ._als import AMPLIFICATION_LIMIT, PENALTY, Iterate, Stage, descend, wide_gram
from ._budget import Budget

_EXACT = 1e-3  # squared residual under which a tensor may be exactly of low rank: ten times the penalty
_ZERO = 1e-20  # squared residual at which nothing is left to gain: what rounding adds is far above it

_SWEEPS = 600  # under each lower penalty
_LEAST_PENALTY = 1e-16  # below which it is lost in float64's rounding


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
    if best.residual > _EXACT:
        return best
    tensor = tensor.double() * scale
    # float32's residual is mostly rounding
    best = measured_exactly(tensor, [factor.double() for factor in best.factors], PENALTY, outside)
    penalty = PENALTY
    while _ZERO < best.residual < 10 * penalty and penalty > _LEAST_PENALTY and budget.left() > 0:
        penalty *= 0.1
        lower = descend(tensor, best, Stage(_SWEEPS, first=penalty, last=penalty), budget)
        if not lower.residual < best.residual:
            break
        best = lower
        if best.amplification > AMPLIFICATION_LIMIT:
            break  # lower residuals are bought by components that cancel, of which `cp` warns
    return best


def measured_exactly(tensor: Tensor, factors: list[Tensor], penalty: float, outside: float) -> Iterate:
    """The objective with the residual from the difference itself, for small tensors: it does not cancel."""
    model = wide_gram(factors[0]) * wide_gram(factors[1]) * wide_gram(factors[2])
    norm, sizes = float(model.sum()), float(model.diagonal().sum())
    difference = torch.einsum("ir,jr,kr->ijk", *factors) - tensor
    residual = float(difference.square().sum()) + outside
    return Iterate(factors, residual + penalty * sizes, residual, sizes, norm)
