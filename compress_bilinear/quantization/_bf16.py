"""bfloat16 values for layers that compute in another dtype: float32's range in half its bytes, without scales."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import CompressionError
from ._int8 import Backend, checked
from ._tensor import QuantizedTensor


class BF16Tensor(QuantizedTensor):
    """A tensor stored as the buffer `qdata` (bfloat16), whose dtype stays when the parent's changes."""

    def _check(self, qdata: Tensor, scale: Tensor | None) -> None:
        if qdata.dtype != torch.bfloat16 or scale is not None:
            raise CompressionError(f"`qdata` should be bfloat16, without scales. Found {qdata.dtype}.")

    @classmethod
    def coded(cls, tensor: Tensor) -> Self:
        """Round `tensor`. Raises: CompressionError where it is not finite, or leaves the range."""
        values = checked(tensor).to(torch.bfloat16)
        if not bool(torch.isfinite(values).all()):
            raise CompressionError("`tensor` should be within bfloat16's range. Found values beyond.")
        return cls(values)

    @classmethod
    def zeros(cls, shape: Sequence[int], device: torch.device | str | None = None) -> Self:
        """A tensor of zeros."""
        return cls(torch.zeros(tuple(shape), dtype=torch.bfloat16, device=device))

    def requantized(self, tensor: Tensor) -> "BF16Tensor":
        """Another tensor of the same shape, in the same layout."""
        return BF16Tensor.coded(tensor)

    def _decoded(self, rows: slice, dtype: torch.dtype, by: Backend) -> Tensor:
        return self.qdata[rows].to(dtype)

    def _unfit_for_bitsandbytes(self) -> str | None:
        return "its values are not coded"

    def extra_repr(self) -> str:
        return f"bf16, shape={tuple(self.shape)}"
