"""CP as three linear maps around a product, on any device and in any dtype."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from ._blocks import block_runner, block_size, joined, tuning
from ._context import only_values, plain, traced
from ._stored import Weight, project


def small_cp(
    input1: Tensor, input2: Tensor, in1: Tensor, in2: Weight, out: Weight, bias: Tensor | None
) -> Tensor | None:
    """(x1 Aᵀ * x2 Bᵀ) Cᵀ + b on a CPU where all products are small; None for anything else.

    It is tried before all checks, which would take a tenth to a half of the time of a layer such as 32 x 32 -> 16.
    """
    if not input1.is_cpu or traced() or input1.dtype != in1.dtype:
        return None
    if not isinstance(in2, Tensor) or not isinstance(out, Tensor):
        return None
    (rank, width), limit, count = in1.shape, tuning().onednn_products, input1.numel()
    if count * rank > limit or input2.numel() * rank > limit or count * out.numel() > limit * width:
        return None
    left, right = torch_linear(input1, in1), torch_linear(input2, in2)
    return torch_linear(left * right, out, bias) if left.shape == right.shape else None


def composed_cp(
    input1: Tensor, input2: Tensor, in1: Weight, in2: Weight, out: Weight, bias: Tensor | None, sigma: Tensor | None
) -> Tensor:
    """(σ * (x1 Aᵀ) * (x2 Bᵀ)) Cᵀ + b; shapes as of `bilinear_cp`."""
    left, right = project(input1, in1), project(input2, in2)
    if sigma is not None or not isinstance(in2, Tensor):
        left = _wide(left)  # a product of int8 factors could overflow in float16
    # in place if only values are wanted: fresh memory for the product made a CP on 6,000 rows 1.5 times as slow
    product = left.mul_(right) if only_values(left, right) and plain(left, right) else left * right
    if sigma is not None:
        product = product.mul_(sigma) if only_values(product, sigma) else product * sigma
    return project(product.to(input1.dtype), out, bias)


def composed_cp_pairs(
    input1: Tensor, input2: Tensor, in1: Weight, in2: Weight, out: Weight, bias: Tensor | None, sigma: Tensor | None
) -> Tensor:
    """The same for all pairs; shapes as of `pairwise_cp`."""
    left, right = project(input1, in1), project(input2, in2)
    if sigma is not None:
        left = _wide(left) * sigma  # in float32, and so is the product

    def evaluate(p: Tensor, q: Tensor) -> Tensor:
        return project((p * q).to(right.dtype), out, bias)

    return over_pairs(evaluate, left, right, out.shape[0], [out] if isinstance(out, Tensor) else [])


def over_pairs(
    evaluate: Callable[[Tensor, Tensor], Tensor],  # (b, k, 1, R), (b, 1, l, R) -> (b, k, l, O)
    left: Tensor,  # (..., L1, R)
    right: Tensor,  # (..., L2, R), the same leading dimensions
    outputs: int,  # O
    recomputed: Sequence[Tensor] | None = None,
) -> Tensor:  # (..., L1, L2, O)
    """`evaluate` for all pairs, in blocks of some items of the batch, rows of L1 and rows of L2.

    Args:
        recomputed: what `evaluate` reads besides, if a backward may call it again instead of keeping a block; or None.
    """
    leading, (length1, rank), length2 = left.shape[:-2], left.shape[-2:], right.shape[-2]
    most, width = block_size(left, tuning().cp, tuning().cp_grad), max(rank, outputs)
    # a graph first: sizes would tie it to these lengths
    if traced() or math.prod(leading) * length1 * length2 * rank <= most:
        return evaluate(left.unsqueeze(-2), right.unsqueeze(-3))
    columns = max(1, min(length2, most // width))
    rows = max(1, min(length1, most // (columns * width)))
    items = max(1, most // (rows * columns * width)) if rows == length1 else 1
    run = block_runner(recomputed is not None, left, right, *(recomputed or ()))
    batch, values = math.prod(leading), only_values(left, right)
    firsts = left.reshape(batch, length1, 1, rank).split(items)
    seconds = right.reshape(batch, 1, length2, rank).split(items)
    strips = (
        joined((run(evaluate, p, q) for q in second.split(columns, 2)), length2, 2, values).flatten(0, 1)
        for first, second in zip(firsts, seconds, strict=True)
        for p in first.split(rows, 1)
    )
    return joined(strips, batch * length1, 0, values).view(*leading, length1, length2, outputs)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
