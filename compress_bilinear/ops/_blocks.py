"""How much is held at once: blocks of rows and of a weight, and blocks that are recomputed in the backward."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._context import gradient_wanted, only_values, traced, transformed
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


def weight_parts(weight: Tensor, outputs: int) -> tuple[Tensor, ...]:
    """The weight (O, I, J) in groups of about `outputs` outputs."""
    if traced():
        outputs = max(outputs, -(-weight.shape[0] // TRACED_PARTS))
    return (weight,) if outputs >= weight.shape[0] else weight.split(max(1, outputs))


def joined(pieces: Iterable[Tensor], size: int, dim: int, values: bool) -> Tensor:
    """The pieces concatenated along `dim`, to `size` in all; a single one as it is.

    Where only `values` are wanted, each piece is written to its place before the next is computed.
    """
    if not values:
        parts = list(pieces)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    output, start = None, 0
    for piece in pieces:
        count = piece.shape[dim]
        if count == size:
            return piece
        if output is None:
            shape = list(piece.shape)
            shape[dim] = size
            output = piece.new_empty(shape)
        output.narrow(dim, start, count).copy_(piece)
        start += count
    assert output is not None
    return output


def plus(output: Tensor, bias: Tensor | None) -> Tensor:
    """The output of an operation, plus a bias of any dtype; in place where only values are wanted."""
    if bias is None:
        return output
    bias = bias if bias.dtype == output.dtype else bias.to(output.dtype)
    return output.add_(bias) if only_values(output, bias) else output + bias
