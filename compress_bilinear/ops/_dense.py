"""The exact dense bilinear, evaluated in the cheapest order and in bounded memory.

y_no = Σ_ij x1_ni W_oij x2_nj can be summed in three orders of 2·N·O·I·J FLOPs. They differ in the intermediate T:

- "in1_first": T = x1 W_o (N x O x J), then Σ_j T · x2. Its product needs a transposed copy of each slice of the weight;
- "in2_first": T = W_o x2 (N x O x I), then Σ_i T · x1;
- "outer": T = x1 ⊗ x2 (N x I x J), then one matrix product with W.

So the largest dimension is eliminated first. With Intel's MKL and without a gradient, a batched product reads slices of
the weight in their stored layout: up to some thousand rows that is the fastest. T is never held whole: outputs and rows
are taken in blocks whose T stays in the cache, which on a CPU is also the fastest (`benchmarks/run.py` measures it).
Where a gradient is wanted, each block is recomputed in the backward (Chen et al., "Training deep nets with sublinear
memory cost", 2016); T would otherwise be kept whole for it. Of pairs, one input is
projected, then multiplied by the other.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from ..quantization import QuantizedTensor
from ._blocks import TRACED_ROW, block_runner, block_size, joined, plus, tuning, weight_parts
from ._context import only_values, traced
from ._gemm import stored_linear, uses_fast_mkl
from ._stored import Weight, in_slabs, is_one_slab

Order: TypeAlias = Literal["in1_first", "in2_first", "outer"]

ORDERS: tuple[Order, ...] = ("in1_first", "in2_first", "outer")

_LEAST_OUT = 4  # outputs from which "outer" pays: its product is long and narrow
_OUTER_MOST = 2**14  # I·J above which blocks of "outer" have too few rows for an efficient product
_OUTER_RATIO = 1.3  # O relative to the inputs' sizes from which "outer" is the best order for any number of rows
_FEW_OUTER = 2**18  # elements of x1 ⊗ x2 up to which "outer" saves more overhead than it costs, if there are at most
_ONE_BLOCK_RATIO = 0.75  # the same for rows of which x1 ⊗ x2 is one block: up to 1.45 times as fast
_FEW_PRODUCTS = 2**21  # so many multiply-adds,
_FEW_ROWS = 8  # or so few rows
_ROW_OUTER = 2**22  # elements of x1 ⊗ x2 for a single row, which only reads the weight
_BLOCK_WIDTH = 2**11  # columns of a block of T from which a product is efficient; the rest of a block is rows
_COPY_COST = 2  # of copying an element of the weight, relative to writing and summing an element of T
_FEW_STORED_LAYOUT = 2**19  # elements of T up to which a product by the stored layout is a small one
_STORED_LAYOUT_ROWS = 2**11  # rows up to which the stored layout is the fastest with MKL


def best_order(shape: tuple[int, int, int], rows: int | None = None, dtype: torch.dtype | None = None) -> Order:
    """The order for a weight (O, I, J): eliminate the largest dimension first, where a transposed copy pays.

    For few rows it does not: "in2_first" saves O·I·J copies, and costs N·O·(I − J) elements of T. "outer" has the least
    overhead, which decides for small products. In float16 it is never chosen: products of inputs overflow above 256.
    """
    out, in1, in2 = shape
    pairs = in1 * in2
    if out >= _OUTER_RATIO * max(in1, in2) and pairs <= _OUTER_MOST and dtype != torch.float16:
        return "outer"
    if rows is not None and (_is_small(shape, rows, dtype) or _is_one_block(shape, rows, dtype)):
        return "outer"
    if rows is None:
        return "in1_first" if in1 > in2 else "in2_first"
    return "in1_first" if rows * (in1 - in2) > _COPY_COST * pairs else "in2_first"


def _is_small(shape: tuple[int, int, int], rows: int, dtype: torch.dtype | None) -> bool:
    """Whether "outer", which has the fewest operators, is the fastest because the product is small."""
    out, pairs = shape[0], rows * shape[1] * shape[2]
    few = 0 < pairs <= _FEW_OUTER and (rows <= _FEW_ROWS or pairs * out <= _FEW_PRODUCTS)
    return few and out >= _LEAST_OUT and dtype != torch.float16


def _is_one_block(shape: tuple[int, int, int], rows: int, dtype: torch.dtype | None) -> bool:
    """Whether "outer" is the fastest because x1 ⊗ x2 is one block, and not much wider than the other intermediates."""
    out, in1, in2 = shape
    few = _FEW_OUTER <= rows * in1 * in2 <= tuning().outer
    return few and out >= _ONE_BLOCK_RATIO * max(in1, in2) and dtype != torch.float16


def dense_flops(shape: tuple[int, int, int]) -> int:
    """FLOPs for a row, multiply-add counted as 2, in the best order."""
    out, in1, in2 = shape
    return 2 * out * in1 * in2 + 2 * min(out * in1, out * in2, in1 * in2)


def small_dense(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The output (N, O) of a small product on a CPU, in the fewest operators; None for anything else.

    It is tried before all checks, which would take a tenth to a third of the time of a layer such as 32 x 32 -> 16.
    """
    shape1 = input1.shape
    if not input1.is_cpu or traced() or len(shape1) != 2:
        return None
    (out, in1, in2), dtype, rows = weight.shape, weight.dtype, shape1[0]
    if shape1[1] != in1 or input2.shape != (rows, in2) or not input1.dtype == input2.dtype == dtype:
        return None
    if torch.is_autocast_enabled("cpu") or (bias is not None and bias.dtype != dtype):
        return None
    if rows == 1:
        if out >= _LEAST_OUT and in1 * in2 <= _ROW_OUTER and dtype != torch.float16 and weight.is_contiguous():
            return torch_linear((input1.t() * input2).reshape(1, -1), weight.flatten(1), bias)
        return torch_linear(input1, torch_linear(input2, weight.flatten(0, 1)).view(out, in1), bias)
    small = 0 < out * rows * min(in1, in2) <= _FEW_STORED_LAYOUT
    if small and uses_fast_mkl(input1, input2, weight) and only_values(input1, input2, weight, bias):
        wide_last = (input2, input1, weight.mT) if in1 >= in2 else (input1, input2, weight)
        output = _stored_block(*wide_last).contiguous()
        return output if bias is None else output.add_(bias)
    if _is_small((out, in1, in2), rows, dtype):
        return torch_linear((input1.unsqueeze(2) * input2.unsqueeze(1)).flatten(1), weight.flatten(1), bias)
    return None


