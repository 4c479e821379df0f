"""What layers store of a factor, a core or a weight, rounded so that the errors of its entries cancel.

Entries are rounded one after another, and those that follow are changed so that they take back the error, as far as
they can. Sources: GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, 2023); the nearest plane algorithm (Babai, 1986).
"""

import torch
from torch import Tensor

from ..config import Quantize
from ..quantization import FORMATS, LEVELS, UNIT, Format
from ._budget import Budget
from ._factors import row_slices
from ._metric import Metric

_MOST_STEPS = 2**14  # entries of one output that are rounded one after another: each step is several calls
_TOGETHER = 64  # indices of in1 whose errors the rest of a weight takes back in one product
_DAMPING = 1e-3  # of the system's mean diagonal: steps along directions of little weight stay small
_INPUT_DAMPING = 1e-2  # the same of inputs' moments, whose small directions may be larger in other data


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

    Each entry is rounded to the nearest value. With a `gram` of what the columns multiply, columns are rounded one
    after another, so that the rounding E of the factor is small in Σ_d E_d gram E_dᵀ. This helps most where components
    cancel.
    """
    unit, scale = unit_columns(factor)
    form = FORMATS[quantize]
    stored = form.encode(unit if mode == 0 else unit.T, "factor")
    plain, peaks = stored.decode(torch.float64), form.peaks(stored, slice(None))
    if mode != 0:
        plain, peaks = plain.T, None if peaks is None else peaks.T
    upper = None if gram is None or peaks is None else _upper(gram * scale * scale[:, None])
    if upper is None or peaks is None:
        return plain, scale
    return _fed_back(unit.T.contiguous(), plain.T, peaks.T, upper, form).T, scale


def stored_weight(
    weight: Tensor,  # (O, I, J)
    quantize: Quantize,
    metric: Metric,
    budget: Budget | None = None,
    most_steps: int = _MOST_STEPS,
) -> Tensor:  # (O, I, J)
    """A weight as a dense layer stores it, rounded so that its outputs change little; in the weight's dtype.

    The entries of each output are rounded one after another in the metric of its inputs, whose Kronecker product is
    never formed. Where I·J is above `most_steps`, errors are taken back along in1 alone. Outputs for which the budget
    leaves no time are rounded to the nearest values.
    """
    form = FORMATS[quantize]
    stored = form.encode(weight, "weight")
    if form.peaks(stored, slice(0, 0)) is None:
        return stored.decode(weight.dtype)
    upper1, upper2 = (_upper(None if root is None else root.T @ root, _INPUT_DAMPING) for root in metric.roots[1:])
    neither = upper1 is None and upper2 is None
    upper1, upper2 = (
        torch.eye(size, dtype=torch.float64, device=weight.device) if upper is None else upper.to(weight.device)
        for size, upper in zip(weight.shape[1:], (upper1, upper2), strict=True)
    )
    along_both = weight.shape[1:].numel() <= most_steps
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    budget = budget or Budget()
    for rows in row_slices(weight.shape):
        plain, peaks = stored.decode(torch.float64, rows), form.peaks(stored, rows)
        assert peaks is not None
        result[rows] = plain.to(result.dtype)
        if neither or budget.left() <= 0:
            continue
        budget.report(rows.start / len(weight), 1.0)
        # (I, J, ·), so that what is rounded at once is contiguous
        parts = [part.double().permute(1, 2, 0).contiguous() for part in (weight[rows], plain, peaks)]
        del plain, peaks
        found = _outputs_fed_back(parts, upper1, upper2 if along_both else None, form, budget)
        if found is not None:
            result[rows] = found.permute(2, 0, 1).to(result.dtype)
    return result


def _outputs_fed_back(
    parts: list[Tensor],  # values, their nearest ones, peaks, each (I, J, ·); the first is written to
    upper1: Tensor,  # (I, I)
    upper2: Tensor | None,  # (J, J)
    form: Format,
    budget: Budget,
) -> Tensor | None:
    """Some outputs of a weight, rounded; None where time ran out: errors half taken back are worse than none."""
    wanted, plain, peaks = parts
    found = torch.empty_like(wanted)
    for start in range(0, len(wanted), _TOGETHER):
        if budget.left() <= 0:
            return None
        end = min(start + _TOGETHER, len(wanted))
        lost = torch.empty_like(wanted[start:end])
        for i in range(start, end):
            if upper2 is None:
                found[i] = _nearest(wanted[i], plain[i], peaks[i], form)
            else:
                found[i] = _fed_back(wanted[i].clone(), plain[i], peaks[i], upper2, form)
            lost[i - start] = (wanted[i] - found[i]) / upper1[i, i]
            wanted[i + 1 : end].flatten(1).addr_(upper1[i, i + 1 : end], lost[i - start].flatten(), alpha=-1)
        # the rest in one product: a pass over it for each index would take most of the time
        wanted[end:].flatten(1).addmm_(upper1[start:end, end:].T, lost.flatten(1), alpha=-1)
    return found


def _fed_back(values: Tensor, plain: Tensor, peaks: Tensor, upper: Tensor, form: Format) -> Tensor:  # (n, m)
    """Rows rounded one after another in the metric of `upper` (n, n), in place."""
    for j, wanted in enumerate(values):
        rounded = _nearest(wanted, plain[j], peaks[j], form)
        values[j + 1 :].addr_(upper[j, j + 1 :], (wanted - rounded) / upper[j, j], alpha=-1)
        values[j] = rounded
    return values


def _nearest(wanted: Tensor, plain: Tensor, peaks: Tensor, form: Format) -> Tensor:
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
