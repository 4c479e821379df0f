"""Products with a weight in a storage format: decoded slab by slab, and once more for a backward."""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ..quantization import QuantizedTensor
from ._blocks import TRACED_PARTS, block_runner, joined, plus, tuning
from ._context import gradient_wanted, only_values, traced
from ._gemm import linear, stored_linear

Weight: TypeAlias = Tensor | QuantizedTensor
"""A weight of an operation: floating, or in a storage format."""


def reason_against_kernels(weight: Weight | None) -> str | None:
    """Why the fused kernels cannot read a weight or factor; None where they can."""
    if not isinstance(weight, QuantizedTensor):
        return None
    if not weight.format.integers or weight.scale is not None:
        return f"the fused kernels read int8 without scales, not {weight.extra_repr()}"
    return None if weight.backend == "torch" else f"the weight is decoded by {weight.backend}"


def read_by_kernels(weight: Weight) -> Tensor:
    """The tensor that the fused kernels read, where nothing is against it."""
    return weight if isinstance(weight, Tensor) else weight.qdata


def slabs(weight: Weight) -> list[slice]:
    """The rows of the first axis in slabs of at most `tuning().weight` entries, or one row; in a graph at most 16."""
    if isinstance(weight, Tensor):
        return [slice(None)]
    count = weight.shape[0]
    rows = max(1, tuning().weight // max(1, math.prod(weight.shape[1:])))
    if traced():
        rows = max(rows, -(-count // TRACED_PARTS))
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def is_one_slab(weight: QuantizedTensor) -> bool:
    """Whether it is decoded at once."""
    return weight.shape.numel() <= tuning().weight or weight.shape[0] == 1


def project(
    input: Tensor,  # (..., K)
    weight: Weight | None,  # (M, K), or (M, a, b) with a b = K
    bias: Tensor | None = None,  # (M,)
) -> Tensor:  # (..., M)
    """input weightᵀ + bias in the input's dtype; the input itself where there is no weight.

    One decoded slab of the weight is held at once. A backward keeps none, and decodes them again.
    """
    if weight is None:
        return input
    if isinstance(weight, Tensor):
        return linear(input, weight, bias)
    if is_one_slab(weight) and (traced() or not gradient_wanted(input, bias)):
        bias = bias if bias is None else bias.to(input.dtype)
        return linear(input, weight.decode(input.dtype).flatten(1), bias)

    def matrix(rows: slice, dtype: torch.dtype, *_: Tensor) -> Tensor:
        return weight.decode(dtype, rows).flatten(1)

    pieces = (stored_linear(input, partial(matrix, rows), *weight.buffers()) for rows in slabs(weight))
    return plus(joined(pieces, weight.shape[0], -1, only_values(input)), bias)


def in_slabs(
    operation: Callable[[Tensor, Tensor, Tensor], Tensor],  # of the inputs and a floating weight
    input1: Tensor,
    input2: Tensor,
    weight: QuantizedTensor,  # (O, I, J)
    bias: Tensor | None,  # (O,)
) -> Tensor:  # (..., O)
    """The operation on one decoded slab of outputs after another. Slabs are decoded again for a backward."""

    def outputs(input1: Tensor, input2: Tensor, rows: slice) -> Tensor:
        return operation(input1, input2, weight.decode(input1.dtype, rows))

    run = block_runner(True, input1, input2)
    pieces = (run(outputs, input1, input2, rows) for rows in slabs(weight))
    return plus(joined(pieces, weight.shape[0], -1, only_values(input1, input2)), bias)
