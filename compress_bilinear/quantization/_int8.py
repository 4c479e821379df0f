"""int8 values with scales: for each slice along an axis, for each block of a weight, or none where a caller has one.

The scheme is linear, symmetric absmax quantization, that of bitsandbytes' `int8_vectorwise_quant` (Dettmers et al.,
LLM.int8(), 2022), on any axis or block.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CompressionError

LEVELS = 127  # symmetric: -128 is not used, as in bitsandbytes
UNIT = 2.0**-7  # the step of values without a scale: a power of two, so that float16 and bfloat16 hold them exactly
SCALE_DTYPE = torch.bfloat16  # of a block's scale: it has float32's range, and values are coded relative to what it is
_MOST_BLOCK = 128  # entries that share a scale; the largest of 1,024 Gaussian ones would cost 0.75% error, not 0.63%
_LEAST_BLOCK = 32  # below which a scale would take more than 1/16 of its values' bytes
_CHUNK = 2**19  # values in float64 at once


def quantize_int8(
    tensor: Tensor,  # (...), floating, finite
    dim: int,
) -> tuple[Tensor, Tensor]:
    """Round a tensor to int8 with one float32 scale for each slice along `dim`.

    Args:
        tensor: any floating tensor.
        dim: the axis that shares a scale.

    Returns:
        `qdata` int8 with the tensor's shape, and `scale` float32 with size 1 in `dim`, so that
        `qdata * scale` ≈ `tensor`, each entry within half its scale. A slice of zeros has scale 0.

    Raises:
        CompressionError: the tensor is not floating or not finite, or its values leave float32's range.
    """
    values = checked(tensor)
    grid = [1 if axis == dim % values.dim() else size for axis, size in enumerate(values.shape)]
    return _rounded(values, grid, torch.float32)


def quantize_blocks(
    tensor: Tensor,  # (...), floating, finite
    grid: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Round a tensor to int8 with one bfloat16 scale for each block of it.

    Args:
        grid: the number of blocks along each axis; a block has ⌈size / number⌉ consecutive entries, the last the rest.

    Returns:
        `qdata` int8 with the tensor's shape, and `scale` bfloat16 of shape `grid`.

    Raises: as `quantize_int8`; and for a grid with empty blocks.
    """
    values = checked(tensor)
    for axis, (size, count) in enumerate(zip(values.shape, grid, strict=True)):
        if size and not (1 <= count <= size and -(-size // -(-size // count)) == count):
            raise CompressionError(
                f"`grid[{axis}]` should cut {size} entries into blocks without an empty one. Found {count}."
            )
    return _rounded(values, grid, SCALE_DTYPE)


def quantize_unit(
    tensor: Tensor,  # (...), floating, finite, magnitudes at most 127/128
) -> Tensor:
    """Round to int8 steps of 2⁻⁷, for a tensor whose scale is kept elsewhere."""
    return (checked(tensor).double() / UNIT).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)


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
    if isinstance(is_longer, Tensor):
        return torch.where(is_longer, along, across)
    return along if is_longer else across


def checked(tensor: Tensor) -> Tensor:
    """The values in float32, contiguous. Raises: CompressionError where they cannot be quantized."""
    if not tensor.is_floating_point():
        raise CompressionError(f"`tensor` should be floating. Found {tensor.dtype}.")
    if tensor.dim() == 0:
        raise CompressionError("`tensor` should have an axis to share scales along. Found a scalar.")
    # contiguous: what is reloaded from a file has to have the same layout, or BLAS rounds otherwise
    values = tensor.detach().to(torch.float32).contiguous()
    if values.numel() and not all(math.isfinite(float(end)) for end in values.aminmax()):  # copies of it would add up
        raise CompressionError("`tensor` should be finite in float32 to be quantized. Found NaN or infinity.")
    return values


def _rounded(values: Tensor, grid: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    qdata = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    if values.numel() == 0:
        return qdata, torch.zeros(tuple(grid), dtype=dtype, device=values.device)
    step = max(1, _CHUNK * values.shape[0] // values.numel())
    if grid[0] == values.shape[0]:
        parts = [_peaks(part, (len(part), *grid[1:])) for part in values.split(step)]
        peak = torch.cat(parts).double()
    else:
        peak = _peaks(values, grid).double()
    scale = representable_scale(peak, dtype)
    divisor = torch.where(scale > 0, scale.double(), torch.inf)  # a block of zeros, or of too small values, becomes 0
    for start in range(0, values.shape[0], step):
        rows = slice(start, start + step)
        part = values[rows]
        by = divisor if grid[0] == 1 else divisor[rows]
        quotient = part.double() / expanded(by, part.shape)
        qdata[rows] = quotient.round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return qdata, scale


def _peaks(values: Tensor, grid: Sequence[int]) -> Tensor:
    """The largest magnitude in each block."""
    peak: Tensor | None = None
    for axis, count in enumerate(grid):
        size = values.shape[axis]
        if count == size:
            continue
        block = -(-size // count)

        def largest(part: Tensor, axis: int = axis, count: int = count, block: int = block) -> Tensor:
            padding = [0, 0] * (part.dim() - 1 - axis) + [0, count * block - part.shape[axis]]
            return torch.nn.functional.pad(part, padding).unflatten(axis, (count, block)).amax(axis + 1)

        peak = torch.maximum(largest(values), largest(-values)) if peak is None else largest(peak)
    return values.abs() if peak is None else peak


def representable_scale(peak: Tensor, dtype: torch.dtype) -> Tensor:
    """peak / 127 in `dtype`, rounded so that 127 steps neither overflow nor, where steps are subnormal, fall short."""
    scale = (peak / LEVELS).to(dtype)
    above = scale.double() * LEVELS > torch.finfo(torch.float32).max
    below = scale.double() * LEVELS < peak
    scale = torch.where(above, torch.nextafter(scale, torch.zeros_like(scale)), scale)
    tiny = scale < torch.finfo(torch.float32).tiny
    return torch.where(below & tiny, torch.nextafter(scale, torch.ones_like(scale)), scale)


def expanded(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """Block scales, broadcastable to `shape`."""
    for axis, (count, size) in enumerate(zip(scale.shape, shape, strict=True)):
        if 1 < count < size:
            scale = scale.repeat_interleave(-(-size // count), axis).narrow(axis, 0, size)
    return scale


def dequantize(qdata: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`qdata * scale`, multiplied in float32 (float64 for a float64 result) and rounded once, to `dtype`.

    A scale holds for its block; without one the step is 2⁻⁷. Beside the result at most one float32 copy is held.
    """
    if scale is None:
        return qdata.to(dtype).mul_(UNIT)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values, scale = qdata.to(wide), scale.to(wide)
    cut = [axis for axis, (count, size) in enumerate(zip(scale.shape, values.shape, strict=True)) if 1 < count < size]
    if len(cut) == 1:
        # block by block in place: to repeat the scales could take as much memory as the values
        (axis,), count = cut, scale.shape[cut[0]]
        block = -(-values.shape[axis] // count)
        whole, rest = values.split([(count - 1) * block, values.shape[axis] - (count - 1) * block], axis)
        whole.unflatten(axis, (count - 1, block)).mul_(scale.narrow(axis, 0, count - 1).unsqueeze(axis + 1))
        rest.mul_(scale.narrow(axis, count - 1, 1))
    else:
        values.mul_(expanded(scale, values.shape))
    return values.to(dtype)
