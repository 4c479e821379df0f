"""The quantization-aware finish: factors that are exactly what a layer stores, each fitted to how others were rounded.

Once a factor has been rounded, the remaining factors are solved again by least squares, which absorbs part of the
rounding error; then the next is rounded. The plain rounding is kept where it is as good. Such sequences are known from
neural networks as quantization with layer-wise re-fitting (Hubara et al., "Accurate post training quantization with
small calibration sets", 2021); for CP and Tucker each step has a closed form.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..config import Quantize
from ..quantization import FORMATS
from ._factors import CPDecomposition, TuckerDecomposition, peak, relative, row_slices
from ._feedback import stored_columns, stored_core, stored_weight, unit_columns
from ._interpolation import interpolation, is_interpolated
from ._metric import PLAIN, Metric
from ._source import Source, full_precision, gram, leading, mode_product

_Any = TypeVar("_Any", CPDecomposition, TuckerDecomposition)

_LEAST_RIDGE = 1e-9
_CYCLES = 4  # of rounding each factor anew
_GAIN = 0.98  # of the squared error, below which another cycle is worth its time


def rounded(found: _Any, weight: Tensor, quantize: Quantize | None, metric: Metric = PLAIN) -> _Any:
    """A decomposition of the same rank whose parts are values of a storage format, with the least error found.

    Args:
        found: the decomposition in floating point.
        weight: what it approximates (O, I, J); with a `metric`, whitened by that, while `found` is not.
        quantize: the format. With None, and with 16 bits, whose errors are negligible, the result is `found`.
        metric: in which the error counts.

    Returns:
        A decomposition in float32, or in float64 for such a weight. The layer that is made of it stores exactly these
        values (but for a Tucker mode in interpolative form). Its `error` is the total, against `weight`, in float64.
    """
    if quantize is None or not FORMATS[quantize].coarse:
        return found
    with full_precision(weight.device):
        if isinstance(found, CPDecomposition):
            return _rounded_cp(found, weight, quantize, metric)
        return _rounded_tucker(found, weight, quantize, metric)


def distance(
    weight: Tensor,  # (O, I, J)
    first: CPDecomposition | TuckerDecomposition,
    second: Callable[[slice], Tensor],  # rows -> (·, I, J)
) -> float:
    """How far two approximations of a weight are apart, relative to its norm; in float64, slice by slice."""
    largest = peak(weight) or 1.0
    apart = total = 0.0
    subtract = first.subtraction()
    for rows in row_slices(weight.shape, weight.numel()):  # few, for each reads all of a Tucker's core
        values = second(rows).to(torch.float64, memory_format=torch.contiguous_format, copy=True)
        subtract(rows, values)
        apart += float((values / largest).norm()) ** 2
        total += float((weight.detach()[rows].double() / largest).norm()) ** 2
    return relative(apart, total)


def _rounded_cp(found: CPDecomposition, weight: Tensor, quantize: Quantize, metric: Metric) -> CPDecomposition:
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
        if best.squared_error() > _GAIN * before:
            break
    dtype = torch.promote_types(weight.dtype, torch.float32)
    out, in1, in2 = (factor.to(dtype) for factor in best.units)
    scales = (best.scales / source.scale).to(dtype)
    first, second, third = (metric.whitened(mode, unit).to(dtype) for mode, unit in enumerate((out, in1, in2)))
    error = CPDecomposition(scales, (first, second, third)).relative_error(weight)
    return CPDecomposition(scales, (out, in1, in2), error)


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


def _interpolated(core: Tensor, factor: Tensor, mode: int) -> tuple[Tensor, Tensor]:
    """The core and a factor (d, r) in the form that a layer stores: r rows of the factor are those of the identity."""
    order, coefficients, turn = interpolation(factor)
    core = torch.tensordot(turn, core, dims=([1], [mode])).movedim(0, mode)
    identity = torch.eye(factor.shape[1]).to(coefficients)
    return core, torch.empty_like(factor, dtype=torch.float64).index_copy_(
        0, order, torch.cat([identity, coefficients])
    )


def _rounded_tucker(
    found: TuckerDecomposition, weight: Tensor, quantize: Quantize, metric: Metric
) -> TuckerDecomposition:
    source, dtype = Source(weight), torch.promote_types(weight.dtype, torch.float32)
    free = [not is_interpolated(rank, size) for rank, size in zip(found.rank, found.shape, strict=True)]
    factors = [factor.detach().double() for factor in found.factors]
    core = found.core.detach().double()
    for mode, (rank, size) in enumerate(zip(found.rank, found.shape, strict=True)):
        if rank == size:  # absorbed, as its layer does
            core = mode_product(core, factors[mode].T, mode)
            factors[mode] = torch.eye(size, dtype=torch.float64, device=core.device)

    def stored(core: Tensor, factors: list[Tensor]) -> TuckerDecomposition:
        for mode in range(3):
            if free[mode]:
                unit, scale = unit_columns(factors[mode])
                core = core * scale.view([-1 if axis == mode else 1 for axis in range(3)])
                factors[mode] = stored_columns(unit, mode, quantize)[0]
            elif found.rank[mode] < found.shape[mode]:
                core, factors[mode] = _interpolated(core, factors[mode], mode)
        roots = [None, *(metric.whitened(mode, factors[mode]) for mode in (1, 2))]
        fed_back = stored_weight(core, quantize, Metric((roots[0], roots[1], roots[2]), PLAIN.inverses))
        core = stored_core(core, quantize) if fed_back is None else fed_back.double()
        out, in1, in2 = (factor.to(dtype) for factor in factors)
        core = core.to(dtype)
        first, second, third = (metric.whitened(mode, f).to(dtype) for mode, f in enumerate((out, in1, in2)))
        error = TuckerDecomposition(core, (first, second, third)).relative_error(weight)
        return TuckerDecomposition(core, (out, in1, in2), error)

    plain = stored(core, list(factors))
    white = [metric.whitened(mode, factor) for mode, factor in enumerate(factors)]
    bases = [torch.linalg.qr(factor)[0].to(source.dtype) for factor in white]
    for mode in range(3):
        if not free[mode]:
            continue
        part = source.project(bases, skip=mode)
        unit = leading(gram(part, mode), found.rank[mode], torch.float64)
        factors[mode] = stored_columns(metric.unwhiten(mode, unit), mode, quantize)[0]
        white[mode] = metric.whitened(mode, factors[mode])
        bases[mode] = torch.linalg.qr(white[mode])[0].to(source.dtype)
    core = source.project(bases).double() / source.scale
    for mode, (basis, factor) in enumerate(zip(bases, white, strict=True)):
        turn = torch.linalg.pinv(basis.double().T @ factor, rtol=_LEAST_RIDGE)
        core = mode_product(core, turn.T, mode)
    fitted = stored(core, factors)
    return min(plain, fitted, key=lambda result: result.error)  # type: ignore[arg-type, return-value]
