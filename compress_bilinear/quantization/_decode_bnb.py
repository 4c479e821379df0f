"""Stored values decoded by kernels of bitsandbytes, which is imported at the first call: that takes seconds."""

import logging
import threading
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from ._nf4 import BLOCK


def nf4_values(qdata: Tensor, scale: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # (stop - start,)
    """As `decode_nf4`; whole blocks of the flat tensor, for bitsandbytes reads others wrongly on some CPUs."""
    imported()
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


def missing() -> str | None:
    """Why bitsandbytes cannot be used at all; None where it is imported."""
    found = imported()
    if isinstance(found, ModuleNotFoundError) and found.name == "bitsandbytes":
        return f"bitsandbytes is not installed: {found}"
    return f"bitsandbytes cannot be imported: {brief(found)}" if isinstance(found, Exception) else None


def brief(error: Exception) -> str:
    """An error's first line: torch's dispatcher adds pages to it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


_IMPORTING = threading.Lock()


@cache  # after a failure too: another import would take as long, and hide the cause
def imported() -> ModuleType | Exception:
    """The functions of bitsandbytes, or what their import failed with."""
    logger = logging.getLogger("bitsandbytes")
    with _IMPORTING:
        level = logger.level
        logger.setLevel(logging.ERROR)  # or it would warn of a package that nothing here needs
        try:
            from bitsandbytes import functional
        except Exception as error:  # whatever its libraries raise where they do not fit the machine
            return error
        finally:
            logger.setLevel(level)
    return functional
