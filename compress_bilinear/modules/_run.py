"""Run a model on a batch without changing it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Call: TypeAlias = Callable[[nn.Module, Any], object]
"""How to run a model on a batch."""


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch that is a tensor, or a tuple or dict of its arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def is_writable(tensor: Tensor) -> bool:
    """Whether the tensor has values that can be overwritten in place: it is dense, not on meta, and not expanded."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_meta
        and all(size < 2 or stride > 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside: eval mode and no gradients. Afterwards: training flags, buffers and the CPU's random state as before."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [
        (module._buffers, name, buffer, buffer.clone() if is_writable(buffer) else None)
        for module, _ in training
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for module, _ in training:
                module.training = False
            yield
    finally:
        for module, flag in training:
            module.training = flag
        with torch.no_grad():
            for holder, name, buffer, before in buffers:
                holder[name] = buffer
                if before is not None and not torch.equal(buffer, before):
                    buffer.copy_(before)
