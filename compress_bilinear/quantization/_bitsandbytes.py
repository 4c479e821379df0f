"""The same formats written and read by bitsandbytes; imported only where it is asked for, which costs seconds."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CompressionError
from ._int8 import LEVELS
from ._nf4 import BLOCK


def vectorwise(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """`int8_vectorwise_quant` along `dim`: see `quantize_int8`."""
    functional = _functional()
    moved = values.movedim(dim, -1)
    rows = moved.reshape(-1, moved.shape[-1]).contiguous()
    qdata, absmax, _ = functional.int8_vectorwise_quant(rows.half() if rows.is_cuda else rows)
    scale = absmax.to(torch.float32).reshape(*moved.shape[:-1], 1) / LEVELS  # theirs is absmax, ours is a step
    return qdata.reshape(moved.shape).movedim(-1, dim).contiguous(), scale.movedim(-1, dim).contiguous()


def blockwise(values: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`quantize_blockwise` with the linear map; scales are float32 here, for the codes are relative to those."""
    functional = _functional()
    count = grid[-1]
    size = values.shape[-1] // count
    if list(grid[:-1]) != list(values.shape[:-1]) or count * size != values.shape[-1]:
        raise CompressionError(
            "bitsandbytes' blocks are equal parts of the last axis. Found a grid of "
            f"{tuple(grid)} for a tensor of shape {tuple(values.shape)}."
        )
    code = functional.create_linear_map().to(values.device)  # 127 steps either way; its 256th code is another zero
    indices, state = functional.quantize_blockwise(values.contiguous(), code=code, blocksize=size)
    qdata = (code[indices.long()] * LEVELS).round().to(torch.int8)
    return qdata.view(values.shape), (state.absmax / LEVELS).view(tuple(grid))


def nf4(values: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantize_4bit` of a flat tensor; see `quantize_nf4`."""
    functional = _functional()
    packed, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
    return packed.flatten()[: -(-len(values) // 2)], state.absmax.to(scale_dtype)


def decoded_nf4(qdata: Tensor, scale: Tensor, count: int) -> Tensor:  # (count,) float32
    """`dequantize_4bit` of a flat tensor, which is padded to whole blocks, as theirs are read wrongly otherwise."""
    functional = _functional()
    whole = -(-count // BLOCK) * BLOCK
    packed = torch.nn.functional.pad(qdata, [0, whole // 2 - len(qdata)])
    state: Any = functional.QuantState(
        absmax=scale.float(),
        shape=torch.Size([whole]),
        code=functional.get_4bit_type("nf4", device=qdata.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=torch.float32,
    )
    values: Tensor = functional.dequantize_4bit(packed.unsqueeze(1), state).flatten()
    return values[:count]


def _functional() -> Any:
    from bitsandbytes import functional

    return functional