def composed_dense(
    input1: Tensor,
    input2: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    order: Order | None = None,
) -> Tensor:
    """y_o = x1ᵀ W_o x2 + b_o by matrix products of torch; shapes as of `bilinear_dense`.

    Besides inputs and output it holds a few blocks of T (two megabytes each on a CPU without gradients). A weight that
    is not in floating point is decoded slab by slab into the inputs' dtype, and once more for a backward. The output
    has the inputs' dtype, whatever the bias has.
    """
    if isinstance(weight, QuantizedTensor):
        if is_one_slab(weight) and only_values(input1, input2, bias):
            return composed_dense(input1, input2, weight.decode(input1.dtype), bias, order)
        return in_slabs(partial(composed_dense, order=order), input1, input2, weight, bias)
    small = small_dense(input1, input2, weight, bias) if order is None else None
    if small is not None:
        return small
    out, in1, in2 = weight.shape
    leading = input1.shape[:-1]
    rows = math.prod(leading)
    rows1, rows2 = input1, input2
    if len(leading) != 1:
        rows1, rows2 = input1.reshape(rows, in1), input2.reshape(rows, in2)
    if order is None and _stored_layout_is_fastest(rows1, rows2, weight):
        output = contract(rows2, rows1, weight.mT, block=_stored_block).contiguous()
    else:
        order = order or best_order((out, in1, in2), None if traced() else rows, input1.dtype)
        if order == "outer" and not (traced() and in1 * in2 > TRACED_ROW):
            output = _by_outer(rows1, rows2, weight)
        elif order == "in1_first" or (order == "outer" and in1 > in2):
            output = contract(rows2, rows1, weight.mT)
        else:
            output = contract(rows1, rows2, weight)
    output = plus(output, bias)
    return output if len(leading) == 1 else output.view(*leading, out)


def _contract_block(kept: Tensor, first: Tensor, part: Tensor) -> Tensor:
    """(n, a), (n, b), (o, a, b) -> (n, o)."""
    outputs, width, _ = part.shape
    product = stored_linear(first, lambda _, stored: stored.flatten(0, 1), part).view(-1, outputs, width)
    kept = kept.unsqueeze(1)
    return (product.mul_(kept) if only_values(product, kept) else product * kept).sum(-1)


def _stored_block(kept: Tensor, first: Tensor, part: Tensor) -> Tensor:
    """The same as `_contract_block` by batched products with slices of part.mT, of which nothing is copied."""
    # `matmul` would copy a weight that requires a gradient
    return torch.bmm(first.expand(len(part), -1, -1), part.mT).mul_(kept).sum(-1).t()


