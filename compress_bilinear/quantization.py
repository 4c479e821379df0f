"""8-bit storage: int8 values with float32 scales, one scale for every slice along the reduced axes.

The scheme is linear, symmetric absmax quantization, that of bitsandbytes' `int8_vectorwise_quant` (Dettmers et al.,
LLM.int8(), 2022), on any axis. The pure-torch code here defines it; `backend="bitsandbytes"` runs theirs.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .errors import CompressionError

LEVELS = 127  # symmetric: -128 is not used, as in bitsandbytes
_CHUNK = 2**22  # values that are rounded at once, in float64


def quantize_int8(
    tensor: Tensor,  # (...), floating, finite
    dim: int,
    *,
    backend: Literal["torch", "bitsandbytes"] = "torch",
) -> tuple[Tensor, Tensor]:
    """Round a tensor to int8 with one float32 scale for each slice along `dim`.

    Args:
        tensor: any floating tensor.
        dim: the axis that shares a scale.
        backend: "torch" is the reference and works everywhere; "bitsandbytes" calls its `int8_vectorwise_quant`
            (on CUDA that rounds the tensor to float16 first).

    Returns:
        `qdata` int8 with the tensor's shape, and `scale` float32 with size 1 in `dim`, so that
        `qdata * scale` ≈ `tensor`, each entry within half its scale. A slice of zeros has scale 0.

    Raises:
        CompressionError: the tensor is not floating or not finite, or its values leave float32's range.
    """
    if not tensor.is_floating_point():
        raise CompressionError(f"`tensor` should be floating. Found {tensor.dtype}.")
    if tensor.dim() == 0:
        raise CompressionError("`tensor` should have an axis to share scales along. Found a scalar.")
    # contiguous: what is reloaded from a file has to have the same layout, or BLAS rounds otherwise
    values = tensor.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise CompressionError("`tensor` should be finite in float32 to be quantized. Found NaN or infinity.")
    if backend == "bitsandbytes":
        return _quantize_bitsandbytes(values, dim)
    if values.numel() == 0:
        return values.to(torch.int8), values.new_zeros(values.sum(dim, keepdim=True).shape)
    peak = torch.maximum(values.amax(dim, keepdim=True), -values.amin(dim, keepdim=True)).double()
    scale = _representable_scale(peak)
    divisor = torch.where(scale > 0, scale, torch.inf).double()  # a slice of zeros, or of too small values, becomes 0
    qdata = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    step = max(1, _CHUNK * values.shape[0] // values.numel())
    for start in range(0, values.shape[0], step):
        rows = slice(start, start + step)
        quotient = values[rows].double() / (divisor if divisor.shape[0] == 1 else divisor[rows])
        qdata[rows] = quotient.round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return qdata, scale


def _representable_scale(peak: Tensor) -> Tensor:
    """peak / 127 in float32, rounded so that 127 steps neither overflow nor, where steps are subnormal, fall short."""
    scale = (peak / LEVELS).to(torch.float32)
    limits = torch.finfo(torch.float32)
    above, below = scale.double() * LEVELS > limits.max, scale.double() * LEVELS < peak
    scale = torch.where(above, torch.nextafter(scale, torch.zeros_like(scale)), scale)
    return torch.where(below & (scale < limits.tiny), torch.nextafter(scale, torch.ones_like(scale)), scale)


def _quantize_bitsandbytes(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant  # costs seconds, so only where it is asked for

    moved = values.movedim(dim, -1)
    rows = moved.reshape(-1, moved.shape[-1]).contiguous()
    qdata, absmax, _ = int8_vectorwise_quant(rows.half() if rows.is_cuda else rows)
    scale = absmax.to(torch.float32).reshape(*moved.shape[:-1], 1) / LEVELS  # theirs is absmax, ours is a step
    return qdata.reshape(moved.shape).movedim(-1, dim).contiguous(), scale.movedim(-1, dim).contiguous()


def dequantize(qdata: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`qdata * scale`, multiplied in float32 (float64 for a float64 result) and rounded once, to `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (qdata.to(wide) * scale.to(wide)).to(dtype)


class QuantizedTensor(nn.Module):
    """A tensor stored as the buffers `qdata` (int8) and `scale` (float32, broadcastable to `qdata`).

    A module, not a tensor subclass, so that `.to(device)`, deepcopy, `state_dict` and safetensors just work.
    Moving the parent to another floating dtype leaves both buffers as they are: scales stay float32.
    """

    qdata: Tensor
    scale: Tensor

    def __init__(self, qdata: Tensor, scale: Tensor) -> None:
        super().__init__()
        if qdata.dtype != torch.int8 or scale.dtype != torch.float32:
            raise CompressionError(
                f"`qdata` and `scale` should be int8 and float32. Found {qdata.dtype} and {scale.dtype}."
            )
        if qdata.dim() != scale.dim() or any(s not in (1, q) for q, s in zip(qdata.shape, scale.shape, strict=True)):
            raise CompressionError(
                f"`scale` should broadcast to `qdata`'s shape {tuple(qdata.shape)}. Found {tuple(scale.shape)}."
            )
        self.register_buffer("qdata", qdata)
        self.register_buffer("scale", scale)

    @classmethod
    def quantize(cls, tensor: Tensor, dim: int) -> Self:
        """Quantize `tensor` with one scale for each slice along `dim`; see `quantize_int8`."""
        return cls(*quantize_int8(tensor, dim))

    @classmethod
    def empty(cls, shape: tuple[int, ...], dim: int, device: torch.device | str | None = None) -> Self:
        """Zeros of `shape`, with the buffers' shapes and dtypes that `quantize(..., dim)` gives."""
        scale_shape = [1 if axis == dim % len(shape) else size for axis, size in enumerate(shape)]
        qdata = torch.zeros(shape, dtype=torch.int8, device=device)
        return cls(qdata, torch.zeros(scale_shape, dtype=torch.float32, device=device))

    @property
    def shape(self) -> torch.Size:
        return self.qdata.shape

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor that is stored, in `dtype`."""
        return dequantize(self.qdata, self.scale, dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.qdata, self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # .half() on the parent would round the scales for good, and .type(dtype) also convert the integers
        if self.qdata.dtype != torch.int8:
            self.qdata = before[0].to(device=self.qdata.device)
        if self.scale.dtype != torch.float32:
            self.scale = before[1].to(device=self.scale.device)
        return self

    def extra_repr(self) -> str:
        return f"int8, shape={tuple(self.shape)}, scales={tuple(self.scale.shape)}"
