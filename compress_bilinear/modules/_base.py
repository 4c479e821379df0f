"""What the layers of all methods share: the contract of `nn.Bilinear`, its checks, and pairs, blocks and indices."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from .. import ops
from ..config import Quantize, check_quantize
from ..errors import CompressionError, InputError
from ..quantization import FORMATS
from ._compute import ComputeModes


class CompressedBilinear(ComputeModes):
    """A drop-in replacement of `nn.Bilinear`: the same attributes, inputs and outputs, and another storage.

    Attributes:
        in1_features, in2_features, out_features: I, J and O.
        quantize: the storage format, None for floating point.
        compute: how a quantized layer computes; see `set_compute`.
        method: "dense", "cp" or "tucker".
    """

    def __init__(self, in1_features: int, in2_features: int, out_features: int, quantize: Quantize | None) -> None:
        check_quantize(quantize)
        super().__init__(quantize)
        sizes = {"in1_features": in1_features, "in2_features": in2_features, "out_features": out_features}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise CompressionError(f"`{name}` should be a positive int. Found {size!r}.")
        self.in1_features = in1_features
        self.in2_features = in2_features
        self.out_features = out_features

    @property
    def rank(self) -> int | tuple[int, int, int] | None:
        """R of a CP layer, (R_o, R_i, R_j) of a Tucker layer, None for a dense one."""
        return None

    @property
    @abstractmethod
    def flops_per_row(self) -> int:
        """FLOPs of the forward for one row, multiply-add counted as 2."""

    @abstractmethod
    def dense_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """W[rows], a slice (·, I, J) of the weight that the layer stands for, computed in `dtype`."""

    @abstractmethod
    def set_bias(self, bias: nn.Parameter | None) -> None:
        """Use this Parameter (O,) itself, or none. What it is tied to stays tied."""

    @abstractmethod
    def _forward(self, input1: Tensor, input2: Tensor) -> Tensor: ...

    @abstractmethod
    def _pairwise(self, input1: Tensor, input2: Tensor) -> Tensor: ...

    @abstractmethod
    def _blockwise(self, input1: Tensor, input2: Tensor) -> Tensor: ...

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (O, I, J) that the layer stands for; differentiable in the stored factors.

        Args:
            dtype: of the result and of its computation. None takes the layer's own, float32 if it is quantized.
        """
        return self.dense_rows(slice(None), dtype or self.weight_dtype)

    def forward(
        self,
        input1: Tensor,  # (..., I)
        input2: Tensor,  # (..., J), the same leading dimensions
    ) -> Tensor:  # (..., O)
        """y_o = x1ᵀ W_o x2 + b_o.

        Raises: InputError for other sizes, leading dimensions or dtypes, where `nn.Bilinear` raises RuntimeError.
        """
        self._check(input1, input2)
        return self._forward(input1, input2)

    def pairwise(
        self,
        input1: Tensor,  # (..., L1, I)
        input2: Tensor,  # (..., L2, J), the same dimensions before L2
    ) -> Tensor:  # (..., L1, L2, O)
        """All pairs: output[..., k, l, :] is `forward(input1[..., k, :], input2[..., l, :])`.

        Neither input is expanded over the pairs.

        Raises: InputError for inputs of less than two dimensions, other sizes, or other dtypes.
        """
        self._check(input1, input2, 2)
        return self._pairwise(input1, input2)

    def explain(
        self,
        rows: int = 1024,
        *,
        pairs: bool = False,
        gradient: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Which path a call takes, and why. Nothing is computed.

        Args:
            rows: N of the call, or the number of its pairs.
            pairs: whether the call is of `pairwise`.
            gradient: whether a gradient is wanted.
            device, dtype: of the inputs; None takes the layer's.
        """
        tensor, dtype = next(iter([*self.parameters(), *self.buffers()])), dtype or self.weight_dtype
        choice = ops.explain(
            self.method,
            (self.out_features, self.in1_features, self.in2_features),
            rows,
            torch.device(device or tensor.device),
            dtype,
            8 if self.quantize else 8 * dtype.itemsize,
            pairs=pairs,
            gradient=gradient,
            reason_against=self._reason_against_kernels(),
        )
        return str(choice)

    def _reason_against_kernels(self) -> str | None:
        """Why no fused kernel can run the layer, whatever the inputs are."""
        if self.quantize is None or FORMATS[self.quantize].integers:
            return None
        return f"the fused kernels read int8, not {self.quantize}"

    def blockwise(
        self,
        input1: Tensor,  # (..., K, I / K)
        input2: Tensor,  # (..., K, J)
    ) -> Tensor:  # (..., O)
        """A sum of K bilinear forms, whose weights (O, I / K, J) are the blocks of W along its in1 axis.

        y_o = Σ_k x1_kᵀ W_ok x2_k + b_o. A grouped bilinear classifier computes this. It takes the FLOPs of the blocks.

        Raises: InputError for inputs of less than two dimensions, other sizes, or other dtypes.
        """
        if input1.dim() < 2 or input1.shape[:-1] != input2.shape[:-1] or input1.shape[-2] == 0:
            raise InputError(
                "`input1` and `input2` should be (..., K, I / K) and (..., K, J) with the same leading dimensions and "
                f"K at least 1. Found {tuple(input1.shape)} and {tuple(input2.shape)}."
            )
        self._check(input1.flatten(-2), input2.select(-2, 0))
        return self._blockwise(input1, input2)

    def indexed(
        self,
        input1: Tensor,  # (..., I)
        index: Tensor,  # (...), integers in 0..J − 1
    ) -> Tensor:  # (..., O)
        """y_o = Σ_i x1_i W_oij + b_o for j = `index`: `forward` with a one-hot `input2`, for relations or labels.

        Raises: InputError for other sizes, leading dimensions or dtypes.
        """
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise InputError(f"`index` should hold integers. Found {index.dtype}.")
        if index.shape != input1.shape[:-1]:
            raise InputError(
                "`input1` should be (..., I) and `index` (...), the same leading dimensions. "
                f"Found {tuple(input1.shape)} and {tuple(index.shape)}."
            )
        self._check(input1, input1.new_empty(self.in2_features).expand(*index.shape, -1))
        return self._indexed(input1, index)

    def _indexed(self, input1: Tensor, index: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(index.long(), self.in2_features)
        return self._forward(input1, one_hot.to(input1.dtype))

    def _check(self, input1: Tensor, input2: Tensor, last: int = 1) -> None:
        """Raise InputError for other inputs than the layer takes; all dimensions but the `last` should be the same."""
        weight = self._first_weight()
        shape = (self.out_features, self.in1_features, self.in2_features)
        ops.check_inputs(input1, input2, shape, last, None if weight is None else weight.dtype)

    @abstractmethod
    def _first_weight(self) -> Tensor | None:
        """The floating weight whose dtype the inputs should have; None if they may have any."""

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the stored weight, float32 if it is quantized."""
        weight = self._first_weight()
        return torch.float32 if weight is None else weight.dtype

    def extra_repr(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        stored = "" if self.quantize is None else f", quantize={self.quantize!r}"
        sizes = f"in1_features={self.in1_features}, in2_features={self.in2_features}, out_features={self.out_features}"
        return f"{sizes}{rank}, bias={self.bias is not None}{stored}"


def block_rows(
    input1: Tensor,  # (..., K, I / K)
) -> Tensor:  # (..., K, I)
    """Each block in a row of zeros, at its place in the whole row."""
    count, size = input1.shape[-2:]
    rows = input1.new_zeros(*input1.shape[:-1], count, size)
    return rows.diagonal_scatter(input1.mT, dim1=-3, dim2=-2).flatten(-2)
