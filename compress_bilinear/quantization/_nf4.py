"""NF4: four bits a value, an index into 16 quantiles of a normal distribution, and a magnitude for each block.

The tensor is flattened, and two values share a byte, the first in its high bits: the layout and the code of
bitsandbytes' `quantize_4bit`, whose decoding of tensors that are not flat is wrong on some CPUs. The pure-torch code
here defines it and is exact everywhere.

Source: Dettmers et al., "QLoRA: Efficient finetuning of quantized LLMs" (2023).
"""

from functools import cache

import torch
from torch import Tensor

from ._int8 import SCALE_DTYPE

BLOCK = 64  # values that share a magnitude
_CHUNK = 2**18  # values that are encoded at once
_CELLS = 32  # of equal width, narrower than the distance of two middles of codes

# fmt: off
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def encode_nf4(
    values: Tensor,  # (...), float32, finite
    chunk: int = _CHUNK,
) -> tuple[Tensor, Tensor]:
    """Round each value to its nearest code times the largest magnitude in its block of 64, in flattened order.

    Args:
        chunk: values that are encoded at once, a multiple of 64.

    Returns:
        `qdata` uint8 (⌈n/2⌉,) and `scale` bfloat16 (⌈n/64⌉,), the largest magnitude in each block.
    """
    values = values.flatten()
    count = len(values)
    qdata = torch.empty(-(-count // 2), dtype=torch.uint8, device=values.device)
    scale = torch.empty(-(-count // BLOCK), dtype=SCALE_DTYPE, device=values.device)
    for start in range(0, count, chunk):
        part = values[start : start + chunk]
        blocks = torch.nn.functional.pad(part, [0, -len(part) % BLOCK]).view(-1, BLOCK)
        largest = blocks.abs().amax(1).clamp_max(torch.finfo(SCALE_DTYPE).max).to(SCALE_DTYPE)  # finite
        divisor = largest.float().where(largest > 0, torch.inf).unsqueeze(1)
        pairs = nearest_codes(blocks / divisor).to(torch.uint8).view(-1, 2)
        packed = (pairs[:, 0] << 4) | pairs[:, 1]
        qdata[start // 2 : start // 2 + len(packed)] = packed[: -(-len(part) // 2)]
        scale[start // BLOCK : start // BLOCK + len(largest)] = largest
    return qdata, scale


def nearest_codes(
    relative: Tensor,  # (...), float32 or float64, finite; beyond ±1 the last codes are nearest
) -> Tensor:
    """The indices of the nearest codes: those of `torch.bucketize` at the middles, some times faster.

    At most one middle lies in each of 32 equal cells, so that a comparison with it is enough.
    """
    cells = (relative * (_CELLS / 2)).add_(_CELLS / 2).clamp_(0, _CELLS - 1).long()
    below, middle = _cells(relative.device, relative.dtype)
    return below.take(cells).add_(relative > middle.take(cells))


@cache
def _cells(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For each cell the number of middles below it, and the middle inside it, or infinity."""
    with torch.inference_mode(False):
        code = torch.tensor(NF4_CODE, dtype=torch.float64, device=device)
        middles = ((code[1:] + code[:-1]) / 2).to(dtype)
        edges = torch.linspace(-1, 1, _CELLS + 1, dtype=dtype, device=device)
        below = torch.bucketize(edges, middles)
        inside = torch.cat([middles, middles.new_tensor([torch.inf])])[below[:-1]]
        return below[:-1], inside.where(below[1:] > below[:-1], torch.inf)


def decode_nf4(
    qdata: Tensor,  # (⌈n/2⌉,)
    scale: Tensor,  # (⌈n/64⌉,)
    start: int,
    stop: int,
    dtype: torch.dtype,
) -> Tensor:  # (stop - start,)
    """The values from `start` to `stop`, multiplied in float32 (float64 for a float64 result) and rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    first, last = start // BLOCK, -(-stop // BLOCK)  # whole blocks
    packed = qdata[first * BLOCK // 2 : min(last * BLOCK // 2, len(qdata))]
    if is_traced_or_transformed():  # nothing made before is to be in the graph, and not all exporters reinterpret bits
        index = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
        values = torch.tensor(NF4_CODE, dtype=wide, device=qdata.device).index_select(0, index.int())
    else:
        values = _pairs(qdata.device, wide).index_select(0, packed.int()).view(wide)
    magnitudes = scale[first:last].to(wide)
    full = len(values) // BLOCK
    values[: full * BLOCK].view(full, BLOCK).mul_(magnitudes[:full, None])
    if full < len(magnitudes):
        values[full * BLOCK :].mul_(magnitudes[full])
    return values[start - first * BLOCK : stop - first * BLOCK].to(dtype)


@cache
def _pairs(device: torch.device, wide: torch.dtype) -> Tensor:
    """For each byte its two values as the bits of one wide number: one lookup is several times faster than two."""
    with torch.inference_mode(False):
        code = torch.tensor(NF4_CODE, dtype=wide, device=device)
        both = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
        return both.view(torch.int64 if wide == torch.float32 else torch.complex128).flatten()


def is_traced_or_transformed() -> bool:
    """Whether operators are recorded or transformed: by tracing, torch.func or a dispatch mode."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined, unused-ignore]
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )
