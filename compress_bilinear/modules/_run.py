"""Run a model on a batch without changing it."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from typing_extensions import Self

Call: TypeAlias = Callable[[nn.Module, Any], object]
"""How to run a model on a batch."""


def call(model: nn.Module, batch: Any, run: Call | None = None) -> Any:
    """The model on a tensor, a tuple or dict of its arguments, or as `run` says; on copies, which it may change."""
    leaves, structure = tree_flatten(batch)
    # of one given twice, one again; what is expanded cannot be changed
    fresh = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, Tensor) and is_writable(leaf)}
    batch = tree_unflatten([fresh.get(id(leaf), leaf) for leaf in leaves], structure)
    if run is not None:
        return run(model, batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def place(tensor: Tensor) -> Hashable:
    """Where a tensor's values are: equal for two that are the same view of the same memory."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


def is_writable(tensor: Tensor) -> bool:
    """Whether the tensor has values that can be overwritten in place: it is dense, not on meta, and not expanded."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_meta
        and all(size < 2 or stride > 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    )


class WeightReads(TorchFunctionMode):
    """Inside, while the model runs: which layers' weights are read by other code than their own forward.

    What asks only for a shape, dtype or device reads no weight.

    Attributes:
        found: the names of the operations, by the weight's id.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.found: dict[int, str] = {}
        self._model, self._layers = model, list(layers)
        self._weights = {id(layer.weight) for layer in self._layers}
        self._running, self._inside = 0, 0  # calls of the model, and of the layers
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        def count(name: str, step: int) -> Callable[..., None]:
            return lambda *_: setattr(self, name, getattr(self, name) + step)

        for module, name in ((self._model, "_running"), *((layer, "_inside") for layer in self._layers)):
            self._hooks.callback(module.register_forward_pre_hook(count(name, 1)).remove)
            self._hooks.callback(module.register_forward_hook(count(name, -1), always_call=True).remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._running and not self._inside and isinstance(result, Tensor):
            read = self._weights.intersection(map(id, tree_leaves((args, kwargs))))
            self.found |= dict.fromkeys(read - self.found.keys(), getattr(func, "__name__", str(func)))
        return result


@contextmanager
def noting(module: nn.Module, method: str, note: Callable[..., None]) -> Iterator[None]:
    """Inside, a call of the module's method first calls `note` with the same arguments."""
    own, before = getattr(module, method), {key: value for key, value in vars(module).items() if key == method}

    def noted(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return own(*args, **kwargs)

    vars(module)[method] = noted
    try:
        yield
    finally:
        del vars(module)[method]
        vars(module).update(before)


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
