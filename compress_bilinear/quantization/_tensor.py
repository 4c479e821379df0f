"""Quantized tensors as modules of plain buffers."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import CompressionError
from ._int8 import SCALE_DTYPE, Backend, dequantize, quantize_blocks, quantize_int8, quantize_unit
from ._nf4 import BLOCK, dequantize_nf4, is_watched, quantize_nf4

_SCALE_DTYPES = (torch.float32, torch.bfloat16)
_BITSANDBYTES_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that it decodes to
_BITSANDBYTES_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)  # of int8 that it decodes on CUDA
_BITSANDBYTES_MOST = 2**30  # values that it decodes at once: on CUDA it counts them in 32 bits
_COMPARED = 2**16  # values that are decoded twice before it is trusted with a tensor


class QuantizedTensor(nn.Module):
    """A tensor stored as the buffers `qdata` (int8) and `scale`, for each of its values `qdata * scale`.

    `scale` is float32 or bfloat16. Along each axis it has size 1, the tensor's, or a number between: then each holds
    for a block of ⌈size / number⌉ entries. It may be None: then the step is 2⁻⁷, and a factor is kept elsewhere.

    A module, not a tensor subclass, so that `.to(device)`, deepcopy, `state_dict` and safetensors just work. Moving the
    parent to another floating dtype leaves both buffers as they are.

    Attributes:
        resident: the tensor in floating point where `keep_resident` has asked for it, None otherwise. It is no buffer:
            it is not saved, and follows what is loaded.
        backend: which code decodes it: "torch", or "bitsandbytes" after `use_bitsandbytes`.
    """

    qdata: Tensor
    scale: Tensor | None
    resident: Tensor | None
    backend: Backend

    def __init__(self, qdata: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self._check(qdata, scale)
        self.register_buffer("qdata", qdata)
        self.register_buffer("scale", scale)
        self.resident = None
        self.backend = "torch"

    def _check(self, qdata: Tensor, scale: Tensor | None) -> None:
        if qdata.dtype != torch.int8 or (scale is not None and scale.dtype not in _SCALE_DTYPES):
            found = f"{qdata.dtype} and {None if scale is None else scale.dtype}"
            raise CompressionError(f"`qdata` and `scale` should be int8 and float32 or bfloat16. Found {found}.")
        if scale is not None and (
            qdata.dim() != scale.dim() or not all(_cuts(q, s) for q, s in zip(qdata.shape, scale.shape, strict=True))
        ):
            raise CompressionError(
                f"`scale` should have 1, all, or blocks of `qdata`'s shape {tuple(qdata.shape)} along each axis. "
                f"Found {tuple(scale.shape)}."
            )

    @classmethod
    def quantize(cls, tensor: Tensor, dim: int) -> "QuantizedTensor":
        """Quantize `tensor` with one float32 scale for each slice along `dim`; see `quantize_int8`."""
        return QuantizedTensor(*quantize_int8(tensor, dim))

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        grid: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        scale_dtype: torch.dtype = SCALE_DTYPE,
    ) -> Self:
        """Zeros of `shape`, with scales of the shape `grid` and dtype, or none."""
        qdata = torch.zeros(tuple(shape), dtype=torch.int8, device=device)
        return cls(qdata, None if grid is None else torch.zeros(tuple(grid), dtype=scale_dtype, device=device))

    def requantized(self, tensor: Tensor) -> "QuantizedTensor":
        """Another tensor of the same shape, in the same layout."""
        if self.scale is None:
            return QuantizedTensor(quantize_unit(tensor))
        if self.scale.dtype == torch.float32:  # the scales of slices
            (dim, *_) = [axis for axis, size in enumerate(self.scale.shape) if size != tensor.shape[axis]] or [0]
            return QuantizedTensor.quantize(tensor, dim)
        return QuantizedTensor(*quantize_blocks(tensor, self.scale.shape))

    @property
    def shape(self) -> torch.Size:
        return self.qdata.shape

    @property
    def is_int8(self) -> bool:
        """Whether `qdata` are integers that the kernels read; else values have to be decoded."""
        return self.qdata.dtype == torch.int8

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor that is stored, in `dtype`; not to be changed in place."""
        return self.rows(slice(None), dtype)

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """A slice along the first axis, in `dtype`; the rest is not de-quantized."""
        if self.resident is not None and self.resident.dtype == dtype:
            return self.resident[rows]
        return self._decoded(rows, dtype, self.decoder(dtype))

    def _decoded(self, rows: slice, dtype: torch.dtype, by: Backend) -> Tensor:
        scale = self.scale if self.scale is None or self.scale.shape[0] == 1 else self.scale[rows]
        block = None if by == "torch" or self.scale is None else _flat_block(self.qdata.shape, self.scale.shape)
        if scale is None or block is None:
            return dequantize(self.qdata[rows], scale, dtype)
        from ._decode_bnb import int8_values

        return int8_values(self.qdata[rows], scale, block, dtype)

    def decoder(self, dtype: torch.dtype) -> Backend:
        """Which code decodes values to this dtype now: torch's where operators are recorded or transformed."""
        if self.backend == "torch" or dtype not in _BITSANDBYTES_DTYPES or self.shape.numel() > _BITSANDBYTES_MOST:
            return "torch"
        return "torch" if is_watched() else "bitsandbytes"

    def use_bitsandbytes(self, use: bool) -> str | None:
        """Decode by bitsandbytes' kernels from now on, or no longer: to the same values, up to their dtype's last bit.

        Returns: why it goes on as it did before, None where it does not.
        """
        reason = self.refused_bitsandbytes() if use else None
        if reason is None:
            self.backend = "bitsandbytes" if use else "torch"
        return reason

    def refused_bitsandbytes(self) -> str | None:
        """Why bitsandbytes does not decode this tensor where it is, or not rightly; None where it does.

        It is imported to try that on the tensor's own values, unless there is another reason.
        """
        return self._unfit_for_bitsandbytes() or self._wrong_by_bitsandbytes()

    def _unfit_for_bitsandbytes(self) -> str | None:
        if self.scale is None:
            return "its int8 values have no scales of blocks, which its kernels read"
        if self.device.type != "cuda":
            return f"its kernels decode int8 slower than torch does on {self.device.type}"
        if _flat_block(self.qdata.shape, self.scale.shape) not in _BITSANDBYTES_BLOCKS:
            return "its kernels take blocks of 64, 128, ..., 4096 consecutive entries, and those here are others"
        return None

    def _wrong_by_bitsandbytes(self) -> str | None:
        from ._decode_bnb import brief, missing

        absent = missing()
        if absent is not None:
            return absent
        size = self.shape[0]
        first = max(1, min(size, _COMPARED * size // max(1, self.shape.numel())))
        for rows in (slice(0, first), slice(max(0, size - 1), size)):
            for dtype in _BITSANDBYTES_DTYPES:
                exact = self._decoded(rows, dtype, "torch")
                try:
                    found = self._decoded(rows, dtype, "bitsandbytes")
                except Exception as error:  # whatever it raises where it does not fit the machine
                    return f"bitsandbytes cannot decode it: {brief(error)}"
                numbers = torch.finfo(dtype)
                if not torch.allclose(found, exact, rtol=numbers.eps, atol=numbers.eps * numbers.tiny):  # one step
                    return f"bitsandbytes decodes it wrongly to {dtype}"
        return None

    def keep_resident(self, dtype: torch.dtype | None) -> None:
        """Hold the tensor in `dtype` too, for calls in that dtype; None holds it no longer."""
        with torch.inference_mode(False), torch.no_grad():  # a backward cannot save what inference mode makes
            self.resident = None if dtype is None else self._decoded(slice(None), dtype, self.decoder(dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # .half() on the parent would round the scales for good, and .type(dtype) also convert the integers
        restore_dtypes(self, before)
        if self.resident is not None:
            self.keep_resident(fn(self.resident).dtype)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.resident is not None:
            self.keep_resident(self.resident.dtype)

    def extra_repr(self) -> str:
        scales = "none" if self.scale is None else tuple(self.scale.shape)
        return f"int8, shape={tuple(self.shape)}, scales={scales}"


class NF4Tensor(QuantizedTensor):
    """A tensor in four bits: `qdata` (uint8, two values each) and `scale` (bfloat16, for each 64), both flat."""

    scale: Tensor

    def __init__(self, qdata: Tensor, scale: Tensor, shape: Sequence[int]) -> None:
        self._shape = torch.Size(shape)
        super().__init__(qdata, scale)

    def _check(self, qdata: Tensor, scale: Tensor | None) -> None:
        count = math.prod(self._shape)
        found = None if scale is None else (scale.dtype, tuple(scale.shape))
        wanted = (-(-count // 2),), (-(-count // BLOCK),)
        if (qdata.dtype, tuple(qdata.shape)) != (torch.uint8, wanted[0]) or found != (SCALE_DTYPE, wanted[1]):
            raise CompressionError(
                f"`qdata` and `scale` of {tuple(self._shape)} values should be uint8 {wanted[0]} and {SCALE_DTYPE} "
                f"{wanted[1]}. Found {qdata.dtype} {tuple(qdata.shape)} and {found}."
            )

    @classmethod
    def coded(cls, tensor: Tensor) -> Self:
        """Quantize `tensor`; see `quantize_nf4`."""
        return cls(*quantize_nf4(tensor), tensor.shape)

    @classmethod
    def zeros(cls, shape: Sequence[int], device: torch.device | str | None = None) -> Self:
        """A tensor of zero magnitudes."""
        count = math.prod(shape)
        qdata = torch.zeros(-(-count // 2), dtype=torch.uint8, device=device)
        return cls(qdata, torch.zeros(-(-count // BLOCK), dtype=SCALE_DTYPE, device=device), shape)

    def requantized(self, tensor: Tensor) -> "NF4Tensor":
        """Another tensor of the same shape, in the same layout."""
        return NF4Tensor.coded(tensor)

    @property
    def shape(self) -> torch.Size:
        return self._shape

    def _decoded(self, rows: slice, dtype: torch.dtype, by: Backend) -> Tensor:
        begin, end, _ = rows.indices(self._shape[0])
        each = math.prod(self._shape[1:])
        coded = (self.qdata, self.scale, begin * each, max(begin, end) * each, dtype)
        if by == "torch":
            return dequantize_nf4(*coded).view(-1, *self._shape[1:])
        from ._decode_bnb import nf4_values

        return nf4_values(*coded).view(-1, *self._shape[1:])

    def _unfit_for_bitsandbytes(self) -> str | None:
        if self.device.type in ("cpu", "cuda"):
            return None
        return f"its kernels are for CPUs and CUDA, and the values are on {self.device.type}"

    def extra_repr(self) -> str:
        return f"nf4, shape={tuple(self.shape)}"


def restore_dtypes(module: nn.Module, before: dict[str, Tensor | None]) -> None:
    """Give a module's own buffers the dtypes and values that they had, on the device where they are now."""
    for name, buffer in module._buffers.items():
        old = before.get(name)
        if buffer is not None and old is not None and buffer.dtype != old.dtype:
            module._buffers[name] = old.to(device=buffer.device)


def _cuts(size: int, count: int) -> bool:
    """Whether `count` blocks of ⌈size / count⌉ entries make `size`, none empty."""
    return count in (1, size) or (1 < count < size and -(-size // -(-size // count)) == count)


def _flat_block(shape: Sequence[int], grid: Sequence[int]) -> int | None:
    """How many consecutive entries each scale holds for; None where blocks are not so, or of several sizes."""
    axis = max((axis for axis, count in enumerate(grid) if count > 1), default=0)
    size, count = shape[axis], grid[axis]
    if tuple(grid[:axis]) != tuple(shape[:axis]) or size % count:
        return None
    return math.prod(shape[axis + 1 :]) * (size // count)
