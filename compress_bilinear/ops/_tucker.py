"""Tucker as a small dense bilinear between linear maps: what the fused kernels spell faster."""

import torch
from torch import Tensor

from ._dense import check_inputs, composed_dense, composed_dense_pairs
from ._gemm import linear, values
from ._small import small_dense


def composed_tucker(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J)
    in1: Tensor | None,  # (R_i, I); None where R_i = I and the core takes the input as it is
    in2: Tensor | None,  # (R_j, J)
    core: Tensor,  # (R_o, R_i, R_j)
    out: Tensor | None,  # (O, R_o)
    bias: Tensor | None,  # (O,)
    scale: Tensor | None,  # of an int8 core; int8 factors have the step 2⁻⁷
) -> Tensor:  # (..., O)
    """G(x1 Aᵀ, x2 Bᵀ) Uᵀ + b. Raises InputError where the leading dimensions differ."""
    left, right = project(input1, in1), project(input2, in2)
    last = bias if out is None else None
    inner = small_dense(left, right, core, last) if scale is None else None
    if inner is None:
        check_inputs(left, right)
        inner = composed_dense(left, right, core, last, scale, None)
    return inner if out is None else linear(inner, values(out, input1.dtype), bias)


def composed_tucker_pairs(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J)
    in1: Tensor | None,
    in2: Tensor | None,
    core: Tensor,  # (R_o, R_i, R_j)
    out: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Tensor:  # (..., L1, L2, O)
    """The same for all pairs."""
    left, right = project(input1, in1), project(input2, in2)
    if out is None:
        return composed_dense_pairs(left, right, core, bias, scale)
    return linear(composed_dense_pairs(left, right, core, None, scale), values(out, input1.dtype), bias)


def tucker_of_pairs(
    t: Tensor,  # (B, L1, R_o, R_j)
    right: Tensor,  # (B, L2, R_j)
    out: Tensor,  # (O, R_o), floating or int8
    bias: Tensor | None,  # (O,)
) -> Tensor:  # (B, L1, L2, O)
    """All pairs of an input that has been through its projection and the core, and one that has been projected."""
    inner = torch.bmm(t.flatten(1, 2), right.mT).unflatten(1, t.shape[1:3]).transpose(2, 3)
    return linear(inner, values(out, right.dtype), bias)


def project(input: Tensor, weight: Tensor | None) -> Tensor:
    """input weightᵀ; the input itself where there is no weight."""
    return input if weight is None else linear(input, values(weight, input.dtype))
