"""What a layer sees: a bounded random sample of its input rows, taken by hooks while the model runs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import CompressionError

MAX_ROWS = 4096


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """Rows that a layer was called with.

    Attributes:
        input1: (n, I), a uniform random sample of all rows seen, n at most `max_rows`.
        input2: (n, J), the rows that came with them.
        rows_seen: how many rows there were.
        calls: in how many calls.
    """

    input1: Tensor
    input2: Tensor
    rows_seen: int
    calls: int

    @property
    def rows_per_call(self) -> int:
        """The mean number of rows of a call, at least 1."""
        return max(1, round(self.rows_seen / self.calls))


class _Reservoir:
    """A uniform sample of a stream of rows in constant memory: every row draws a key, the largest keys stay."""

    def __init__(self, max_rows: int, seed: int) -> None:
        self._max_rows = max_rows
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self._rows: tuple[Tensor, Tensor] | None = None
        self.rows_seen = 0
        self.calls = 0

    def add(self, input1: Tensor, input2: Tensor) -> None:
        if input1.dim() == 1:
            input1, input2 = input1.unsqueeze(0), input2.unsqueeze(0)
        leading = input1.shape[:-1]
        count = leading.numel()
        keys = torch.cat([self._keys, torch.rand(count, generator=self._generator)])
        self.calls += 1
        self.rows_seen += count
        chosen = keys.topk(min(self._max_rows, len(keys))).indices
        old, new = chosen[chosen < len(self._keys)], chosen[chosen >= len(self._keys)] - len(self._keys)
        # indexed in their own shape: all-pairs callers pass expanded views, which flattening would write out
        index = torch.unravel_index(new.to(input1.device), leading)
        picked = [value.detach()[index].reshape(len(new), value.shape[-1]).clone() for value in (input1, input2)]
        if self._rows is not None:
            # rows may come from another device, where one module is called on several
            picked = [
                torch.cat([kept[old.to(kept.device)], new_rows.to(kept)])
                for kept, new_rows in zip(self._rows, picked, strict=True)
            ]
        self._keys = torch.cat([keys[old], keys[new + len(self._keys)]])
        self._rows = (picked[0], picked[1])

    def result(self) -> LayerInputs | None:
        if self._rows is None or self.rows_seen == 0:
            return None
        return LayerInputs(*self._rows, self.rows_seen, self.calls)


def collect_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
) -> dict[str, LayerInputs | None]:
    """Run the model over `batches` and sample the rows that reach each layer.

    The model runs in eval mode without gradients; training flags, buffers and the random state are restored
    afterwards, whatever happens. A layer that is called several times, or under several names, has one sample of all.

    Args:
        model: the network; nothing of it is changed.
        layers: two-input modules inside it, by a name of the caller's.
        batches: an iterable of what the model takes: a tensor, or a tuple or dict of its arguments.
        max_rows: the most rows to keep for a layer.
        seed: of the sample.

    Returns:
        For each name its `LayerInputs`, or None where no row reached the layer.

    Raises:
        CompressionError: there are no batches, or the model fails on one.
    """
    lazy = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if is_lazy(value)]
    if lazy:
        raise CompressionError(
            f"The model should be initialised before calibration, which would initialise it. Found {', '.join(lazy)} "
            "without a shape: run the model once first."
        )
    reservoirs = {name: _Reservoir(max_rows, seed) for name in layers}
    handles = []

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = dict(zip(("input1", "input2"), args, strict=False)) | kwargs
            input1, input2 = bound.get("input1"), bound.get("input2")
            if isinstance(input1, Tensor) and isinstance(input2, Tensor) and input1.shape[:-1] == input2.shape[:-1]:
                reservoirs[name].add(input1, input2)

        return hook

    count = 0
    with _undisturbed(model):
        try:
            for name, layer in layers.items():
                handles.append(layer.register_forward_pre_hook(hook_for(name), with_kwargs=True))
            for count, batch in enumerate(batches, start=1):
                try:
                    _call(model, batch)
                except Exception as error:
                    raise CompressionError(
                        f"The model failed on calibration batch {count - 1}: {type(error).__name__}: {error}\n"
                        "Each batch should be what the model takes: a tensor, or a tuple or dict of its arguments. "
                        f"Found {_describe(batch)}."
                    ) from error
        finally:
            for handle in handles:
                handle.remove()
    if count == 0:
        raise CompressionError("`calibration` should yield at least one batch. Found none.")
    return {name: reservoir.result() for name, reservoir in reservoirs.items()}


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def _describe(batch: Any) -> str:
    match batch:
        case Tensor():
            return f"a tensor of shape {tuple(batch.shape)}"
        case Mapping():
            return "a dict of " + ", ".join(f"{key}: {_describe(value)}" for key, value in batch.items())
        case tuple() | list():
            return f"a {type(batch).__name__} of " + ", ".join(_describe(value) for value in batch)
        case _:
            return type(batch).__name__


def _is_writable(buffer: Tensor) -> bool:
    """Whether there are values that a forward could change in place, and that could be put back."""
    overlaps = buffer.layout == torch.strided and any(
        size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )
    return buffer.layout == torch.strided and not buffer.is_meta and not overlaps


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
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
