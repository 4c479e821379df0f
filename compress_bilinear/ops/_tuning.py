"""The sizes by which the composed paths split their work. Tests, or a program short of memory, set smaller ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


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
    onednn_products: int = 2**21


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
