"""CP (Hitchcock, 1927; Carroll and Chang, 1970; Harshman, 1970) at a rank, to an error or within a size."""

import warnings

from torch import Tensor

from ..config import CPRank, MaxError, MaxSize, Quantize, check_quantize
from ..errors import AmplificationWarning, InfeasibleError
from ._budget import Budget, Progress
from ._cp_solve import AMPLIFICATION_LIMIT, as_result, solve
from ._factors import CPDecomposition
from ._search import search
from ._sizes import check_cp_rank, check_weight, cp_bytes, most_rank
from ._source import Source, full_precision


def cp(
    weight: Tensor,  # (O, I, J)
    rank: CPRank,
    *,
    seed: int = 0,
    quantize: Quantize | None = None,
    max_seconds: float | None = None,
    progress: Progress | None = None,
) -> CPDecomposition:
    """Decompose a three-way weight into a sum of R rank-one tensors.

    A weight with a mode of size 1 is a matrix and is solved exactly by its SVD.

    Args:
        weight: (O, I, J), any floating dtype, on any device.
        rank: R, which may exceed the modes' sizes, but not the least product of two of them, at which every tensor
            is exact; or `MaxError(e)`, the smallest rank found with relative error at most e, after the factors are
            rounded to the weight's dtype; or `MaxSize(f)`, the largest rank within f of the weight's bytes.
        seed: of the random starts. The same seed gives the same result, up to rounding on another number of threads.
        quantize: the format in which the caller will store the result. It changes the bytes that are counted, and the
            penalty on large components, to what rounding them is expected to add to the squared error.
        max_seconds: time after which the best so far is returned; None goes on to convergence. At least one sweep is
            made. With a limit, results depend on the machine's speed, and a `MaxError` that has not been met by then is
            infeasible.
        progress: called with the part done and the relative error so far.

    Returns:
        A `CPDecomposition` in the weight's dtype and device: unit columns, components by descending weight. Its
        `error` is the true residual in float64 after that rounding. Beside the weight, the solver holds at most three
        times its bytes; more beside those of under 2¹⁶ elements, which it works on in float64. Weights that are nearly
        exact are finished in float64, which takes up to twice that.

    Warns:
        AmplificationWarning: components cancel, by an `amplification` above 3.

    Raises:
        CompressionError: the weight is not three-way, floating, finite and non-empty.
        ConfigError: the rank is not positive, or above min(OI, OJ, IJ); or `max_seconds` is not positive.
        InfeasibleError: no rank that stores fewer bytes than the weight meets the target, or none did in time.
    """
    check_weight(weight)
    check_quantize(quantize)
    budget = Budget(max_seconds, progress)
    if isinstance(rank, MaxSize):
        rank = affordable(weight, rank, quantize)
    elif not isinstance(rank, MaxError):
        check_cp_rank(rank, weight.shape)
    with full_precision(weight.device):
        source = Source(weight)
        if isinstance(rank, MaxError):
            result = search(weight, source, rank, seed, quantize, budget)
        else:
            result = as_result(weight, source, solve(source, rank, seed, budget, quantize=quantize).factors)
    if result.amplification > AMPLIFICATION_LIMIT:
        warnings.warn(
            f"The CP components of rank {result.rank} cancel: amplification {result.amplification:.3g}, error "
            f"{result.error:.3g}. 8-bit rounding of the factors, about 1%, will be amplified as much.",
            AmplificationWarning,
            stacklevel=2,
        )
    return result


def affordable(weight: Tensor, target: MaxSize, quantize: Quantize | None) -> int:
    """The largest rank within the budget; InfeasibleError where there is none."""
    each = cp_bytes(1, weight.shape, weight.element_size(), quantize)
    original = weight.numel() * weight.element_size()
    budget = target.fraction * original
    if each > budget:
        raise InfeasibleError(
            f"Rank 1 stores {each} bytes. MaxSize({target.fraction:.4g}) of the weight's {original} bytes allows "
            f"{int(budget)}."
        )
    return min(int(budget // each), most_rank(weight.shape))
