"""The exact dense bilinear for all pairs of two sets of rows. One input is projected, then multiplied by the other."""

import math

import torch
from torch import Tensor

from ..quantization import QuantizedTensor
from ._blocks import TRACED_ROW, block_runner, block_size, joined, plus, weight_parts
from ._context import gradient_wanted, only_values, traced
from ._gemm import linear, stored_linear, uses_onednn
from ._stored import Weight, in_slabs
from ._tuning import tuning


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
    projected = projected.view(batch, length * outputs, width)
    if not (traced() or gradient_wanted(second, projected)) and batch > 0 and uses_onednn(second[0], projected[0]):
        output = second.new_empty(batch, second.shape[1], length * outputs)
        for index in range(batch):
            output[index] = linear(second[index], projected[index])
    else:
        output = torch.bmm(second, projected.mT)
    return output.unflatten(2, (length, outputs))
