"""How much is held at once: blocks of rows and of a weight, and blocks that are recomputed in the backward."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..quantization import decode_int8
from ._context import gradient_wanted, traced, transformed
from ._gemm import stored_linear
from ._tuning import tuning

TRACED_ROW = 4096  # elements of an intermediate for one row of a traced graph, whose number of rows is not known
TRACED_PARTS = 16  # parts of a weight in a traced graph, at most


def block_size(like: Tensor, size: int, size_grad: int) -> int:
    """Elements of a block on the device of `like`; `size_grad` where gradients are recorded."""
    if not like.is_cpu:
        return tuning().gpu
    return size_grad if torch.is_grad_enabled() else size


def block_runner(several: bool, *tensors: Tensor) -> Callable[..., Tensor]:
    """A function that calls its first argument with the others.

    Where several blocks would be kept for the gradients of `tensors`, each is recomputed in the backward instead.
    torch.func's transforms cannot recompute.
    """
    if not several or traced() or transformed() or not gradient_wanted(*tensors):
        return lambda function, *args: function(*args)
    return lambda function, *args: checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def row_blocks(rows: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors (N, ...) in blocks of some rows. One block is not split, which takes longer than small products."""
    if not traced() and tensors[0].shape[0] <= rows:
        return [tensors]
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


def weight_parts(weight: Tensor, scale: Tensor | None, outputs: int) -> list[tuple[Tensor, Tensor | None]]:
    """The weight (O, I, J) in groups of about `outputs` outputs, each with its scales."""
    if traced():
        outputs = max(outputs, -(-weight.shape[0] // TRACED_PARTS))
    elif scale is not None:
        outputs = min(outputs, tuning().weight // (weight.shape[1] * weight.shape[2]))
    if outputs >= weight.shape[0]:
        return [(weight, scale)]
    parts = weight.split(max(1, outputs))
    if scale is None:
        return [(part, None) for part in parts]
    return list(zip(parts, scale.expand(weight.shape[0], -1, -1).split(max(1, outputs)), strict=True))


def decode_part(part: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A part of the weight in `dtype`."""
    return part if scale is None else decode_int8(part, scale, dtype)


def project_by_part(
    input: Tensor,  # (..., K)
    part: Tensor,  # (o, a, b)
    scale: Tensor | None,
    flatten: Callable[[Tensor], Tensor],  # (o, a, b) -> (M, K)
) -> Tensor:  # (..., M)
    """input times a flattened part of the weight. Its decoded or transposed copy is not kept for a backward."""

    def decode(dtype: torch.dtype, part: Tensor, scale: Tensor | None = None) -> Tensor:
        return flatten(decode_part(part, scale, dtype))

    return stored_linear(input, decode, part) if scale is None else stored_linear(input, decode, part, scale)


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """The parts concatenated; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
