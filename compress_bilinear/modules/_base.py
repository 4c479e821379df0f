"""What the three modules share: `nn.Bilinear`'s contract, its checks, and pairwise scoring."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config import Quantize
from ..errors import CompressionError, InputError
from ..quantization import FORMATS
from ._autocast import autocast_enabled
from ._compute import ComputeModes


class CompressedBilinear(ComputeModes):
    """A drop-in for `nn.Bilinear`: same attributes, same inputs and outputs, other storage.

    Attributes:
        in1_features, in2_features, out_features: I, J and O.
        quantize: None, "bf16", "int8" or "nf4".
        compute: how a quantized layer computes; see `set_compute`.
        method: "dense", "cp" or "tucker".
    """

    def __init__(self, in1_features: int, in2_features: int, out_features: int, quantize: Quantize | None) -> None:
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
        """R of a CP, (R_o, R_i, R_j) of a Tucker decomposition, None for a dense layer."""
        return None

    @property
    @abstractmethod
    def flops_per_row(self) -> int:
        """FLOPs of the forward for one row, multiply-add counted as 2."""

    @abstractmethod
    def dense_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """The slice W[rows] of the weight (·, I, J) that the layer stands for, computed in `dtype`."""

    @abstractmethod
    def set_bias(self, bias: nn.Parameter | None) -> None:
        """Use this very Parameter (O,), or none; what is tied to it stays tied."""

    def _bare(self, input1: Tensor, input2: Tensor) -> Tensor | None:
        """The forward on a CPU without the checks that would cost more than the sums of a few rows; None where needed.

        It may raise what torch raises for inputs that do not fit.
        """
        return None

    @abstractmethod
    def _forward(self, input1: Tensor, input2: Tensor) -> Tensor: ...

    @abstractmethod
    def _pairwise(self, input1: Tensor, input2: Tensor) -> Tensor: ...

    @abstractmethod
    def _blockwise(self, input1: Tensor, input2: Tensor) -> Tensor: ...

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (O, I, J) that the layer stands for; differentiable in the stored factors.

        Args:
            dtype: of the result and of its computation. None takes the layer's own, float32 for int8.
        """
        return self.dense_rows(slice(None), dtype or self.weight_dtype)

    def forward(
        self,
        input1: Tensor,  # (..., I)
        input2: Tensor,  # (..., J), the same leading dimensions
    ) -> Tensor:  # (..., O)
        """y_o = x1ᵀ W_o x2 + b_o.

        Raises: InputError where `nn.Bilinear` would raise: other sizes, other leading dimensions, other dtypes.
        """
        if input1.is_cpu and not torch.compiler.is_compiling():
            try:
                output = self._bare(input1, input2)
            except (RuntimeError, IndexError, InputError):  # what is wrong with the inputs is found and said below
                output = None
            if output is not None:
                return output
        self._check(input1, input2)
        if input1.shape[:-1] != input2.shape[:-1]:
            raise InputError(
                "`input1` and `input2` should have the same leading dimensions. "
                f"Found {tuple(input1.shape)} and {tuple(input2.shape)}."
            )
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
        self._check(input1, input2)
        if input1.dim() < 2 or input2.dim() < 2 or input1.shape[:-2] != input2.shape[:-2]:
            raise InputError(
                "`input1` and `input2` should be (..., L1, I) and (..., L2, J) with the same leading dimensions. "
                f"Found {tuple(input1.shape)} and {tuple(input2.shape)}."
            )
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
        """Which path a call takes, and why; nothing is computed.

        Args:
            rows: N of the call, or its pairs.
            pairs: whether of `pairwise`.
            gradient: whether a gradient is wanted.
            device, dtype: of the inputs; None takes the layer's.
        """
        tensors = [*self.parameters(), *self.buffers()]
        where = tensors[0].device if device is None else torch.device(device)
        reason = self._obstacle(where, pairs)
        rank = self.rank if isinstance(self.rank, tuple) else () if self.rank is None else (self.rank,)
        shape = (self.out_features, self.in1_features, self.in2_features)
        of = dtype or self.weight_dtype
        bits = 8 * of.itemsize if self.quantize is None else max(8, FORMATS[self.quantize].bits)
        return str(
            ops.explain(
                self.method, shape, rank, rows, where, of, bits, pairs=pairs, gradient=gradient, reason_against=reason
            )
        )

    def _obstacle(self, device: torch.device, pairs: bool = False) -> str | None:
        """Why the layer's tensors cannot be handed to `ops` at once."""
        return None

    def blockwise(
        self,
        input1: Tensor,  # (..., K, I / K)
        input2: Tensor,  # (..., K, J)
    ) -> Tensor:  # (..., O)
        """A sum of K bilinear forms, whose weights (O, I / K, J) are the blocks of W along its in1 axis.

        y_o = Σ_k x1_kᵀ W_ok x2_k + b_o: what a grouped bilinear classifier computes, in the FLOPs of its blocks alone.

        Raises: InputError for inputs of less than two dimensions, other sizes, or other dtypes.
        """
        if input1.dim() < 2 or input1.shape[:-1] != input2.shape[:-1] or input1.shape[-2] == 0:
            raise InputError(
                "`input1` and `input2` should be (..., K, I / K) and (..., K, J) with the same leading dimensions and "
                f"K at least 1. Found {tuple(input1.shape)} and {tuple(input2.shape)}."
            )
        self._check(input1.flatten(-2), input2)
        return self._blockwise(input1, input2)

    def indexed(
        self,
        input1: Tensor,  # (..., I)
        index: Tensor,  # (...), integers in 0..J − 1
    ) -> Tensor:  # (..., O)
        """y_o = Σ_i x1_i W_oij + b_o for j = `index`: `forward` with a one-hot `input2`, as of relations or labels.

        Raises: InputError for other sizes, leading dimensions or dtypes.
        """
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise InputError(f"`index` should hold integers. Found {index.dtype}.")
        if index.shape != input1.shape[:-1]:
            raise InputError(
                "`input1` should be (..., I) and `index` (...), the same leading dimensions. "
                f"Found {tuple(input1.shape)} and {tuple(index.shape)}."
            )
        self._check(input1, input1.new_empty(self.in2_features))
        return self._indexed(input1, index)

    def _indexed(self, input1: Tensor, index: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(index.long(), self.in2_features)
        return self._forward(input1, one_hot.to(input1.dtype))

    def _check(self, input1: Tensor, input2: Tensor) -> None:
        for name, value, size in (("input1", input1, self.in1_features), ("input2", input2, self.in2_features)):
            if value.dim() < 1 or value.shape[-1] != size:
                raise InputError(f"`{name}` should have shape (..., {size}). Found {tuple(value.shape)}.")
        if input1.dtype != input2.dtype and not autocast_enabled(input1.device.type):
            raise InputError(
                f"`input1` and `input2` should have the same dtype. Found {input1.dtype} and {input2.dtype}."
            )
        if not input1.is_floating_point() or not input2.is_floating_point():
            raise InputError(f"`input1` and `input2` should be floating. Found {input1.dtype} and {input2.dtype}.")
        weight = self._first_weight()
        if weight is not None and weight.dtype != input1.dtype and not autocast_enabled(input1.device.type):
            raise InputError(f"`input1` and `input2` should be {weight.dtype}, as the weight is. Found {input1.dtype}.")

    @abstractmethod
    def _first_weight(self) -> Tensor | None:
        """The floating weight whose dtype the inputs should have, None where any will do."""

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the stored weight, float32 for int8; wrapped inner layers are looked through."""
        if self.quantize is None:
            for name, parameter in self.named_parameters():
                if name.endswith("weight") and parameter.is_floating_point():
                    return parameter.dtype
        return torch.float32

    def extra_repr(self) -> str:
        parts = [f"in1_features={self.in1_features}, in2_features={self.in2_features}"]
        parts.append(f"out_features={self.out_features}")
        if self.rank is not None:
            parts.append(f"rank={self.rank}")
        parts.append(f"bias={self.bias is not None}")
        if self.quantize is not None:
            parts.append(f"quantize={self.quantize!r}")
        return ", ".join(parts)


def block_rows(
    input1: Tensor,  # (..., K, I / K)
) -> Tensor:  # (..., K, I)
    """Each block by itself in a row of zeros, where it was in the whole."""
    count, size = input1.shape[-2:]
    rows = input1.new_zeros(*input1.shape[:-1], count, size)
    return rows.diagonal_scatter(input1.mT, dim1=-3, dim2=-2).flatten(-2)


class ProjectedBilinear(CompressedBilinear):
    """A small product between linear layers: what CP and Tucker have in common.

    Attributes:
        in1_proj, in2_proj, out_proj: linear layers (without, without and with the bias), ordinary ones but for a
            Tucker mode of rank near its size: see `InterpolativeLinear`; at full rank, the identity.
    """

    in1_proj: nn.Module
    in2_proj: nn.Module
    out_proj: nn.Module

    @property
    def weight(self) -> Tensor:
        """The weight (O, I, J) that the layer stands for, computed anew at each access (`to_dense()`)."""
        return self.to_dense()

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (O,) of `out_proj`."""
        bias: nn.Parameter | None = getattr(self.out_proj, "bias", None)
        return bias

    def _first_weight(self) -> Tensor | None:
        weight = getattr(self.in1_proj, "weight", None)
        return weight if isinstance(weight, Tensor) and weight.is_floating_point() else None

    def set_bias(self, bias: nn.Parameter | None) -> None:
        self.out_proj.register_parameter("bias", bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"`{name}` of a {type(self).__name__} is computed from its parts: set out_proj.bias, or the weights of "
                "in1_proj, in2_proj and out_proj."
            )
        super().__setattr__(name, value)