def contract(
    kept: Tensor,  # (N, a)
    first: Tensor,  # (N, b)
    weight: Tensor,  # (O, a, b)
    *scales: Tensor,  # of the weight, (O, ...)
    block: Callable[..., Tensor] = _contract_block,
) -> Tensor:  # (N, O)
    """Σ_ab kept_na W_oab first_nb, eliminating b first. `block` sums some rows and outputs, with their scales."""
    (out, width, _), stored = weight.shape, (weight, *scales)
    if traced():  # a graph holds for any number of rows: only outputs are split, by sizes of the weight
        groups = zip(*(weight_parts(value, TRACED_ROW // width) for value in stored), strict=True)
        return torch.cat([block(kept, first, *group) for group in groups], dim=1)
    count, limit = max(1, kept.shape[0]), block_size(kept, tuning().block, tuning().block_grad)
    columns = max(limit // (count * width), min(_BLOCK_WIDTH, limit) // width, 1)
    rows = max(1, min(count, limit // (width * min(out, columns))))
    if columns >= out and rows == count:
        return block(kept, first, *stored)
    parts = zip(*(weight_parts(value, columns) for value in stored), strict=True)
    blocks, values = [*zip(kept.split(rows), first.split(rows), strict=True)], only_values(kept, first, weight)
    run = block_runner(True, kept, first, weight)

    def of_all_rows(part: Tensor, *scales: Tensor) -> Tensor:
        part = part.contiguous() if values and len(blocks) > 1 and block is not _stored_block else part  # once for all
        return joined((run(block, *rows, part, *scales) for rows in blocks), kept.shape[0], 0, values)

    return joined((of_all_rows(*part) for part in parts), out, 1, values)


def _stored_layout_is_fastest(rows1: Tensor, rows2: Tensor, weight: Tensor) -> bool:
    (_, in1, in2), rows = weight.shape, 0 if traced() else rows1.shape[0]
    if not (0 < in2 <= in1 and 0 < rows <= _STORED_LAYOUT_ROWS):
        return False
    return uses_fast_mkl(rows1, rows2, weight) and only_values(rows1, rows2, weight)


def _by_outer(rows1: Tensor, rows2: Tensor, weight: Tensor) -> Tensor:
    """Σ_ij (x1_n ⊗ x2_n)_ij W_oij: (N, O)."""
    _, in1, in2 = weight.shape
    if traced():
        return _outer_block(rows1, rows2, weight)
    rows = max(1, block_size(rows1, tuning().outer, tuning().outer) // (in1 * in2))
    blocks = [*zip(rows1.split(rows), rows2.split(rows), strict=True)]
    run = block_runner(len(blocks) > 1, rows1, rows2, weight)
    values = only_values(rows1, rows2, weight)
    return joined((run(_outer_block, *block, weight) for block in blocks), rows1.shape[0], 0, values)


def _outer_block(rows1: Tensor, rows2: Tensor, weight: Tensor) -> Tensor:
    """(n, i), (n, j), (O, i, j) -> (n, O)."""
    product = (rows1.unsqueeze(2) * rows2.unsqueeze(1)).flatten(1)
    return stored_linear(product, lambda _, stored: stored.flatten(1), weight)


def composed_dense_pairs(input1: Tensor, input2: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """y_klo = x1_kᵀ W_o x2_l + b_o for all pairs of k and l; shapes as of `pairwise_dense`."""
    if isinstance(weight, QuantizedTensor):
        return in_slabs(composed_dense_pairs, input1, input2, weight, bias)
    leading, (length1, in1), (length2, in2) = input1.shape[:-2], input1.shape[-2:], input2.shape[-2:]
    batch, out = math.prod(leading), weight.shape[0]
    first, second = input1.reshape(batch, length1, in1), input2.reshape(batch, length2, in2)
    # FLOPs for an output: I·J for each row that is projected first, and the other input's size for each pair
    swap = in2 > in1 if traced() else length2 * in1 * (in2 + length1) < length1 * in2 * (in1 + length2)
    if swap:
        first, second, weight = second, first, weight.mT
    if traced():
        outputs = TRACED_ROW // weight.shape[2]
    else:  # neither the projection nor the pairs exceed a block, unless one output does
        elements = first.shape[0] * first.shape[1] * max(weight.shape[2], second.shape[1])
        outputs = block_size(first, tuning().pairs, tuning().block_grad) // max(1, elements)
    parts = weight_parts(weight, outputs)
    run = block_runner(len(parts) > 1, first, second, weight)
    pieces = (run(_part_of_pairs, first, second, part) for part in parts)
    turned = (piece if swap else piece.transpose(1, 2) for piece in pieces)
    output = plus(joined(turned, out, 3, only_values(first, second, weight)), bias)
    return output.contiguous().view(*leading, length1, length2, out)


def _part_of_pairs(first: Tensor, second: Tensor, part: Tensor) -> Tensor:
    """(B, k, a), (B, l, b), (o, a, b) -> (B, l, k, o)."""
    batch, length, _ = first.shape
    outputs, _, width = part.shape
    projected = stored_linear(first, lambda _, stored: stored.mT.flatten(0, 1), part)
    output = torch.bmm(second, projected.view(batch, length * outputs, width).mT)
    return output.unflatten(2, (length, outputs))
