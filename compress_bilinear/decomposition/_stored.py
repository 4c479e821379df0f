"""What layers store of a factor or a core, and a rounding of factors that lets errors of components cancel."""

import torch
from torch import Tensor
from typing_extensions import assert_never

from ..config import Quantize
from ..quantization import (
    BLOCK,
    LEVELS,
    NF4_CODE,
    UNIT,
    BF16Tensor,
    dequantize,
    dequantize_nf4,
    expanded,
    quantize_blocks,
    quantize_nf4,
    quantize_unit,
    scale_grid,
)
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
    match quantize:
        case "bf16":
            return _halved(core)
        case "int8":
            return dequantize(*quantize_blocks(core, scale_grid(core.shape)), torch.float64)
        case "nf4":
            return _coded(core)[0]
        case _:
            assert_never(quantize)


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
    if quantize == "bf16":  # so fine that nothing has to be taken back
        return _halved(unit), scale
    matrix = unit if mode == 0 else unit.T
    if quantize == "int8":
        plain, steps = dequantize(quantize_unit(matrix), None, torch.float64), torch.full_like(matrix, UNIT * LEVELS)
    else:
        plain, steps = _coded(matrix)
    if mode != 0:
        plain, steps = plain.T, steps.T
    return (plain if gram is None else _fed_back(unit, scale, plain, steps, gram, quantize)), scale


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
    if quantize == "bf16":
        return _halved(weight).to(weight.dtype)
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
        plain, steps = _outputs(weight, rows, quantize)
        result[rows] = plain.to(result.dtype)
        if neither or budget.left() <= 0:
            continue
        budget.report(rows.start / len(weight), 1.0)
        # (I, J, ·): what is rounded at once lies together
        wanted, codes, size = (part.double().permute(1, 2, 0).contiguous() for part in (weight[rows], plain, steps))
        del plain, steps
        found = torch.empty_like(wanted)
        for start in range(0, len(wanted), _TOGETHER):
            if budget.left() <= 0:
                break
            end = min(start + _TOGETHER, len(wanted))
            lost = torch.empty_like(wanted[start:end])
            for i in range(start, end):
                row = wanted[i]
                if one_by_one:
                    found[i] = _row_fed_back(row.clone(), codes[i], size[i], upper2, quantize)
                else:
                    found[i] = _kept_largest(row, codes[i], size[i], quantize)
                lost[i - start] = (row - found[i]) / upper1[i, i]
                wanted[i + 1 : end].flatten(1).addr_(upper1[i, i + 1 : end], lost[i - start].flatten(), alpha=-1)
            # all that follow at once: a pass over them for each would take most of the time
            wanted[end:].flatten(1).addmm_(upper1[start:end, end:].T, lost.flatten(1), alpha=-1)
        else:  # errors that were not all taken back would be worse than none that were
            result[rows] = found.permute(2, 0, 1).to(result.dtype)
    return result


def _outputs(weight: Tensor, rows: slice, quantize: Quantize) -> tuple[Tensor, Tensor]:
    """Some outputs of a weight in int8 or NF4, (·, I, J), and the largest magnitude of each value's block."""
    if quantize == "int8":
        return _blocks(weight[rows])
    width = weight.shape[1:].numel()
    first, last = rows.start * width, rows.stop * width
    begin = first // BLOCK * BLOCK  # of the block that the first value is in
    plain, steps = _coded(weight.flatten()[begin : -(-last // BLOCK) * BLOCK])
    inside = slice(first - begin, last - begin)
    return plain[inside].unflatten(0, (-1, *weight.shape[1:])), steps[inside].unflatten(0, (-1, *weight.shape[1:]))


def _row_fed_back(row: Tensor, plain: Tensor, steps: Tensor, upper: Tensor, quantize: Quantize) -> Tensor:  # (J, ·)
    for j, wanted in enumerate(row):
        value = _kept_largest(wanted, plain[j], steps[j], quantize)
        row[j + 1 :].addr_(upper[j, j + 1 :], (wanted - value) / upper[j, j], alpha=-1)
        row[j] = value
    return row


def _kept_largest(wanted: Tensor, plain: Tensor, steps: Tensor, quantize: Quantize) -> Tensor:
    """Nearest values; but the largest entries stay so: their codes are what makes a scale the scale."""
    return torch.where(plain.abs() >= steps, plain, _nearest(wanted, steps, quantize))


def _halved(values: Tensor) -> Tensor:
    return BF16Tensor.coded(values).dequantize(torch.float64)


def _blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 with its blocks' scales, and the largest magnitude of each value's block."""
    qdata, scale = quantize_blocks(values, scale_grid(values.shape))
    steps = expanded(scale.double() * LEVELS, values.shape).expand(values.shape)
    return dequantize(qdata, scale, torch.float64), steps


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


def _coded(values: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 of a tensor, and the magnitude of each value's block."""
    qdata, scale = quantize_nf4(values)
    steps = scale.double().repeat_interleave(BLOCK)[: values.numel()].view(values.shape)
    return dequantize_nf4(qdata, scale, 0, values.numel(), torch.float64).view(values.shape), steps


def _fed_back(
    unit: Tensor, scale: Tensor, plain: Tensor, steps: Tensor, gram: Tensor, quantize: Quantize
) -> Tensor:  # (d, R)
    upper = _upper(gram * scale * scale[:, None])
    if upper is None:
        return plain
    found, result = unit.clone(), plain.clone()
    for column in range(unit.shape[1]):
        wanted = found[:, column]
        value = _kept_largest(wanted, plain[:, column], steps[:, column], quantize)
        result[:, column] = value
        error = (wanted - value) / upper[column, column]
        found[:, column + 1 :] -= torch.outer(error, upper[column, column + 1 :])
    return result


def _nearest(values: Tensor, steps: Tensor, quantize: Quantize) -> Tensor:
    relative = values / steps.where(steps > 0, 1.0)
    if quantize == "int8":
        return (relative * LEVELS).round().clamp(-LEVELS, LEVELS) / LEVELS * steps
    code = torch.tensor(NF4_CODE, dtype=torch.float64, device=values.device)
    return code[torch.bucketize(relative, (code[1:] + code[:-1]) / 2)] * steps
