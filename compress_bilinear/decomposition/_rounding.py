"""The quantization-aware finish: factors that are exactly what a layer stores, each fitted to how others were rounded.

Once a factor of a CP has been rounded, the remaining factors are solved again by least squares, which absorbs part of
the rounding error; then the next is rounded. The plain rounding is kept where it is as good. Such sequences are known
from neural networks as quantization with layer-wise re-fitting (Hubara et al., "Accurate post training quantization
with small calibration sets", 2021); here each step has a closed form. Of a Tucker, the core absorbs the rounding.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..config import Quantize
from ..quantization import FORMATS
from ._budget import Budget
from ._factors import CPDecomposition, TuckerDecomposition
from ._feedback import stored_columns, stored_weight
from ._interpolation import interpolation, is_interpolated
from ._metric import PLAIN, Metric
from ._source import Source, full_precision, turned_

_Any = TypeVar("_Any", CPDecomposition, TuckerDecomposition)

_LEAST_RIDGE = 1e-9
_CYCLES = 4  # of rounding each factor anew
_GAIN = 0.98  # of the squared error, below which another cycle is worth its time


def rounded(
    found: _Any,
    weight: Tensor | None,
    quantize: Quantize | None,
    metric: Metric = PLAIN,
    budget: Budget | None = None,
    overwrite: bool = False,
) -> _Any:
    """A decomposition of the same rank whose parts are values of a storage format, with the least error found.

    Args:
        found: the decomposition in floating point.
        weight: what a CP is to be near (O, I, J), None for `found`; with a `metric` whitened by it, as `found` is not.
        quantize: the format. With None, and with 16 bits, whose errors are negligible, the result is `found`.
        metric: in which the error counts.
        budget: after which errors are no longer taken back.
        overwrite: the result may take the memory of a Tucker's core, which is nearly as large as the weight.

    Returns:
        A decomposition in float32, or in float64 for such a weight. The layer that is made of it stores exactly these
        values. Its `error` is not known: whoever needs it measures it.
    """
    if quantize is None or not FORMATS[quantize].coarse:
        return found
    with full_precision(found.factors[0].device):
        if isinstance(found, CPDecomposition):
            weight = metric.whiten(found.to_tensor()) if weight is None else weight
            return _rounded_cp(found, weight, quantize, metric, budget or Budget())
        core = found.core.to(torch.promote_types(found.core.dtype, torch.float32), copy=not overwrite)
        return _rounded_tucker(core, found.factors, quantize, metric, budget or Budget())


def _rounded_cp(
    found: CPDecomposition, weight: Tensor, quantize: Quantize, metric: Metric, budget: Budget
) -> CPDecomposition:
    source = Source(weight)
    ridge = FORMATS[quantize].error ** 2  # what rounding the factors that are left will add
    factors = [factor.detach().double() for factor in found.factors]
    factors[0] = factors[0] * (found.weights.double() * source.scale)
    best = _CPFit(source, [stored_columns(f, mode, quantize)[0] for mode, f in enumerate(factors)], metric)
    white = [metric.whitened(mode, factor) for mode, factor in enumerate(factors)]
    for cycle in range(_CYCLES):
        before, sums = best.squared_error(), None
        for mode in (1, 2, 0):
            gram_others = _gram_product(white, mode)
            if cycle > 0 or mode != 1:
                sums = source.mttkrp(white, mode)
                factors[mode] = metric.unwhiten(mode, _solved(sums, gram_others, ridge))
            factors[mode] = stored_columns(factors[mode], mode, quantize, gram_others)[0]
            white[mode] = metric.whitened(mode, factors[mode])
        trial = _CPFit(source, list(factors), metric, sums)  # of mode 0, which depend on the other factors only
        best = min(best, trial, key=_CPFit.squared_error)
        factors[0], white[0] = factors[0] * trial.scales, white[0] * trial.scales
        if best.squared_error() > _GAIN * before or budget.left() <= 0:
            break
    dtype = torch.promote_types(weight.dtype, torch.float32)
    out, in1, in2 = (factor.to(dtype) for factor in best.units)
    scales = (best.scales / source.scale).to(dtype)
    return CPDecomposition(scales, (out, in1, in2))


class _CPFit:
    """Rounded factors and the scales of their components, by least squares."""

    def __init__(self, source: Source, units: list[Tensor], metric: Metric, sums: Tensor | None = None) -> None:
        self.source, self.units = source, units
        white = [metric.whitened(mode, unit) for mode, unit in enumerate(units)]
        self.sums = source.mttkrp(white, 0) if sums is None else sums
        self.gram = _gram_product(white, None)
        self.inner = (self.sums * white[0]).sum(0)  # of each component with the weight
        self.scales = _solved(self.inner[None], self.gram, _LEAST_RIDGE)[0]

    def squared_error(self) -> float:
        lost = self.source.total + float(self.scales @ (self.gram @ self.scales - 2 * self.inner))
        return lost if math.isfinite(lost) else math.inf


def _gram_product(factors: Sequence[Tensor], skip: int | None) -> Tensor:  # (R, R)
    grams = [factor.T @ factor for mode, factor in enumerate(factors) if mode != skip]
    return math.prod(grams[1:], start=grams[0])


def _solved(sums: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """X of X (V + ridge · diag V) = sums; a component that is zero elsewhere is zero."""
    diagonal = gram.diagonal()
    root = diagonal.where(diagonal > 0, 1.0).sqrt()  # to unit diagonal, so that a ridge suits components of any scale
    system = gram / root / root[:, None]
    system.diagonal().mul_(1 + ridge).add_(_LEAST_RIDGE)
    return torch.linalg.solve(system, (sums / root).T).T / root


def _stored_factor(factor: Tensor, mode: int, quantize: Quantize) -> Tensor:
    """A factor (d, r) of a Tucker as a layer stores it, up to an invertible (r, r) for the core to take; float64."""
    size, rank = factor.shape
    if not is_interpolated(rank, size):
        return stored_columns(factor, mode, quantize)[0]
    order, coefficients, _ = interpolation(factor)
    if mode == 0:
        stored = FORMATS[quantize].round_to(coefficients, "rows")
    else:
        stored = FORMATS[quantize].round_to(coefficients.T, "columns").T
    parts = torch.cat([torch.eye(rank, dtype=coefficients.dtype, device=coefficients.device), stored])
    return torch.empty_like(parts).index_copy_(0, order, parts)


def _rounded_tucker(
    core: Tensor, floating: Sequence[Tensor], quantize: Quantize, metric: Metric, budget: Budget
) -> TuckerDecomposition:
    """Each factor is rounded, and the core takes up what leads from the rounded ones to the others, before it is.

    Modes of full rank are absorbed into the core, which is overwritten. (Another sweep over the weight, in which each
    factor moves to what is best for the rounded others, lowers the error by half a per cent, and by 2% at most.)
    """
    white, factors = list[Tensor](), list[Tensor]()
    for mode, factor in enumerate(floating):
        stored = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
        inner = factor = factor.detach().double()  # of a full mode, the core takes the whole
        if factor.shape[1] < len(factor):
            stored = _stored_factor(factor, mode, quantize)
            inner = torch.linalg.pinv(metric.whitened(mode, stored), rtol=_LEAST_RIDGE) @ metric.whitened(mode, factor)
        factors.append(stored)
        white.append(metric.whitened(mode, stored))
        if not torch.equal(inner, stored):  # a full mode has mostly been absorbed already
            turned_(core, inner.T.to(core.dtype), mode)
    inputs = Metric((None, white[1], white[2]), PLAIN.inverses)
    fed_back = stored_weight(core, quantize, inputs, budget, overwrite=True)
    core = FORMATS[quantize].encode(core, "weight").decode(core.dtype) if fed_back is None else fed_back
    out, in1, in2 = (factor.to(core.dtype) for factor in factors)
    return TuckerDecomposition(core, (out, in1, in2))
