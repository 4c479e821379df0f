"""The exact dense bilinear, evaluated in the best order and in bounded memory.

y_no = Σ_ij x1_ni W_oij x2_nj can be summed in three orders, each of 2·N·O·I·J FLOPs; they differ in what lies between:

- "in1_first": T = x1 W_o (N x O x J), then T · x2;
- "in2_first": T = W_o x2 (N x O x I), then T · x1;
- "outer": T = x1 ⊗ x2 (N x I x J), then one matrix product with W.

So the largest dimension is eliminated first. T is never whole: outputs and rows are taken in blocks whose T stays in
the cache, which on a CPU is also the fastest (`benchmarks/run.py` measures it). Where a gradient is wanted, each block
is recomputed in the backward (Chen et al., "Training deep nets with sublinear memory cost", 2016), for T would
otherwise be kept whole for it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..quantization import dequantize

Order: TypeAlias = Literal["in1_first", "in2_first", "outer"]

ORDERS: tuple[Order, ...] = ("in1_first", "in2_first", "outer")

# Elements of T in a block. On a CPU about a megabyte is fastest; a GPU wants fewer, larger launches. A block that is
# recomputed in the backward has an overhead of its own, so it is larger.
_CPU_BLOCK = 2**18
_CPU_BLOCK_GRAD = 2**22
_GPU_BLOCK = 2**24
_OUTER_BLOCK = 2**20
_OUTER_MOST = 2**14  # I·J above which "outer" blocks have too few rows for an efficient product
_WEIGHT_BLOCK = 2**20  # elements of the weight that are de-quantized at once (or one output's slice)
_TRACED_ROW = 4096  # elements of T for a row in a traced graph, where the number of rows is not known
_TRACED_PARTS = 16


def best_order(shape: tuple[int, int, int]) -> Order:
    """The order for a weight (O, I, J): eliminate the largest dimension first."""
    out, in1, in2 = shape
    if out >= max(in1, in2) and in1 * in2 <= _OUTER_MOST:
        return "outer"
    return "in1_first" if in1 >= in2 else "in2_first"


def dense_flops(shape: tuple[int, int, int]) -> int:
    """FLOPs for a row, multiply-add counted as 2, in the best order."""
    out, in1, in2 = shape
    return 2 * out * in1 * in2 + 2 * min(out * in1, out * in2, in1 * in2)


def bilinear_dense(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J), the same leading dimensions
    weight: Tensor,  # (O, I, J); int8 with `scale`
    bias: Tensor | None = None,  # (O,)
    *,
    scale: Tensor | None = None,  # float32, broadcastable to `weight`
    order: Order | None = None,
) -> Tensor:  # (..., O)
    """y_o = x1ᵀ W_o x2 + b_o, exact up to rounding.

    Peak extra memory is a few blocks of T (a megabyte each on a CPU without gradients) beside inputs and output; an
    int8 weight is de-quantized block by block into the inputs' dtype.

    Args:
        order: one of "in1_first", "in2_first", "outer"; None chooses by shape (`best_order`).
    """
    out, in1, in2 = weight.shape
    leading = input1.shape[:-1]
    if input2.shape[:-1] != leading or (order is not None and order not in ORDERS):
        raise InputError(
            f"The inputs should have the same leading dimensions, and `order` be None or one of {ORDERS}. "
            f"Found {tuple(input1.shape)}, {tuple(input2.shape)} and {order!r}."
        )
    rows = math.prod(leading)
    rows1, rows2 = input1.reshape(rows, in1), input2.reshape(rows, in2)
    order = order or best_order((out, in1, in2))
    if is_tracing():
        output = _traced(rows1, rows2, weight, scale, order)
    elif order == "outer":
        output = _outer(rows1, rows2, weight, scale)
    else:
        if order == "in2_first":
            rows1, rows2, weight, scale = rows2, rows1, weight.mT, None if scale is None else scale.mT
        output = _contract_first(rows1, rows2, weight, scale)
    if bias is not None:
        output = output + bias
    return output.reshape(*leading, out)


def pairwise_dense(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J), the same leading dimensions
    weight: Tensor,  # (O, I, J); int8 with `scale`
    bias: Tensor | None = None,  # (O,)
    *,
    scale: Tensor | None = None,  # float32, broadcastable to `weight`
) -> Tensor:  # (..., L1, L2, O)
    """y_klo = x1_kᵀ W_o x2_l + b_o for all pairs of k and l, without expanding the inputs over the pairs."""
    leading, (length1, in1), (length2, in2) = input1.shape[:-2], input1.shape[-2:], input2.shape[-2:]
    batch, out = math.prod(leading), weight.shape[0]
    batch1, batch2 = input1.reshape(batch, length1, in1), input2.reshape(batch, length2, in2)
    # each input can be projected first; per output, I·J for each of its rows and the other's width for each pair
    swap = in2 > in1 if is_tracing() else length2 * in1 * (in2 + length1) < length1 * in2 * (in1 + length2)
    if swap:
        batch1, batch2, weight, scale = batch2, batch1, weight.mT, None if scale is None else scale.mT
    limit = _TRACED_ROW if is_tracing() else _block(batch1) // max(1, batch1.shape[0] * batch1.shape[1])
    parts = list(_weight_parts(weight, scale, limit // weight.shape[2]))
    run = block_runner(len(parts) > 1, batch1, batch2, weight)
    pieces = [run(_pairs, batch1, batch2, part, part_scale) for part, part_scale in parts]
    output = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)  # (B, O, L1, L2)
    output = output.permute(0, 3, 2, 1) if swap else output.permute(0, 2, 3, 1)
    output = (output if bias is None else output + bias).contiguous()
    return output.reshape(*leading, length1, length2, out)


def is_tracing() -> bool:
    """Whether a graph is being recorded that has to hold for other numbers of rows too."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined, unused-ignore]


