"""How much is held at once: sizes of blocks, blocks of a weight, and those that are recomputed in the backward.

Tests, or a program that is short of memory, set smaller sizes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._context import gradient_wanted, only_values, traced, transformed

TRACED_ROW = 4096  # elements of an intermediate for one row of a traced graph, whose number of rows is not known
TRACED_PARTS = 16  # parts of a weight in a traced graph, at most


@dataclass(frozen=True)
class Tuning:
    """Sizes in elements. The defaults are the fastest that were measured on two cores of an Intel and an AMD CPU.

    Attributes:
        block: of the intermediate that a dense layer on rows holds at once: two megabytes, which stay in the cache.
        block_grad: the same where gradients are recorded; such a block is recomputed in the backward, at a cost.
        pairs: of the intermediate that a dense layer on pairs holds; there it is a factor of another product.
        outer: of the products x1 ⊗ x2 that are held at once.
        cp: of the products of a CP's projections that pairs hold at once.
        cp_grad: the same where gradients are recorded.
        gpu: replaces each of these on a GPU, which wants fewer and larger launches.
        weight: entries of a stored weight that are decoded at once, at least one output's slice.
        programs: of a Triton kernel, below which a long sum is split among more of them.
        onednn: whether oneDNN multiplies in float32 on a CPU; None: on an AMD processor if torch brings MKL too.
        onednn_rows, onednn_products: the fewest rows, and multiply-adds, of a product for oneDNN. It lays out the
            weight again in each call, and a call takes some 12 microseconds more.
    """

    block: int = 2**19
    block_grad: int = 2**22
    pairs: int = 2**21
    outer: int = 2**20
    cp: int = 2**20
    cp_grad: int = 2**22
    gpu: int = 2**24
    weight: int = 2**20
    programs: int = 128
    onednn: bool | None = None
    onednn_rows: int = 16
    onednn_products: int = 2**23


_DEFAULT = Tuning()
_ACTIVE = ContextVar("tuning", default=_DEFAULT)


def tuning() -> Tuning:
    """The sizes in use."""
    return _DEFAULT if torch.compiler.is_compiling() else _ACTIVE.get()  # Dynamo reads no context variables


@contextmanager
def use_tuning(sizes: Tuning) -> Iterator[None]:
    """Use these sizes inside the `with` statement, in this thread."""
    token = _ACTIVE.set(sizes)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


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
