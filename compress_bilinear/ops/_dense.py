"""The exact dense bilinear, evaluated in the best order and in bounded memory.

y_no = Σ_ij x1_ni W_oij x2_nj can be summed in three orders, each of 2·N·O·I·J FLOPs; they differ in what lies between:

- "in1_first": T = x1 W_o (N x O x J), then T · x2; its product wants the weight's slices turned, a copy of each;
- "in2_first": T = W_o x2 (N x O x I), then T · x1;
- "outer": T = x1 ⊗ x2 (N x I x J), then one matrix product with W.

So the largest dimension is eliminated first. Where MKL multiplies and no gradient is wanted, "in1_first" takes the
slices as they lie, and up to some thousand rows that is the fastest. T is never whole: outputs and rows are taken in
blocks whose T stays in the cache, which on a CPU is also the fastest (`benchmarks/run.py` measures it). Where a
gradient is wanted, each block is recomputed in the backward (Chen et al., "Training deep nets with sublinear memory
cost", 2016), for T would otherwise be kept whole for it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..quantization import dequantize
from ._gemm import is_mkls, linear, prefers_onednn, stored_linear
from ._small import lying_products

Order: TypeAlias = Literal["in1_first", "in2_first", "outer"]

ORDERS: tuple[Order, ...] = ("in1_first", "in2_first", "outer")

# Elements of T in a block. On a CPU about two megabytes are fastest where T is summed, and more where it is a factor
# of the next product, as for pairs; a GPU wants fewer, larger launches. A block that is recomputed in the backward has
# an overhead of its own, so it is larger.
_CPU_BLOCK = 2**19
_CPU_BLOCK_GRAD = 2**22
_CPU_BLOCK_PAIRS = 2**21
_GPU_BLOCK = 2**24
_OUTER_BLOCK = 2**20
_OUTER_MOST = 2**14  # I·J above which "outer" blocks have too few rows for an efficient product
_OUTER_RATIO = 2  # of O to the inputs' sizes, from which "outer" wins: its product is long and narrow
_BLOCK_WIDTH = 2**11  # columns of a block of T from which a product is efficient; the rest of a block is rows
_TURN = 2  # what copying an element of the weight costs, in elements of T that are written and summed
_LYING_ROWS = 2**11  # rows up to which products with the slices as they lie are fastest where MKL multiplies
_LYING_OUT = 4  # and for any number of rows with fewer outputs
_LOOP_BLOCK = 2**17  # elements of T for one output from which torch's own loop over few outputs is the fastest
_LOOP_MOST = 2**22  # which it holds whole, and elements of the weight, which it copies
_WEIGHT_BLOCK = 2**20  # elements of the weight that are de-quantized at once (or one output's slice)
_TRACED_ROW = 4096  # elements of T for a row in a traced graph, where the number of rows is not known
_TRACED_PARTS = 16


def best_order(shape: tuple[int, int, int], rows: int | None = None, dtype: torch.dtype | None = None) -> Order:
    """The order for a weight (O, I, J): eliminate the largest dimension first, if turning the weight pays.

    Few rows leave the weight as it lies: "in2_first" saves O·I·J copies and costs N·O·(I − J) elements of T. In float16
    never "outer": inputs above 256 have products that overflow.
    """
    out, in1, in2 = shape
    if out >= _OUTER_RATIO * max(in1, in2) and in1 * in2 <= _OUTER_MOST and dtype != torch.float16:
        return "outer"
    if rows is None:
        return "in1_first" if in1 > in2 else "in2_first"
    return "in1_first" if rows * (in1 - in2) > _TURN * in1 * in2 else "in2_first"


def dense_flops(shape: tuple[int, int, int]) -> int:
    """FLOPs for a row, multiply-add counted as 2, in the best order."""
    out, in1, in2 = shape
    return 2 * out * in1 * in2 + 2 * min(out * in1, out * in2, in1 * in2)


def check_inputs(input1: Tensor, input2: Tensor, pairs: bool = False) -> None:
    """Raise InputError where the leading dimensions differ."""
    last = 2 if pairs else 1
    if min(input1.dim(), input2.dim()) < last or input1.shape[:-last] != input2.shape[:-last]:
        raise InputError(
            "The inputs should have the same leading dimensions. "
            f"Found {tuple(input1.shape)} and {tuple(input2.shape)}."
        )


def composed_dense(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J), the same leading dimensions
    weight: Tensor,  # (O, I, J); int8 with `scale`
    bias: Tensor | None,  # (O,)
    scale: Tensor | None,  # float32, broadcastable to `weight`
    order: Order | None,
) -> Tensor:  # (..., O)
    """y_o = x1ᵀ W_o x2 + b_o by matrix products of torch.

    Peak extra memory is a few blocks of T (two megabytes each on a CPU without gradients) beside inputs and output; an
    int8 weight is de-quantized block by block into the inputs' dtype, and for a backward once more. The output has the
    inputs' dtype whatever the bias has.
    """
    out, in1, in2 = weight.shape
    leading = input1.shape[:-1]
    rows = math.prod(leading)
    rows1, rows2 = input1.reshape(rows, in1), input2.reshape(rows, in2)
    tracing = is_tracing()
    asked, order = order, order or best_order((out, in1, in2), None if tracing else rows, input1.dtype)
    if asked is None and order != "outer" and not tracing and _lies_well(rows1, rows2, weight, scale):
        output = _lying(rows1, rows2, weight, scale)
    elif tracing:
        output = _traced(rows1, rows2, weight, scale, order)
    elif order == "outer":
        output = _outer(rows1, rows2, weight, scale)
    else:
        if order == "in1_first":
            rows1, rows2, weight, scale = rows2, rows1, weight.mT, None if scale is None else scale.mT
        output = _contract(rows1, rows2, weight, scale)
    if bias is not None:
        bias = bias.to(output.dtype)
        wanted = torch.is_grad_enabled() and (output.requires_grad or bias.requires_grad)
        output = output + bias if wanted or tracing or is_transformed() else output.add_(bias)
    return output.view(*leading, out)


def composed_dense_pairs(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J), the same leading dimensions
    weight: Tensor,  # (O, I, J); int8 with `scale`
    bias: Tensor | None,  # (O,)
    scale: Tensor | None,  # float32, broadcastable to `weight`
) -> Tensor:  # (..., L1, L2, O)
    """y_klo = x1_kᵀ W_o x2_l + b_o for all pairs of k and l, without expanding the inputs over the pairs."""
    leading, (length1, in1), (length2, in2) = input1.shape[:-2], input1.shape[-2:], input2.shape[-2:]
    batch, out = math.prod(leading), weight.shape[0]
    batch1, batch2 = input1.reshape(batch, length1, in1), input2.reshape(batch, length2, in2)
    bias = bias if bias is None else bias.to(input1.dtype)
    # each input can be projected first; per output, I·J for each of its rows and the other's width for each pair
    swap = in2 > in1 if is_tracing() else length2 * in1 * (in2 + length1) < length1 * in2 * (in1 + length2)
    if swap:
        batch1, batch2, weight, scale = batch2, batch1, weight.mT, None if scale is None else scale.mT
    if is_tracing():
        outputs = _TRACED_ROW // weight.shape[2]
    else:  # neither T nor its products with the other input exceed a block, but for one output
        columns = batch1.shape[0] * batch1.shape[1] * max(weight.shape[2], batch2.shape[1])
        outputs = _block(batch1, pairs=True) // max(1, columns)
    parts = list(_weight_parts(weight, scale, outputs))
    if len(parts) > 1 and not (torch.is_grad_enabled() or is_tracing() or is_transformed()):
        output = batch1.new_empty(batch, length1, length2, out)
        turned, start = output if swap else output.transpose(1, 2), 0
        for part, part_scale in parts:
            turned[..., start : start + len(part)] = _pairs(batch1, batch2, part, part_scale)
            start += len(part)
        output = output if bias is None else output.add_(bias)
        return output.view(*leading, length1, length2, out)
    run = block_runner(len(parts) > 1, batch1, batch2, weight)
    pieces = [run(_pairs, batch1, batch2, part, part_scale) for part, part_scale in parts]
    output = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=3)  # (B, L2, L1, O), of the swapped lengths
    output = output if swap else output.transpose(1, 2)
    output = (output if bias is None else output + bias).contiguous()
    return output.reshape(*leading, length1, length2, out)


def is_tracing() -> bool:
    """Whether a graph is being recorded that has to hold for other numbers of rows too."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined, unused-ignore]


