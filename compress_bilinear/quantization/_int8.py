"""int8 values with scales: one for each block of a tensor, or none where the scale is kept elsewhere.

The scheme is linear, symmetric absmax quantization, that of bitsandbytes' `int8_vectorwise_quant` (Dettmers et al.,
LLM.int8(), 2022), on blocks along any axes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LEVELS = 127  # symmetric: -128 is not used, as in bitsandbytes
UNIT = 2.0**-7  # the step of values without a scale: a power of two, so that float16 and bfloat16 hold them exactly
SCALE_DTYPE = torch.bfloat16  # of a block's scale: it has float32's range, and values are rounded relative to it
_MOST_BLOCK = 128  # entries that share a scale; the largest of 1,024 Gaussian ones would cost 0.75% error, not 0.63%
_LEAST_BLOCK = 32  # below which a scale would take more than 1/16 of its values' bytes
_CHUNK = 2**19  # values that are encoded at once


def encode_int8(
    values: Tensor,  # (...), float32, finite, not empty
    grid: Sequence[int],
    scale_dtype: torch.dtype = SCALE_DTYPE,
    chunk: int = _CHUNK,
) -> tuple[Tensor, Tensor]:
    """Round to int8 with one scale for each block.

    Args:
        grid: the number of blocks along each axis. A block has ⌈size / number⌉ consecutive entries, the last the rest;
            none may be empty.
        chunk: values that are encoded at once, or one entry of the first axis, where it has no blocks.

    Returns:
        `qdata` int8 with the tensor's shape and `scale` of shape `grid`: `qdata * scale` ≈ `values`, each entry within
        half its scale, to float32's accuracy. A block of zeros has scale 0.
    """
    step = max(1, chunk * len(values) // values.numel())
    if grid[0] == len(values) > step:
        qdata = torch.empty(values.shape, dtype=torch.int8, device=values.device)
        scale = torch.empty(grid, dtype=scale_dtype, device=values.device)
        for part, integers, steps in zip(values.split(step), qdata.split(step), scale.split(step), strict=True):
            found = encode_int8(part, (len(part), *grid[1:]), scale_dtype, chunk)
            integers.copy_(found[0])
            steps.copy_(found[1])
        return qdata, scale
    scale = _representable_scale(_peaks(values, grid).double(), scale_dtype)
    divisor = torch.where(scale > 0, scale.float(), torch.inf)  # a block of zeros, or of too small values, becomes 0
    quotient = values / expand_scale(divisor, values.shape)
    return quotient.round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale


def encode_unit(
    values: Tensor,  # (...), float32, finite, magnitudes at most 127/128
) -> Tensor:
    """Round to int8 steps of 2⁻⁷, for a tensor whose scale is kept elsewhere."""
    return (values.double() / UNIT).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


def scale_grid(shape: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The numbers of blocks of a weight (O, I, J) along its axes; sizes may be broadcast tensors.

    Each block lies in a row along the longer input axis and has at most 128 entries. Rows of fewer than 32 entries
    share a scale with their neighbours of the same output.
    """
    out, in1, in2 = shape
    return out, _block_count(in1, in2, in1 > in2), _block_count(in2, in1, in2 >= in1)


def _block_count(size: Any, other: Any, is_longer: Any) -> Any:
    """Blocks along one input axis; along the shorter one, a block has ⌈32 / longer⌉ rows."""
    along, across = -(-size // _MOST_BLOCK), -(-size // -(-_LEAST_BLOCK // other))
    return across + is_longer * (along - across)


def _peaks(values: Tensor, grid: Sequence[int]) -> Tensor:
    """The largest magnitude in each block."""
    peak = values.abs()
    for axis, count in enumerate(grid):
        size = values.shape[axis]
        if count < size:
            block = -(-size // count)
            padding = [0, 0] * (peak.dim() - 1 - axis) + [0, count * block - size]
            peak = torch.nn.functional.pad(peak, padding).unflatten(axis, (count, block)).amax(axis + 1)
    return peak


def _representable_scale(peak: Tensor, dtype: torch.dtype) -> Tensor:
    """peak / 127 in `dtype`, rounded so that 127 steps neither overflow nor, where steps are subnormal, fall short."""
    scale = (peak / LEVELS).to(dtype)
    above = scale.double() * LEVELS > torch.finfo(torch.float32).max
    below = scale.double() * LEVELS < peak
    scale = torch.where(above, torch.nextafter(scale, torch.zeros_like(scale)), scale)
    tiny = scale < torch.finfo(torch.float32).tiny
    return torch.where(below & tiny, torch.nextafter(scale, torch.ones_like(scale)), scale)


def expand_scale(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat the scales of blocks until they are broadcastable to `shape`."""
    for axis, (count, size) in enumerate(zip(scale.shape, shape, strict=True)):
        if 1 < count < size:
            scale = scale.repeat_interleave(-(-size // count), axis).narrow(axis, 0, size)
    return scale


def decode_int8(qdata: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`qdata * scale`, multiplied in float32 (float64 for a float64 result) and rounded once, to `dtype`.

    Each scale is that of a block; without scales the step is 2⁻⁷. Besides the result at most one float32 copy is held.
    """
    if scale is None:
        return qdata.to(dtype).mul_(UNIT)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values, scale = qdata.to(wide), scale.to(wide)
    if scale.shape[1:] == (*values.shape[1:2], 1):  # of whole rows: at once, for layers may be small
        return values.mul_(scale).to(dtype)
    cut = [axis for axis, (count, size) in enumerate(zip(scale.shape, values.shape, strict=True)) if 1 < count < size]
    if len(cut) == 1:
        # block by block in place: to repeat the scales could take as much memory as the values
        (axis,), count = cut, scale.shape[cut[0]]
        block = -(-values.shape[axis] // count)
        whole, rest = values.split([(count - 1) * block, values.shape[axis] - (count - 1) * block], axis)
        whole.unflatten(axis, (count - 1, block)).mul_(scale.narrow(axis, 0, count - 1).unsqueeze(axis + 1))
        rest.mul_(scale.narrow(axis, count - 1, 1))
    else:
        values.mul_(expand_scale(scale, values.shape))
    return values.to(dtype)
