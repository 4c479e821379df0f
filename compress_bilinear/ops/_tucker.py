"""Tucker as a small dense bilinear core between linear maps."""

from torch import Tensor

from ._dense import composed_dense
from ._dense_pairs import composed_dense_pairs
from ._stored import Weight, project


def composed_tucker(
    input1: Tensor, input2: Tensor, in1: Weight | None, in2: Weight | None, core: Weight, out: Weight | None,
    bias: Tensor | None, scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """G(x1 Aᵀ, x2 Bᵀ) Uᵀ + b; shapes as of `bilinear_tucker`."""
    left, right = project(input1, in1), project(input2, in2)
    if out is None:
        return composed_dense(left, right, core, bias, scale)
    return project(composed_dense(left, right, core, None, scale), out, bias)


def composed_tucker_pairs(
    input1: Tensor, input2: Tensor, in1: Weight | None, in2: Weight | None, core: Weight, out: Weight | None,
    bias: Tensor | None, scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same for all pairs; shapes as of `pairwise_tucker`."""
    left, right = project(input1, in1), project(input2, in2)
    if out is None:
        return composed_dense_pairs(left, right, core, bias, scale)
    return project(composed_dense_pairs(left, right, core, None, scale), out, bias)
