"""Tucker as a small dense bilinear core between linear maps. The fused kernels compute the same."""

import torch
from torch import Tensor

from ._dense import composed_dense, small_dense
from ._dense_pairs import composed_dense_pairs
from ._stored import Weight, project


def composed_tucker(
    input1: Tensor, input2: Tensor, in1: Weight | None, in2: Weight | None, core: Weight, out: Weight | None,
    bias: Tensor | None, scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """G(x1 Aᵀ, x2 Bᵀ) Uᵀ + b; shapes as of `bilinear_tucker`."""
    left, right = project(input1, in1), project(input2, in2)
    last = bias if out is None else None
    inner = small_dense(left, right, core, last) if scale is None and isinstance(core, Tensor) else None
    if inner is None:
        inner = composed_dense(left, right, core, last, scale, None)
    return inner if out is None else project(inner, out, bias)


def composed_tucker_pairs(
    input1: Tensor, input2: Tensor, in1: Weight | None, in2: Weight | None, core: Weight, out: Weight | None,
    bias: Tensor | None, scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same for all pairs; shapes as of `pairwise_tucker`."""
    left, right = project(input1, in1), project(input2, in2)
    if out is None:
        return composed_dense_pairs(left, right, core, bias, scale)
    return project(composed_dense_pairs(left, right, core, None, scale), out, bias)


def tucker_of_pairs(
    t: Tensor,  # (B, L1, R_o, R_j)
    right: Tensor,  # (B, L2, R_j)
    out: Tensor,  # (O, R_o), floating or int8
    bias: Tensor | None,  # (O,)
) -> Tensor:  # (B, L1, L2, O)
    """All pairs of a first input multiplied by its projection and the core, and a second one that is projected."""
    inner = torch.bmm(t.flatten(1, 2), right.mT).unflatten(1, t.shape[1:3]).transpose(2, 3)
    return project(inner, out, bias)
