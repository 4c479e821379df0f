"""Checks of weights and ranks, and the bytes that each rank stores: what turns a target into a rank."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import Quantize, check_rank
from ..errors import CompressionError, ConfigError
from ._types import MODES

SCALE_BYTES = 4  # a float32 scale


def check_weight(weight: Tensor) -> None:
    """Raise CompressionError unless `weight` is a finite, non-empty, dense floating tensor (O, I, J)."""
    if not isinstance(weight, Tensor) or weight.dim() != 3 or weight.numel() == 0:
        found = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise CompressionError(f"`weight` should be a non-empty tensor of shape (O, I, J). Found {found}.")
    if not weight.is_floating_point() or weight.layout != torch.strided or weight.is_meta:
        raise CompressionError(
            "`weight` should be a dense floating tensor with values. "
            f"Found {weight.dtype}, {weight.layout}, device {weight.device}."
        )
    if not bool(torch.isfinite(weight).all()):
        raise CompressionError("`weight` should be finite. Found NaN or infinity.")


def check_tucker_rank(rank: Sequence[int], shape: Sequence[int], where: str = "the weight") -> None:
    """Raise ConfigError unless 1 <= rank[k] <= shape[k] for the three axes."""
    if not isinstance(rank, (tuple, list)) or len(rank) != 3:
        raise ConfigError(f"`rank` should be a triple (out, in1, in2), a MaxError or a MaxSize. Found {rank!r}.")
    for axis, (value, size, mode) in enumerate(zip(rank, shape, MODES, strict=True)):
        check_rank(value, f"`rank[{axis}]`")
        if value > size:
            raise ConfigError(f"`rank[{axis}]` should be at most {size}, {mode}_features of {where}. Found {value}.")


def cp_bytes(rank: int, shape: Sequence[int], itemsize: int, quantize: Quantize | None) -> int:
    """Bytes of the factors as `CPBilinear` stores them, without bias. int8 has a scale for each column."""
    if quantize is None:
        return rank * sum(shape) * itemsize
    return rank * (sum(shape) + 3 * SCALE_BYTES)


def tucker_bytes(rank: Sequence[Any], shape: Sequence[int], itemsize: int, quantize: Quantize | None) -> Any:
    """Bytes of core and factors as `TuckerBilinear` stores them, without bias; ranks may be broadcast tensors.

    int8 has a scale for each factor's column and for each fibre of the core along its longer input axis.
    """
    values = rank[0] * rank[1] * rank[2] + sum(r * d for r, d in zip(rank, shape, strict=True))
    if quantize is None:
        return values * itemsize
    shorter = torch.minimum(rank[1], rank[2]) if isinstance(rank[1], Tensor) else min(rank[1], rank[2])
    return values + SCALE_BYTES * (rank[0] + rank[1] + rank[2] + rank[0] * shorter)
