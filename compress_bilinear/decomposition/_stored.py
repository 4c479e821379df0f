"""What layers store of a factor or a core, and a rounding of factors that lets errors of components cancel."""

import torch
from torch import Tensor

from ..config import Quantize
from ..quantization import (
    BLOCK,
    LEVELS,
    NF4_CODE,
    UNIT,
    dequantize,
    dequantize_nf4,
    quantize_blocks,
    quantize_nf4,
    quantize_unit,
    scale_grid,
)

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
    if quantize == "int8":
        return dequantize(*quantize_blocks(core, scale_grid(core.shape)), torch.float64)
    return _coded(core)[0]


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
    matrix = unit if mode == 0 else unit.T
    if quantize == "int8":
        plain, steps = dequantize(quantize_unit(matrix), None, torch.float64), torch.full_like(matrix, UNIT * LEVELS)
    else:
        plain, steps = _coded(matrix)
    if mode != 0:
        plain, steps = plain.T, steps.T
    return (plain if gram is None else _fed_back(unit, scale, plain, steps, gram, quantize)), scale


def _coded(values: Tensor) -> tuple[Tensor, Tensor]:
    """NF4 of a tensor, and the magnitude of each value's block."""
    qdata, scale = quantize_nf4(values)
    steps = scale.double().repeat_interleave(BLOCK)[: values.numel()].view(values.shape)
    return dequantize_nf4(qdata, scale, 0, values.numel(), torch.float64).view(values.shape), steps


def _fed_back(
    unit: Tensor, scale: Tensor, plain: Tensor, steps: Tensor, gram: Tensor, quantize: Quantize
) -> Tensor:  # (d, R)
    system = gram * scale * scale[:, None]
    diagonal = system.diagonal()
    diagonal.add_(_DAMPING * float(diagonal.mean()) + 1e-300)
    root = diagonal.sqrt()
    inverse = torch.linalg.inv(system / root / root[:, None]) / root / root[:, None]
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(failed) or not bool(torch.isfinite(upper).all()):
        return plain
    # the largest entries stay so: their codes are what makes a scale the scale
    largest, found, result = plain.abs() >= steps, unit.clone(), plain.clone()
    for column in range(unit.shape[1]):
        wanted = found[:, column]
        value = torch.where(largest[:, column], plain[:, column], _nearest(wanted, steps[:, column], quantize))
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
