"""How much is held at once: blocks of rows and of a weight, and blocks that are recomputed in the backward."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._context import gradient_wanted, traced, transformed
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


def weight_parts(weight: Tensor, outputs: int) -> tuple[Tensor, ...]:
    """The weight (O, I, J) in groups of about `outputs` outputs."""
    if traced():
        outputs = max(outputs, -(-weight.shape[0] // TRACED_PARTS))
    return (weight,) if outputs >= weight.shape[0] else weight.split(max(1, outputs))


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """The parts concatenated; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
