"""A bounded sample of the calibration's batches, for distilling."""

import bisect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_MOST_BATCHES = 256
_MOST_BYTES = 2**28  # of the batches and of the network's outputs for them


class BatchSample:
    """A uniform sample of a stream's batches, of bounded bytes, taken while something else consumes the stream."""

    def __init__(self, seed: int = 0, most_bytes: int = _MOST_BYTES) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._most_bytes = most_bytes
        self._kept: list[tuple[float, Any]] = []
        self._held = 0  # bytes of those

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches."""
        for batch in batches:
            key = float(torch.rand((), generator=self._generator))
            bisect.insort(self._kept, (key, batch), key=lambda pair: pair[0])
            self._held += _bytes(batch)
            while len(self._kept) > _MOST_BATCHES or (len(self._kept) > 2 and self._held > self._most_bytes):
                self._held -= _bytes(self._kept.pop()[1])
            yield batch

    @property
    def batches(self) -> list[Any]:
        """In random order."""
        return [batch for _, batch in self._kept]


def _bytes(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    if isinstance(batch, Mapping):
        return sum(_bytes(item) for item in batch.values())
    return sum(_bytes(item) for item in batch) if isinstance(batch, (tuple, list)) else 0
