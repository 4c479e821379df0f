"""Run a model on a batch, and leave it as it was."""

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


def _is_writable(buffer: Tensor) -> bool:
    """Whether there are values that a forward could change in place, and that could be put back."""
    overlaps = buffer.layout == torch.strided and any(
        size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )
    return buffer.layout == torch.strided and not buffer.is_meta and not overlaps


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; training flags, buffers and the CPU's random state as before afterwards."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [
        (module._buffers, name, buffer, buffer.clone() if _is_writable(buffer) else None)
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
