"""What a storage format is, and a tensor that is stored in one."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..errors import CompressionError
from ._decode_bnb import brief, missing
from ._nf4 import is_traced_or_transformed

Layout: TypeAlias = Literal["weight", "factor", "rows", "columns"]
"""What a tensor is in its layer, on which its scales depend.

"weight": a dense weight or a Tucker core (O, I, J). "factor": the matrix of a linear layer whose entries are at most
127/128 in magnitude; the scale of each component is kept elsewhere. "rows" and "columns": a matrix whose rows (or
columns) differ in magnitude.
"""

_BITSANDBYTES_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that it decodes to
_BITSANDBYTES_MOST = 2**30  # values that it decodes at once: on CUDA it counts them in 32 bits
_COMPARED = 2**16  # values that are decoded twice before bitsandbytes is trusted with a tensor


class Buffer(NamedTuple):
    """Shape and dtype of a buffer; the sizes may be broadcast tensors, where only bytes are counted."""

    shape: tuple[Any, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Format(ABC):
    """A storage format: how a tensor becomes two buffers, `qdata` and `scale`, and these become a tensor again.

    A format has no state. To add one, write a subclass, add it to `FORMATS` and its name to `config.Quantize`.

    Attributes:
        name: what `quantize=` calls it.
        bits: of one value, without its share of a scale.
        error: about the relative error that rounding its factors adds to a decomposition.
        integers: whether `qdata` are int8 steps of `scale` (of 2⁻⁷ without one), which kernels multiply as they are.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    error: ClassVar[float]
    integers: ClassVar[bool] = False

    @property
    def coarse(self) -> bool:
        """Whether values have so few bits that solvers fit the rest of a layer to their rounding."""
        return self.bits <= 8

    @abstractmethod
    def buffers(self, shape: Sequence[Any], layout: Layout) -> tuple[Buffer, Buffer | None]:
        """What `qdata` and `scale` are for a tensor of this shape; None where there are no scales."""

    @abstractmethod
    def _encode(self, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """`qdata` and `scale` of float32 values: contiguous, finite and not empty."""

    @abstractmethod
    def decode(self, stored: "QuantizedTensor", rows: slice, dtype: torch.dtype) -> Tensor:
        """A slice of the tensor along its first axis, computed in float32 or wider and rounded once, to `dtype`."""

    def encode(self, tensor: Tensor, layout: Layout) -> "QuantizedTensor":
        """Store a floating tensor.

        Raises: CompressionError where it is not floating or not finite, or its values leave the format's range.
        """
        if not tensor.is_floating_point():
            raise CompressionError(f"`tensor` should be floating. Found {tensor.dtype}.")
        if tensor.numel() == 0:
            return self.zeros(tensor.shape, layout, tensor.device)
        # contiguous: a tensor that is read from a file has to have the same layout, or BLAS rounds otherwise
        values = tensor.detach().to(torch.float32).contiguous()
        if not all(math.isfinite(float(end)) for end in values.aminmax()):  # without a copy of the tensor
            raise CompressionError("`tensor` should be finite in float32 to be stored. Found NaN or infinity.")
        return QuantizedTensor(self, layout, tensor.shape, *self._encode(values, layout))

    def zeros(
        self, shape: Sequence[int], layout: Layout, device: torch.device | str | None = None
    ) -> "QuantizedTensor":
        """A stored tensor of zeros."""
        buffers = [buffer for buffer in self.buffers(shape, layout) if buffer is not None]
        zeros = (torch.zeros(buffer.shape, dtype=buffer.dtype, device=device) for buffer in buffers)
        return QuantizedTensor(self, layout, shape, *zeros)

    def round_to(self, tensor: Tensor, layout: Layout) -> Tensor:
        """The values that a layer would store of a tensor, in float64."""
        return self.encode(tensor, layout).decode(torch.float64)

    def nbytes(self, shape: Sequence[Any], layout: Layout) -> Any:
        """Bytes of a stored tensor, scales included; the sizes may be broadcast tensors."""
        return sum(math.prod(b.shape) * b.dtype.itemsize for b in self.buffers(shape, layout) if b is not None)

    def peaks(self, stored: "QuantizedTensor", rows: slice, dtype: torch.dtype = torch.float64) -> Tensor | None:
        """The largest magnitude that each value of a slice can have with its scale.

        None where errors of rounding are not fed back from value to value, for which `nearest` is needed too.
        """
        return None

    def nearest(self, values: Tensor, peaks: Tensor) -> Tensor:
        """The values that can be stored and are nearest, for given `peaks`; in their dtype."""
        raise NotImplementedError(f"Errors of {self.name} are not fed back.")

    def reason_against_bitsandbytes(self, stored: "QuantizedTensor") -> str | None:
        """Why `decode_by_bitsandbytes` is not for this tensor, or None."""
        return f"bitsandbytes is used for nf4, and {self.name} is decoded by torch alone"

    def decode_by_bitsandbytes(self, stored: "QuantizedTensor", rows: slice, dtype: torch.dtype) -> Tensor:
        """The same values as `decode`, from kernels of bitsandbytes."""
        raise NotImplementedError(f"bitsandbytes has no kernels for {self.name}.")


class FixedBuffers(nn.Module):
    """A module whose own buffers keep their dtypes and values where a parent is moved to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # .half() on the parent would round scales for good, and .type(dtype) also convert integers
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(device=buffer.device)
        return self


class QuantizedTensor(FixedBuffers):
    """A tensor in a storage format, as the buffers `qdata` and `scale`; `scale` is None where the format has none.

    A module, not a tensor subclass, so that `.to(device)`, deepcopy, `state_dict` and safetensors just work. Moving the
    parent to another floating dtype leaves both buffers as they are.

    Attributes:
        format: the storage format.
        layout: what the tensor is in its layer; see `Layout`.
        shape: of the tensor that is stored.
        dtype: of the network that the layer is in, for code that asks a weight for it; it follows `.to(dtype)`.
        backend: which code decodes it: "torch", or "bitsandbytes" after `use_bitsandbytes`.

    Raises: CompressionError for buffers of other shapes or dtypes than the format has.
    """

    qdata: Tensor
    scale: Tensor | None
    dtype: torch.dtype = torch.float32
    backend: Literal["torch", "bitsandbytes"]

    def __init__(
        self, format: Format, layout: Layout, shape: Sequence[int], qdata: Tensor, scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.format, self.layout, self.shape = format, layout, torch.Size(shape)
        expected = dict(zip(("qdata", "scale"), format.buffers(shape, layout), strict=True))
        for name, tensor in (("qdata", qdata), ("scale", scale)):
            found = None if tensor is None else Buffer(tuple(tensor.shape), tensor.dtype)
            if found != expected[name]:
                what = f"`{name}` of {tuple(shape)} values in {format.name}"
                raise CompressionError(f"{what} should be {expected[name]}. Found {found}.")
            self.register_buffer(name, tensor)
        self.backend = "torch"

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in dir(Tensor):
                raise
            raise AttributeError(self._no_tensor(f"have `{name}`")) from error

    def __torch_function__(self, function: Any, *_: Any) -> Any:  # which torch calls for an argument that has it
        raise CompressionError(self._no_tensor(f"be given to `{function.__name__}`"))

    def _no_tensor(self, use: str) -> str:
        return (
            f"A weight should be a tensor to {use}. Found one that is stored in {self.format.name}: "
            "`layer.to_dense()` gives it as a tensor, and `compress_bilinear.dequantize` stores it as one."
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        return super()._apply(fn, recurse)

    def encode(self, tensor: Tensor) -> "QuantizedTensor":
        """Another tensor, in the same format and layout."""
        return self.format.encode(tensor, self.layout)

    def decode(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        """The stored tensor in `dtype`, or only a slice along its first axis; not to be changed in place.

        torch decodes where operators are recorded or transformed, and to dtypes that bitsandbytes does not.
        """
        # a forward on the instance is another's, accelerate's say, which brings offloaded buffers here for the call
        forward: Callable[..., Tensor] = self.forward if "forward" in self.__dict__ else self._decode
        return forward(dtype, rows)

    def _decode(self, dtype: torch.dtype, rows: slice) -> Tensor:
        if self.backend == "torch" or dtype not in _BITSANDBYTES_DTYPES or self.shape.numel() > _BITSANDBYTES_MOST:
            return self.format.decode(self, rows, dtype)
        decode = self.format.decode if is_traced_or_transformed() else self.format.decode_by_bitsandbytes
        return decode(self, rows, dtype)

    forward = _decode

    def use_bitsandbytes(self, use: bool) -> str | None:
        """Decode by bitsandbytes' kernels from now on, or no longer: to the same values, up to their dtype's last bit.

        Returns: the reason against it where there is one: then nothing changes.
        """
        reason = self.reason_against_bitsandbytes() if use else None
        if reason is None:
            self.backend = "bitsandbytes" if use else "torch"
        return reason

    def reason_against_bitsandbytes(self) -> str | None:
        """Why bitsandbytes does not decode this tensor on its device, or not rightly; None where it does.

        It is imported to try that on some of the tensor's own values, unless there is another reason.
        """
        reason = self.format.reason_against_bitsandbytes(self) or missing()
        if reason is not None:
            return reason
        size = self.shape[0]
        first = max(1, min(size, _COMPARED * size // max(1, self.shape.numel())))
        for rows in (slice(0, first), slice(max(0, size - 1), size)):
            for dtype in _BITSANDBYTES_DTYPES:
                exact = self.format.decode(self, rows, dtype)
                try:
                    found = self.format.decode_by_bitsandbytes(self, rows, dtype)
                except Exception as error:  # whatever it raises where it does not fit the machine
                    return f"bitsandbytes cannot decode it: {brief(error)}"
                numbers = torch.finfo(dtype)
                if not torch.allclose(found, exact, rtol=numbers.eps, atol=numbers.eps * numbers.tiny):  # one step
                    return f"bitsandbytes decodes it wrongly to {dtype}"
        return None

    def extra_repr(self) -> str:
        scales = "none" if self.scale is None else tuple(self.scale.shape)
        return f"{self.format.name}, shape={tuple(self.shape)}, scales={scales}"
