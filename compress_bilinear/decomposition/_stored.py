"""What layers store of a factor or a core, and a rounding of factors that lets errors of components cancel."""

import torch
from torch import Tensor

from ..config import Quantize
from ..quantization import FORMATS, LEVELS, UNIT, Format
from ._budget import Budget
from ._factors import row_slices
from ._metric import Metric

_MOST_STEPS = 2**14  # of rounding one after another
_TOGETHER = 64  # axis entries whose errors later ones take back at once
_INPUT_DAMPING = 1e-2  # the same of inputs' moments, whose small directions may be larger in other data
_DAMPING = 1e-3  # of the system's mean diagonal: steps along directions that hardly matter stay small


def unit_columns(
    factor: Tensor,  # (d, R)
) -> tuple[Tensor, Tensor]:
    """Columns whose largest magnitude is 127/128, what int8 without a scale holds, and their scales (R,); float64."""
    wide = factor.detach().double()
    scale = wide.abs().amax(0) / UNIT / LEVELS
    return wide / scale.where(scale > 0, 1.0), scale


def stored_core(core: Tensor, quantize: Quantize) -> Tensor:
    """A core (R_o, R_i, R_j) as a layer stores it; float64."""
    return FORMATS[quantize].round_to(core, "weight")


def stored_columns(
    factor: Tensor,  # (d, R)
    mode: int,
    quantize: Quantize,
    gram: Tensor | None = None,  # (R, R)
) -> tuple[Tensor, Tensor]:
    """A factor's columns as a layer stores them, (d, R) float64, and their scales (R,).

    Each entry is rounded to its nearest value; or, where a `gram` of what the components multiply is given, so that
    the rounding E of the whole factor is small in Σ_d E_d gram E_dᵀ. For that, components are rounded one after
    another, and each one's error is taken back, as far as they can, by those that follow (GPTQ: Frantar, Ashkboos,
    Hoefler, Alistarh, 2023; the nearest plane algorithm of Babai, 1986). Components that cancel gain most.
    """
    unit, scale = unit_columns(factor)
    form = FORMATS[quantize]
    stored = form.encode(unit if mode == 0 else unit.T, "factor")
    plain, peaks = stored.decode(torch.float64), form.peaks(stored, slice(None))
    if mode != 0:
        plain, peaks = plain.T, None if peaks is None else peaks.T
    if gram is None or peaks is None:
        return plain, scale
    return _fed_back(unit, scale, plain, peaks, gram, form), scale


def stored_weight(
    weight: Tensor,  # (O, I, J)
    quantize: Quantize,
    metric: Metric,
    budget: Budget | None = None,
) -> Tensor:  # (O, I, J)
    """A weight as a dense layer stores it, rounded so that its outputs change little; in the weight's dtype.

    Entries are rounded one after another, and each one's error is taken back by those that follow, as in
    `stored_columns`: here of each output by itself, in the metric of its inputs, whose Kronecker product is never
    formed. Of a weight with more than 2¹⁴ products of inputs, errors are taken back along in1 alone. Outputs for which
    the budget leaves no time are rounded value by value.
    """
    form = FORMATS[quantize]
    stored = form.encode(weight, "weight")
    if form.peaks(stored, slice(0, 0)) is None:
        return stored.decode(weight.dtype)
    upper1, upper2 = (_upper(None if root is None else root @ root, _INPUT_DAMPING) for root in metric.roots[1:])
    sizes = weight.shape[1:]
    neither = upper1 is None and upper2 is None
    upper1, upper2 = (
        torch.eye(size, dtype=torch.float64, device=weight.device) if upper is None else upper.to(weight.device)
        for size, upper in zip(sizes, (upper1, upper2), strict=True)
    )
    one_by_one = sizes.numel() <= _MOST_STEPS
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    budget = budget or Budget()
    for rows in row_slices(weight.shape):
        plain, peaks = stored.decode(torch.float64, rows), form.peaks(stored, rows)
        assert peaks is not None
        result[rows] = plain.to(result.dtype)
        if neither or budget.left() <= 0:
            continue
        budget.report(rows.start / len(weight), 1.0)
        # (I, J, ·): what is rounded at once lies together
        wanted, codes, size = (part.double().permute(1, 2, 0).contiguous() for part in (weight[rows], plain, peaks))
        del plain, peaks
        found = torch.empty_like(wanted)
        for start in range(0, len(wanted), _TOGETHER):
            if budget.left() <= 0:
                break
            end = min(start + _TOGETHER, len(wanted))
            lost = torch.empty_like(wanted[start:end])
            for i in range(start, end):
                row = wanted[i]
                if one_by_one:
                    found[i] = _row_fed_back(row.clone(), codes[i], size[i], upper2, form)
                else:
                    found[i] = _kept_largest(row, codes[i], size[i], form)
                lost[i - start] = (row - found[i]) / upper1[i, i]
                wanted[i + 1 : end].flatten(1).addr_(upper1[i, i + 1 : end], lost[i - start].flatten(), alpha=-1)
            # all that follow at once: a pass over them for each would take most of the time
            wanted[end:].flatten(1).addmm_(upper1[start:end, end:].T, lost.flatten(1), alpha=-1)
        else:  # errors that were not all taken back would be worse than none that were
            result[rows] = found.permute(2, 0, 1).to(result.dtype)
    return result


def _row_fed_back(row: Tensor, plain: Tensor, peaks: Tensor, upper: Tensor, form: Format) -> Tensor:  # (J, ·)
    for j, wanted in enumerate(row):
        value = _kept_largest(wanted, plain[j], peaks[j], form)
        row[j + 1 :].addr_(upper[j, j + 1 :], (wanted - value) / upper[j, j], alpha=-1)
        row[j] = value
    return row


def _kept_largest(wanted: Tensor, plain: Tensor, peaks: Tensor, form: Format) -> Tensor:
    """Nearest values, but the largest entry of each block as it was encoded: its scale is derived from it."""
    return torch.where(plain.abs() >= peaks, plain, form.nearest(wanted, peaks))


def _upper(system: Tensor | None, damping: float = _DAMPING) -> Tensor | None:
    """The Cholesky factor U with UᵀU = the inverse of a damped system; None where it has none, or for no system."""
    if system is None:
        return None
    diagonal = system.diagonal()
    diagonal.add_(damping * float(diagonal.mean()) + 1e-300)
    root = diagonal.sqrt()
    inverse = torch.linalg.inv(system / root / root[:, None]) / root / root[:, None]
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if int(failed) or not bool(torch.isfinite(upper).all()) else upper


def _fed_back(
    unit: Tensor, scale: Tensor, plain: Tensor, peaks: Tensor, gram: Tensor, form: Format
) -> Tensor:  # (d, R)
    upper = _upper(gram * scale * scale[:, None])
    if upper is None:
        return plain
    found, result = unit.clone(), plain.clone()
    for column in range(unit.shape[1]):
        wanted = found[:, column]
        value = _kept_largest(wanted, plain[:, column], peaks[:, column], form)
        result[:, column] = value
        error = (wanted - value) / upper[column, column]
        found[:, column + 1 :] -= torch.outer(error, upper[column, column + 1 :])
    return result
