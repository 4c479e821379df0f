"""Checks of weights and ranks, and the bytes that each rank stores: what turns a target into a rank."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import Quantize, check_rank
from ..errors import CompressionError, ConfigError
from ..quantization import FORMATS
from ._factors import MODES, peak
from ._interpolation import is_interpolated

SIGMA_BYTES = 4  # a float32 scale
INDEX_BYTES = 4  # an int32 index


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
    if not math.isfinite(peak(weight)):
        raise CompressionError("`weight` should be finite. Found NaN or infinity.")


def check_tucker_rank(rank: Sequence[int], shape: Sequence[int], where: str = "the weight") -> None:
    """Raise ConfigError unless 1 <= rank[k] <= shape[k] for the three axes."""
    if not isinstance(rank, (tuple, list)) or len(rank) != 3:
        raise ConfigError(f"`rank` should be a triple (out, in1, in2), a MaxError or a MaxSize. Found {rank!r}.")
    for axis, (value, size, mode) in enumerate(zip(rank, shape, MODES, strict=True)):
        check_rank(value, f"`rank[{axis}]`")
        if value > size:
            raise ConfigError(f"`rank[{axis}]` should be at most {size}, {mode}_features of {where}. Found {value}.")


def most_rank(shape: Sequence[int]) -> int:
    """The product bound: a tensor of these sizes has a CP of this rank without error."""
    out, in1, in2 = shape
    return min(out * in1, out * in2, in1 * in2)


def check_cp_rank(rank: object, shape: Sequence[int]) -> None:
    """Raise ConfigError unless `rank` is an int from 1 to the product bound."""
    check_rank(rank)
    if rank > most_rank(shape):  # type: ignore[operator]
        raise ConfigError(
            f"`rank` should be at most {most_rank(shape)}, the least product of two of the sizes {tuple(shape)}, at "
            f"which a CP is exact. Found {rank}."
        )


def cp_bytes(rank: int, shape: Sequence[int], itemsize: int, quantize: Quantize | None) -> int:
    """Bytes of the factors as `CPBilinear` stores them, without bias. Quantized, it has a float32 sigma (R,)."""
    if quantize is None:
        return rank * sum(shape) * itemsize
    out, in1, in2 = shape
    factors = ((out, rank), (rank, in1), (rank, in2))
    return int(sum(FORMATS[quantize].nbytes(factor, "factor") for factor in factors)) + SIGMA_BYTES * rank


def tucker_parameters(rank: Sequence[Any], shape: Sequence[int]) -> Any:
    """Numbers in core and factors as `TuckerBilinear` stores them; ranks may be broadcast tensors.

    A factor (d, r) takes r d numbers, or r (d − r) in interpolative form: none where the rank is the size.
    """
    return rank[0] * rank[1] * rank[2] + _factor_numbers(rank, shape)


def _factor_numbers(rank: Sequence[Any], shape: Sequence[int]) -> Any:
    return sum(r * (d - r * is_interpolated(r, d)) for r, d in zip(rank, shape, strict=True))


def tucker_bytes(rank: Sequence[Any], shape: Sequence[int], itemsize: int, quantize: Quantize | None) -> Any:
    """Bytes of core and factors as `TuckerBilinear` stores them, without bias; ranks may be broadcast tensors.

    An interpolative factor has an int32 index for each of its rows, and its coefficients have scales of their own. The
    scales of other factors are in the core.
    """
    index = sum((d * INDEX_BYTES) * is_interpolated(r, d) * (r != d) for r, d in zip(rank, shape, strict=True))
    if quantize is None:
        return tucker_parameters(rank, shape) * itemsize + index
    form = FORMATS[quantize]
    total = form.nbytes(rank, "weight") + index
    for mode, (r, d) in enumerate(zip(rank, shape, strict=True)):
        if mode == 0:
            whole, rest = form.nbytes((d, r), "factor"), form.nbytes((d - r, r), "rows")
        else:
            whole, rest = form.nbytes((r, d), "factor"), form.nbytes((r, d - r), "columns")
        total = total + _choose(is_interpolated(r, d), rest * (r != d), whole)
    return total


def tucker_flops(rank: Sequence[Any], shape: Sequence[int]) -> Any:
    """Floating-point operations of a forward, for each row; ranks may be broadcast tensors."""
    out, in1, in2 = rank
    # an interpolative projection of an input adds its r products to as many of the inputs
    added = sum(r * is_interpolated(r, d) * (r != d) for r, d in zip(rank[1:], shape[1:], strict=True))
    core = 2 * out * in1 * in2 + 2 * _least(_least(out * in1, out * in2), in1 * in2)
    return 2 * _factor_numbers(rank, shape) + added + core


def _least(first: Any, second: Any) -> Any:
    return torch.minimum(first, second) if isinstance(first, Tensor) else min(first, second)


def _choose(condition: Any, first: Any, second: Any) -> Any:
    return torch.where(condition, first, second) if isinstance(condition, Tensor) else first if condition else second
