"""The same formats written and read by bitsandbytes; imported only where it is asked for, which costs seconds."""

import logging
import sys
import threading
from collections.abc import Sequence
from functools import cache
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


def nf4_values(qdata: Tensor, scale: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # (stop - start,)
    """`dequantize_4bit` of flat, whole blocks, for theirs are read wrongly otherwise; see `dequantize_nf4`."""
    _functional()
    first, last = start // BLOCK, -(-stop // BLOCK)
    if first == last:
        return torch.empty(0, dtype=dtype, device=qdata.device)
    packed = qdata[first * BLOCK // 2 : last * BLOCK // 2]
    whole = (last - first) * BLOCK
    if len(packed) < whole // 2:
        packed = torch.nn.functional.pad(packed, [0, whole // 2 - len(packed)])
    decode = torch.ops.bitsandbytes.dequantize_4bit.default
    values: Tensor = decode(packed, scale[first:last].float(), BLOCK, "nf4", [whole], dtype)
    return values.flatten()[start - first * BLOCK : stop - first * BLOCK]


def int8_values(qdata: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """`dequantize_blockwise` of integers with a scale for each `block` of them; see `dequantize`."""
    _functional()
    decode = torch.ops.bitsandbytes.dequantize_blockwise.default
    indices = qdata.contiguous().view(torch.uint8)
    values: Tensor = decode(indices, scale.flatten().float(), _signed(qdata.device), block, dtype)
    return values


@cache
def _signed(device: torch.device) -> Tensor:
    """What the bits of an unsigned byte are as int8: the linear map of codes, in steps and in our integers' order."""
    with torch.inference_mode(False):
        return torch.arange(-128, 128, device=device, dtype=torch.float32).roll(128)


def missing() -> str | None:
    """Why bitsandbytes cannot be used at all; None where it is imported."""
    try:
        _functional()
    except Exception as error:  # whatever its libraries raise where they do not fit the machine
        if _not_installed(error):
            return f"bitsandbytes is not installed: {error}"
        return f"bitsandbytes cannot be imported: {brief(error)}"
    return None


def brief(error: Exception) -> str:
    """What it says, in one line: torch's dispatcher adds pages to that."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _not_installed(error: Exception) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"


_IMPORTING = threading.Lock()
_BROKEN: list[Exception] = []  # what an import failed with: another one would take as long, and hide the cause


def _functional() -> Any:
    with _IMPORTING:
        if _BROKEN:
            raise _BROKEN[0].with_traceback(None)
        if "bitsandbytes" in sys.modules:  # perhaps half of it, which only an import statement waits for
            from bitsandbytes import functional

            return functional
        logger = logging.getLogger("bitsandbytes")
        level = logger.level
        logger.setLevel(logging.ERROR)  # or it would warn of a package that nothing here needs
        try:
            from bitsandbytes import functional
        except Exception as error:
            if not _not_installed(error):
                _BROKEN.append(error)
            raise
        finally:
            logger.setLevel(level)
        return functional
