"""Stored values decoded by kernels of bitsandbytes, which is imported at the first call: that takes seconds."""

import logging
import sys
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._nf4 import BLOCK


def nf4_values(qdata: Tensor, scale: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # (stop - start,)
    """`dequantize_4bit` of flat, whole blocks, for theirs are read wrongly otherwise; see `decode_nf4`."""
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
