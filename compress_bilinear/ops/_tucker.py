"""Tucker as a small dense bilinear between linear maps: what the fused kernels spell faster."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._dense import composed_dense, composed_dense_pairs
from ._gemm import linear


def composed_tucker(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J)
    in1: Tensor | None,  # (R_i, I); None where R_i = I and the core takes the input as it is
    in2: Tensor | None,  # (R_j, J)
    core: Tensor,  # (R_o, R_i, R_j)
    out: Tensor | None,  # (O, R_o)
    bias: Tensor | None,  # (O,)
    scales: Sequence[Tensor | None],  # of in1 (R_i, 1), in2 (R_j, 1), core (broadcastable), out (1, R_o), for int8
) -> Tensor:  # (..., O)
    """G(x1 Aᵀ, x2 Bᵀ) Uᵀ + b."""
    left, right = _project(input1, in1, scales[0]), _project(input2, in2, scales[1])
    if out is None:
        return composed_dense(left, right, core, bias, scales[2], None)
    return _widen(composed_dense(left, right, core, None, scales[2], None), out, bias, scales[3])


def composed_tucker_pairs(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J)
    in1: Tensor | None,
    in2: Tensor | None,
    core: Tensor,  # (R_o, R_i, R_j)
    out: Tensor | None,
    bias: Tensor | None,
    scales: Sequence[Tensor | None],
) -> Tensor:  # (..., L1, L2, O)
    """The same for all pairs."""
    left, right = _project(input1, in1, scales[0]), _project(input2, in2, scales[1])
    if out is None:
        return composed_dense_pairs(left, right, core, bias, scales[2])
    return _widen(composed_dense_pairs(left, right, core, None, scales[2]), out, bias, scales[3])


def _project(input: Tensor, weight: Tensor | None, scale: Tensor | None) -> Tensor:
    if weight is None:
        return input
    if scale is None:
        return linear(input, weight)
    return _scaled(linear(input, weight.to(input.dtype)), scale, input.dtype)


def _widen(inner: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    if scale is None:
        return linear(inner, weight, bias)
    return linear(_scaled(inner, scale, inner.dtype), weight.to(inner.dtype), bias)


def _scaled(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """One float32 scale for each component, applied in float32 and rounded once."""
    return (tensor * scale.flatten()).to(dtype)
