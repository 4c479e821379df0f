"""The storage formats: a class and a row of the table each."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CompressionError
from ._decode_bnb import nf4_values
from ._int8 import LEVELS, SCALE_DTYPE, UNIT, decode_int8, encode_int8, encode_unit, expand_scale, scale_grid
from ._nf4 import BLOCK, NF4_CODE, decode_nf4, encode_nf4, nearest_codes
from ._tensor import Buffer, Format, Layout, QuantizedTensor


class Bf16(Format):
    """bfloat16 for layers that compute in another dtype: float32's range in half its bytes, without scales."""

    name, bits, error = "bf16", 16, 0.003

    def buffers(self, shape: Sequence[Any], layout: Layout) -> tuple[Buffer, Buffer | None]:
        return Buffer(tuple(shape), torch.bfloat16), None

    def _encode(self, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        qdata = values.to(torch.bfloat16)
        if not bool(torch.isfinite(qdata).all()):
            raise CompressionError("`tensor` should be within bfloat16's range. Found values beyond.")
        return qdata, None

    def decode(self, stored: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        return stored.qdata[rows].to(dtype)


class Int8(Format):
    """Integers from -127 to 127 and a scale: of a weight for each block of at most 128, of a factor none."""

    name, bits, error, integers = "int8", 8, 0.01, True

    def buffers(self, shape: Sequence[Any], layout: Layout) -> tuple[Buffer, Buffer | None]:
        qdata = Buffer(tuple(shape), torch.int8)
        if layout == "weight":
            return qdata, Buffer(scale_grid(shape), SCALE_DTYPE)
        if layout == "factor":
            return qdata, None
        return qdata, Buffer((shape[0], 1) if layout == "rows" else (1, shape[1]), torch.float32)

    def _encode(self, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        _, scale = self.buffers(values.shape, layout)
        return (encode_unit(values), None) if scale is None else encode_int8(values, *scale)

    def decode(self, stored: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        return decode_int8(stored.qdata[rows], _scale_rows(stored, rows), dtype)

    def peaks(self, stored: QuantizedTensor, rows: slice, dtype: torch.dtype = torch.float64) -> Tensor | None:
        shape, scale = stored.qdata[rows].shape, _scale_rows(stored, rows)
        if scale is None:
            return torch.full(shape, UNIT * LEVELS, dtype=dtype, device=stored.device)
        return expand_scale(scale.to(dtype) * LEVELS, shape).expand(shape)

    def nearest(self, values: Tensor, peaks: Tensor) -> Tensor:
        steps = (values / peaks).nan_to_num_(0.0).mul_(LEVELS).round_().clamp_(-LEVELS, LEVELS)
        return steps.mul_(peaks / LEVELS)


class Nf4(Format):
    """Four bits: the index of a quantile of the normal distribution, times the largest magnitude of each 64 values."""

    name, bits, error = "nf4", 4, 0.1

    def buffers(self, shape: Sequence[Any], layout: Layout) -> tuple[Buffer, Buffer | None]:
        count = math.prod(shape)
        return Buffer((-(-count // 2),), torch.uint8), Buffer((-(-count // BLOCK),), SCALE_DTYPE)

    def _encode(self, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        return encode_nf4(values)

    def decode(self, stored: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        return self._decode_by(decode_nf4, stored, rows, dtype)

    def _decode_by(
        self, decode: Callable[..., Tensor], stored: QuantizedTensor, rows: slice, dtype: torch.dtype
    ) -> Tensor:
        return decode(stored.qdata, stored.scale, *_flat_range(stored, rows), dtype).view(_slice_shape(stored, rows))

    def peaks(self, stored: QuantizedTensor, rows: slice, dtype: torch.dtype = torch.float64) -> Tensor | None:
        start, stop = _flat_range(stored, rows)
        assert stored.scale is not None
        first = start // BLOCK
        magnitudes = stored.scale[first : -(-stop // BLOCK)].to(dtype).repeat_interleave(BLOCK)
        return magnitudes[start - first * BLOCK : stop - first * BLOCK].view(_slice_shape(stored, rows))

    def nearest(self, values: Tensor, peaks: Tensor) -> Tensor:
        code = torch.tensor(NF4_CODE, dtype=values.dtype, device=values.device)
        return code.take(nearest_codes((values / peaks).nan_to_num_(0.0))).mul_(peaks)

    def reason_against_bitsandbytes(self, stored: QuantizedTensor) -> str | None:
        if stored.device.type in ("cpu", "cuda"):
            return None
        return f"bitsandbytes' kernels are for CPUs and CUDA, and the values are on {stored.device.type}"

    def decode_by_bitsandbytes(self, stored: QuantizedTensor, rows: slice, dtype: torch.dtype) -> Tensor:
        return self._decode_by(nf4_values, stored, rows, dtype)


FORMATS: dict[str, Format] = {form.name: form for form in (Bf16(), Int8(), Nf4())}
"""The storage formats by the names that `quantize=` takes."""


def _scale_rows(stored: QuantizedTensor, rows: slice) -> Tensor | None:
    scale: Tensor | None = stored.scale
    return scale if scale is None or scale.shape[0] == 1 else scale[rows]


def _slice_shape(stored: QuantizedTensor, rows: slice) -> tuple[int, ...]:
    return len(range(stored.shape[0])[rows]), *stored.shape[1:]


def _flat_range(stored: QuantizedTensor, rows: slice) -> tuple[int, int]:
    """Where a slice along the first axis begins and ends in the flattened tensor."""
    begin, _, _ = rows.indices(stored.shape[0])
    count, *rest = _slice_shape(stored, rows)
    return begin * math.prod(rest), (begin + count) * math.prod(rest)
