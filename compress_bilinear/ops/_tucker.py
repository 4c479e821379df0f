"""Tucker as a small dense bilinear core between linear maps."""

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