def _block(like: Tensor) -> int:
    if like.device.type != "cpu":
        return _GPU_BLOCK
    return _CPU_BLOCK_GRAD if torch.is_grad_enabled() else _CPU_BLOCK


def block_runner(several: bool, *tensors: Tensor) -> Callable[..., Tensor]:
    """Runs a block: as it is, or recomputed in the backward where several blocks would be kept for a gradient."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    # torch.func's transforms cannot recompute; this is how torch.autograd.Function asks for them
    transformed = torch._C._are_functorch_transforms_active()
    if not (several and wanted) or transformed or is_tracing():
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


def _contract_first(first: Tensor, second: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """Σ_ab first_na W_oab second_nb, eliminating a first: (N, O)."""
    width = weight.shape[2]
    limit = _block(first)
    rows = max(1, min(first.shape[0], limit // width))
    parts = list(_weight_parts(weight, scale, limit // (rows * width)))
    blocks = list(zip(first.split(rows), second.split(rows), strict=True))
    run = block_runner(len(parts) * len(blocks) > 1, first, second, weight)
    if len(parts) * len(blocks) == 1:
        return run(_matvec, first, second, *parts[0]).mT.contiguous()
    pieces = []
    for part, part_scale in parts:
        if not torch.is_grad_enabled():
            part, part_scale = _plain(part, part_scale, first.dtype), None  # once for all rows
        column = [run(_matvec, block1, block2, part, part_scale) for block1, block2 in blocks]
        pieces.append(column[0] if len(column) == 1 else torch.cat(column, dim=1))
    return torch.cat(pieces).mT.contiguous()


def _matvec(first: Tensor, second: Tensor, part: Tensor, scale: Tensor | None) -> Tensor:
    """(n, a), (n, b), (o, a, b) -> (o, n)."""
    product = torch.matmul(first, _plain(part, scale, first.dtype))
    return (product * second).sum(-1)


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
    return torch.nn.functional.linear(product, _plain(part, scale, rows1.dtype).flatten(1))


def _pairs(batch1: Tensor, batch2: Tensor, part: Tensor, scale: Tensor | None) -> Tensor:
    """(B, k, a), (B, l, b), (o, a, b) -> (B, o, k, l)."""
    batch, length1, width = batch1.shape
    outputs = part.shape[0]
    product = torch.matmul(batch1.reshape(-1, width), _plain(part, scale, batch1.dtype))  # (o, B·k, b)
    product = product.unflatten(1, (batch, length1)).transpose(0, 1).flatten(1, 2)  # (B, o·k, b)
    return torch.bmm(product, batch2.mT).unflatten(1, (outputs, length1))


def _traced(rows1: Tensor, rows2: Tensor, weight: Tensor, scale: Tensor | None, order: Order) -> Tensor:
    """A graph that holds for any number of rows: only outputs are split, by shapes that are known."""
    in1, in2 = weight.shape[1:]
    if order == "outer" and in1 * in2 <= _TRACED_ROW:
        return _outer_block(rows1, rows2, weight, scale)
    if order == "in2_first" or (order == "outer" and in2 > in1):
        rows1, rows2, weight, scale = rows2, rows1, weight.mT, None if scale is None else scale.mT
    parts = _weight_parts(weight, scale, _TRACED_ROW // weight.shape[2])
    return torch.cat([_matvec(rows1, rows2, part, part_scale) for part, part_scale in parts]).mT.contiguous()
