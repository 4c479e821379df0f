"""Autocast, asked for and switched off."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on; the meta device does not know it."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast_dtype(device_type: str, *tensors: Tensor) -> torch.dtype | None:
    """The dtype that autocast, where it is on, would run a product of these tensors in; it leaves float64 alone."""
    if not autocast_enabled(device_type) or any(tensor.dtype == torch.float64 for tensor in tensors):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off, for operands that have their dtype already; free where it is off anyway."""
    if autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
