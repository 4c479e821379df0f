"""CP as three linear maps around a product, on any device and in any dtype: what the fused kernels spell faster."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from ._dense import block_runner, block_size, is_tracing, is_transformed
from ._gemm import LEAST_PRODUCTS, has_slow_mkl, linear, linear_times, values

# Elements of the projections' product up to which checks cost more than forming it in place saves, where torch has no
# second library to choose from.
_PLAIN_MOST = 2**18
# Elements of the products of projections that pairs hold at once on a CPU, and of the projections of several of the
# batch: in the cache, and with a gradient, for which blocks are recomputed, as many as the dense ones.
_PAIR_BLOCK = 2**20
_PAIR_BLOCK_GRAD = 2**22


def small_cp(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J)
    in1: Tensor,  # (R, I), in the inputs' dtype
    in2: Tensor,  # (R, J)
    out: Tensor,  # (O, R)
    bias: Tensor | None,  # (O,)
) -> Tensor | None:  # (..., O)
    """(x1 Aᵀ * x2 Bᵀ) Cᵀ + b in as few calls as can be; None where the call is not small or not on a CPU.

    Written out, for at one row each look at a tensor costs a hundredth of the products. None too where the inputs'
    leading dimensions differ.
    """
    if not input1.is_cpu or torch.compiler.is_compiling() or torch._C._is_tracing():
        return None
    rank, width = in1.shape
    count = input1.numel()
    if has_slow_mkl():
        if count * rank >= LEAST_PRODUCTS or count * out.numel() >= LEAST_PRODUCTS * width:
            return None
    elif count * rank >= _PLAIN_MOST * width:
        return None
    if input1.dtype != in1.dtype:
        return None
    left, right = plain_linear(input1, in1), plain_linear(input2, in2)
    return plain_linear(left * right, out, bias) if left.shape == right.shape else None


def composed_cp(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J)
    in1: Tensor,  # (R, I), floating, or int8 of step 2⁻⁷
    in2: Tensor,  # (R, J)
    out: Tensor,  # (O, R)
    bias: Tensor | None,  # (O,)
    sigma: Tensor | None,  # (R,), float32
) -> Tensor:  # (..., O)
    """(σ * (x1 Aᵀ) * (x2 Bᵀ)) Cᵀ + b."""
    return linear(_product(input1, input2, in1, in2, sigma), values(out, input1.dtype), bias)


def composed_cp_pairs(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J), the same leading dimensions
    in1: Tensor,  # (R, I)
    in2: Tensor,  # (R, J)
    out: Tensor,  # (O, R)
    bias: Tensor | None,  # (O,)
    sigma: Tensor | None,  # (R,), float32
) -> Tensor:  # (..., L1, L2, O)
    """The same for all pairs; without a gradient the projections too are held for some of the batch at once."""
    in1, in2, out = values(in1, input1.dtype), values(in2, input2.dtype), values(out, input1.dtype)
    leading, (length1, length2) = input1.shape[:-2], (input1.shape[-2], input2.shape[-2])
    batch, rank = math.prod(leading), in1.shape[0]
    if (  # asked first whether sizes are known; where all is one block, writing in place would cost a copy
        not _may_write(input1, input2, in1, in2, out, bias, sigma)
        or rank * batch * max(length1, length2, length1 * length2) <= _block(input1)
    ):
        return cp_of_pairs(linear(input1, in1), linear(input2, in2), out, bias, sigma)
    batch1, batch2 = input1.reshape(batch, *input1.shape[-2:]), input2.reshape(batch, *input2.shape[-2:])
    output = out.new_empty(batch, length1, length2, out.shape[0])
    items = max(1, _block(input1) // max(1, rank * max(length1, length2)))
    for part1, part2, target in zip(batch1.split(items), batch2.split(items), output.split(items), strict=True):
        left, right = linear(part1, in1), linear(part2, in2)
        cp_of_pairs(left, right, out, bias, sigma, output=target)
    return output.view(*leading, length1, length2, out.shape[0])


def cp_of_pairs(
    left: Tensor,  # (..., L1, R)
    right: Tensor,  # (..., L2, R), the same leading dimensions
    out: Tensor,  # (O, R), floating, or int8 of step 2⁻⁷
    bias: Tensor | None,  # (O,)
    sigma: Tensor | None,  # (R,), float32
    output: Tensor | None = None,  # (B, L1, L2, O), to write into where no gradient is wanted
) -> Tensor:  # (..., L1, L2, O)
    """All pairs of projected inputs; the product of the projections is held for some of them at once."""
    out = values(out, right.dtype)
    if sigma is not None:
        left = _wide(left) * sigma  # in float32, with the product
    blocks = pair_blocks(left, right, out.shape[0])
    run = block_runner(blocks is not None, left, right, out)
    return over_pairs(lambda p, q: run(_linear_of_product, p, q, out, bias), left, right, blocks, output)


def pair_blocks(
    left: Tensor,  # (..., L1, R)
    right: Tensor,  # (..., L2, R)
    outputs: int,  # O
) -> tuple[int, int, int] | None:
    """How many of the batch, of L1 and of L2 a block of few products and outputs has; None where one holds all."""
    if is_tracing():
        return None  # the sizes would tie the graph to these lengths
    batch, (length1, rank), length2 = math.prod(left.shape[:-2]), left.shape[-2:], right.shape[-2]
    most, width = _block(left), max(rank, outputs)
    if batch * length1 * length2 * rank <= most:
        return None
    columns = max(1, min(length2, most // width))
    rows = max(1, min(length1, most // (columns * width)))
    return max(1, most // (rows * columns * width)) if rows == length1 else 1, rows, columns


def over_pairs(
    evaluate: Callable[[Tensor, Tensor], Tensor],  # (b, k, 1, R), (b, 1, l, R) -> (b, k, l, O)
    left: Tensor,  # (..., L1, R)
    right: Tensor,  # (..., L2, R), the same leading dimensions
    blocks: tuple[int, int, int] | None,
    output: Tensor | None = None,  # (B, L1, L2, O)
) -> Tensor:  # (..., L1, L2, O)
    """All pairs by blocks of the batch, of L1 and of L2, as `pair_blocks` gives them."""
    if blocks is None:
        found = evaluate(left.unsqueeze(-2), right.unsqueeze(-3))
        return found if output is None else output.copy_(found)
    leading, lengths = left.shape[:-2], (left.shape[-2], right.shape[-2])
    batch = math.prod(leading)
    left, right = left.reshape(batch, lengths[0], 1, -1), right.reshape(batch, 1, lengths[1], -1)
    items, rows, columns = blocks
    if output is None:
        groups = []
        for first, second in zip(left.split(items), right.split(items), strict=True):
            # joined as they come, for pieces that wait for all others would be held beside what is made of them
            strips = [_joined([evaluate(p, q) for q in second.split(columns, 2)], 2) for p in first.split(rows, 1)]
            groups.append(_joined(strips, 1))
            del strips
        output = _joined(groups, 0)
    else:
        for first, second, target in zip(left.split(items), right.split(items), output.split(items), strict=True):
            for p, strip in zip(first.split(rows, 1), target.split(rows, 1), strict=True):
                for q, place in zip(second.split(columns, 2), strip.split(columns, 2), strict=True):
                    place.copy_(evaluate(p, q))
    return output.view(*leading, *lengths, output.shape[-1])


def _linear_of_product(left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    return linear((left * right).to(out.dtype), out, bias)


def _product(input1: Tensor, input2: Tensor, in1: Tensor, in2: Tensor, sigma: Tensor | None) -> Tensor:
    left = linear(input1, values(in1, input1.dtype))
    if sigma is None and in2.is_floating_point():
        return linear_times(input2, in2, left)
    right = linear(input2, values(in2, input2.dtype))
    product = _wide(left) * right
    return (product if sigma is None else product * sigma).to(input1.dtype)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _block(like: Tensor) -> int:
    return block_size(like, _PAIR_BLOCK, _PAIR_BLOCK_GRAD)


def _may_write(*tensors: Tensor | None) -> bool:
    """Whether outputs may be written in place: nothing records or transforms the call, and all tensors are plain."""
    given = [tensor for tensor in tensors if tensor is not None]
    if is_tracing() or is_transformed() or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
        return False
    if not all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in given):
        return False  # some have no more operators than a linear layer needs, or tell where outputs are to lie
    device = given[0].device.type
    return device == "meta" or not torch.is_autocast_enabled(device)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