def is_transformed() -> bool:
    """Whether a transform of torch.func is active, as torch.autograd.Function asks for it."""
    return torch._C._are_functorch_transforms_active()


def block_size(like: Tensor, on_cpu: int, on_cpu_grad: int) -> int:
    """Elements of a block where `like` lies: with a gradient, for which it may be recomputed, another than without."""
    if like.device.type != "cpu":
        return _GPU_BLOCK
    return on_cpu_grad if torch.is_grad_enabled() else on_cpu


def _block(like: Tensor, pairs: bool = False) -> int:
    return block_size(like, _CPU_BLOCK_PAIRS if pairs else _CPU_BLOCK, _CPU_BLOCK_GRAD)


def block_runner(several: bool, *tensors: Tensor) -> Callable[..., Tensor]:
    """Runs a block: as it is, or recomputed in the backward where several blocks would be kept for a gradient."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not (several and wanted) or is_transformed() or is_tracing():  # torch.func's transforms cannot recompute
        return lambda function, *args: function(*args)
    return lambda function, *args: checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _weight_parts(weight: Tensor, scale: Tensor | None, outputs: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The weight in groups of outputs, with the scales of each."""
    if scale is not None and not is_tracing():
        outputs = min(outputs, _WEIGHT_BLOCK // (weight.shape[1] * weight.shape[2]))
    if is_tracing():
        outputs = max(outputs, -(-weight.shape[0] // _TRACED_PARTS))
    outputs = max(1, outputs)
    parts = weight.split(outputs)
    if scale is None:
        return zip(parts, [None] * len(parts), strict=True)
    return zip(parts, scale.expand(weight.shape[0], -1, -1).split(outputs), strict=True)


def _plain(part: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return part if scale is None else dequantize(part, scale, dtype)


def _projected(
    input: Tensor,  # (..., K)
    part: Tensor,  # (o, a, b)
    scale: Tensor | None,
    flat: Callable[[Tensor], Tensor],  # -> (M, K)
) -> Tensor:  # (..., M)
    """The product with a flattened part, whose de-quantized or turned values do not wait for a backward."""
    if scale is None:
        return stored_linear(input, lambda dtype: flat(part), part)
    return stored_linear(input, lambda dtype: flat(dequantize(part, scale, dtype)), part, scale)


def _contract(kept: Tensor, first: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Σ_ab kept_na W_oab first_nb, eliminating b first: (N, O)."""
    out, width, _ = weight.shape
    count, limit = max(1, kept.shape[0]), _block(kept)
    columns = max(limit // (count * width), min(_BLOCK_WIDTH, limit) // width, 1)
    parts = list(_weight_parts(weight, scale, columns))
    rows = max(1, min(count, limit // (width * min(out, columns))))
    blocks = list(zip(kept.split(rows), first.split(rows), strict=True))
    if len(parts) * len(blocks) == 1:
        return _matvec(kept, first, *parts[0])
    if torch.is_grad_enabled() or is_transformed():
        run = block_runner(True, kept, first, weight)
        columns_of = [
            torch.cat([run(_matvec, block1, block2, part, part_scale) for block1, block2 in blocks])
            for part, part_scale in parts
        ]
        return columns_of[0] if len(columns_of) == 1 else torch.cat(columns_of, dim=1)
    output, start = kept.new_empty(kept.shape[0], out), 0
    for part, part_scale in parts:
        part = _plain(part, part_scale, kept.dtype).contiguous()  # once for all rows
        target = output[:, start : start + len(part)].split(rows)
        start += len(part)
        for block1, block2, piece in zip(*zip(*blocks, strict=True), target, strict=True):
            piece.copy_(_matvec(block1, block2, part, None))
    return output


def _lies_well(rows1: Tensor, rows2: Tensor, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether `_lying` may run, and should be the fastest."""
    (out, in1, in2), rows = weight.shape, rows1.shape[0]
    return (
        0 < in2 <= in1
        and rows > 0
        and (rows <= _LYING_ROWS or out < _LYING_OUT)
        and is_mkls(rows1, rows2, weight if scale is None else None)
        and not (torch.is_grad_enabled() and scale is not None and scale.requires_grad)
    )


def _lying(rows1: Tensor, rows2: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Σ_ij x1_ni W_oij x2_nj by products x1 W_o, which want no copy of the weight: (N, O)."""
    out, _, in2 = weight.shape
    few = out < _LYING_OUT and weight.dtype == torch.float32 and scale is None
    if few and _LOOP_BLOCK <= rows1.shape[0] * in2 <= _LOOP_MOST and weight.numel() <= _LOOP_MOST:
        return torch.nn.functional.bilinear(rows1, rows2, weight)
    rows = min(rows1.shape[0], max(1, _CPU_BLOCK // in2))
    output, start = rows1.new_empty(rows1.shape[0], out), 0
    blocks = list(zip(rows1.split(rows), rows2.split(rows), output.split(rows), strict=True))
    for part, part_scale in _weight_parts(weight, scale, _CPU_BLOCK // (rows * in2)):
        part, end = _plain(part, part_scale, rows1.dtype), start + len(part)
        for block1, block2, target in blocks:  # into a slice: `out=` would sum more slowly
            target[:, start:end] = lying_products(block1, block2, part)
        start = end
    return output


def _matvec(kept: Tensor, first: Tensor, part: Tensor, scale: Tensor | None) -> Tensor:
    """(n, a), (n, b), (o, a, b) -> (n, o)."""
    outputs, width, _ = part.shape
    product = _projected(first, part, scale, lambda weight: weight.flatten(0, 1)).view(-1, outputs, width)
    wanted = torch.is_grad_enabled() and (product.requires_grad or kept.requires_grad)
    if wanted or is_tracing() or is_transformed():
        return (product * kept.unsqueeze(1)).sum(-1)
    return product.mul_(kept.unsqueeze(1)).sum(-1)


def _outer(rows1: Tensor, rows2: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    _, in1, in2 = weight.shape
    block = _OUTER_BLOCK if rows1.device.type == "cpu" else _GPU_BLOCK
    rows = max(1, block // (in1 * in2))
    blocks = list(zip(rows1.split(rows), rows2.split(rows), strict=True))
    parts = list(_weight_parts(weight, scale, weight.shape[0]))
    run = block_runner(len(parts) * len(blocks) > 1, rows1, rows2, weight)
    pieces = []
    for part, part_scale in parts:
        if not torch.is_grad_enabled():
            part, part_scale = _plain(part, part_scale, rows1.dtype), None
        column = [run(_outer_block, block1, block2, part, part_scale) for block1, block2 in blocks]
        pieces.append(column[0] if len(column) == 1 else torch.cat(column))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _outer_block(rows1: Tensor, rows2: Tensor, part: Tensor, scale: Tensor | None) -> Tensor:
    """(n, i), (n, j), (o, i, j) -> (n, o)."""
    product = (rows1.unsqueeze(2) * rows2.unsqueeze(1)).flatten(1)
    return _projected(product, part, scale, lambda weight: weight.flatten(1))


def _pairs(batch1: Tensor, batch2: Tensor, part: Tensor, scale: Tensor | None) -> Tensor:
    """(B, k, a), (B, l, b), (o, a, b) -> (B, l, k, o)."""
    batch, length1, _ = batch1.shape
    outputs, _, width = part.shape
    product = _projected(batch1, part, scale, lambda weight: weight.mT.flatten(0, 1))  # by (o·b, a)
    product = product.view(batch, length1 * outputs, width)
    if not (torch.is_grad_enabled() or is_tracing()) and batch > 0 and prefers_onednn(batch2[0], product[0]):
        output = batch2.new_empty(batch, batch2.shape[1], length1 * outputs)
        for index in range(batch):
            output[index] = linear(batch2[index], product[index])
    else:
        output = torch.bmm(batch2, product.mT)
    return output.unflatten(2, (length1, outputs))


def _traced(rows1: Tensor, rows2: Tensor, weight: Tensor, scale: Tensor | None, order: Order) -> Tensor:
    """A graph that holds for any number of rows: only outputs are split, by shapes that are known."""
    in1, in2 = weight.shape[1:]
    if order == "outer" and in1 * in2 <= _TRACED_ROW:
        return _outer_block(rows1, rows2, weight, scale)
    if order == "in1_first" or (order == "outer" and in1 > in2):
        rows1, rows2, weight, scale = rows2, rows1, weight.mT, None if scale is None else scale.mT
    parts = _weight_parts(weight, scale, _TRACED_ROW // weight.shape[1])
    return torch.cat([_matvec(rows1, rows2, part, part_scale) for part, part_scale in parts], dim=1)
