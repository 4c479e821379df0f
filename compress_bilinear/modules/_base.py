"""What the layers of all methods share: the contract of `nn.Bilinear`, pairs, blocks, indices, and compute modes."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import ops
from ..config import Compute, Quantize, check_quantize
from ..errors import CompressionError, ConfigError, InputError
from ..quantization import FORMATS, QuantizedTensor, missing


class CompressedBilinear(nn.Module):
    """A drop-in replacement of `nn.Bilinear`: the same attributes, inputs and outputs, and another storage.

    Attributes:
        in1_features, in2_features, out_features: I, J and O.
        quantize: the storage format, None for floating point.
        compute: how a quantized layer computes; see `set_compute`.
        compute_rows: the rows of a call, or pairs, from which it computes so; fewer are computed on the fly.
        method: "dense", "cp" or "tucker".
    """

    method: ClassVar[str]
    compute_rows: int = 1

    def __init__(self, in1_features: int, in2_features: int, out_features: int, quantize: Quantize | None) -> None:
        check_quantize(quantize)
        super().__init__()
        sizes = {"in1_features": in1_features, "in2_features": in2_features, "out_features": out_features}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise CompressionError(f"`{name}` should be a positive int. Found {size!r}.")
        self.quantize = quantize
        self.compute: Compute = "on_the_fly"
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

    def reset_parameters(self) -> None:
        """Raises: CompressionError. There are no initial values: weights are those of the layer that was replaced."""
        raise CompressionError(
            f"A {type(self).__name__} should keep its weights, which stand for those of a trained layer. Found a call "
            "of `reset_parameters`: initialise the network before it is compressed."
        )

    def __prepare_scriptable__(self) -> Self:  # which torch.jit.script calls of each module
        raise CompressionError(
            f"`torch.jit.script` should be given a model of plain layers. Found a {type(self).__name__}, whose paths "
            "are chosen in Python: use torch.export or torch.jit.trace."
        )

    @abstractmethod
    def _forward(self, input1: Tensor, input2: Tensor) -> Tensor: ...

    @abstractmethod
    def _pairwise(self, input1: Tensor, input2: Tensor) -> Tensor: ...

    @abstractmethod
    def _pairwise_sum(self, input1: Tensor, input2: Tensor) -> Tensor: ...

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
        if self.compute != "bfloat16":
            return self._forward(input1, input2)
        return self._in_bfloat16(self._forward, input1, input2, input1.shape[:-1])

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
        if self.compute != "bfloat16":
            return self._pairwise(input1, input2)
        return self._in_bfloat16(self._pairwise, input1, input2, (*input1.shape[:-1], input2.shape[-2]))

    def _in_bfloat16(
        self, operation: Callable[[Tensor, Tensor], Tensor], input1: Tensor, input2: Tensor, leading: Sequence[int]
    ) -> Tensor:
        """The operation on inputs in bfloat16, its outputs in their dtype; as it is under autocast, or for few rows."""
        mixed = ops.autocast_dtype(input1.device.type, input1) is not None
        if mixed or not ops.has_rows(leading, self.compute_rows):
            return operation(input1, input2)
        return operation(input1.bfloat16(), input2.bfloat16()).to(input1.dtype)

    def pairwise_sum(
        self,
        input1: Tensor,  # (..., S, L1, I)
        input2: Tensor,  # (..., S, L2, J), the same dimensions before L2
    ) -> Tensor:  # (..., L1, L2, O)
        """All pairs of sums of products: y[..., k, l, :] = W (Σ_s x1[..., s, k, :] ⊗ x2[..., s, l, :]) + b.

        The sum over S is inside, where it is short: a CP holds L1·L2·R numbers of it, and others L1·L2 products of the
        sizes of their core or weight. An outer product mean computes this (Jumper et al., "Highly accurate protein
        structure prediction with AlphaFold", 2021).

        Raises: InputError for inputs of less than three dimensions, other sizes, or other dtypes.
        """
        if input1.dim() < 3:
            raise InputError(f"`input1` should be (..., S, L1, I). Found {tuple(input1.shape)}.")
        self._check(input1, input2, 2)
        return self._pairwise_sum(input1, input2)

    def explain(
        self,
        rows: int = 1024,
        *,
        pairs: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Which path a call takes, and why. Nothing is computed.

        Args:
            rows: N of the call, or the number of its pairs.
            pairs: whether the call is of `pairwise`.
            device, dtype: of the inputs; None takes the layer's.
        """
        tensor, dtype = next(iter([*self.parameters(), *self.buffers()])), dtype or self.weight_dtype
        device, reason = torch.device(device or tensor.device), self._reason_against_kernels()
        return ops.explain(self.method, device, dtype, rows=rows, pairs=pairs, reason_against=reason)

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

    @property
    def computes(self) -> tuple[Compute, ...]:
        """The modes that `set_compute` takes."""
        return tuple(mode for mode in get_args(Compute) if self.refused_compute(mode) is None)

    def refused_compute(self, compute: str) -> str | None:
        """The reason why `set_compute` does not take a mode, or None where it does.

        bitsandbytes is imported if the layer's format and device allow it, and tried on the layer's values.
        """
        if self.quantize is None:
            return "the layer is in floating point"
        if compute not in get_args(Compute):
            gone = "`compress_bilinear.dequantize` stores the weights in floating point instead"
            return gone if compute == "resident" else "there is no such mode"
        if compute == "bitsandbytes":
            reasons = [part.reason_against_bitsandbytes() for part in self._stored()]
            return None if None in reasons else "; ".join(dict.fromkeys(filter(None, reasons)))
        linear = (part for part in self.modules() if part is self or not isinstance(part, CompressedBilinear))
        if compute != "int8" or any(getattr(part, "takes_int8", False) for part in linear):
            return None
        if not FORMATS[self.quantize].integers:
            bits = FORMATS[self.quantize].bits
            return f"its values have {bits} bits, in {self.quantize}, and only int8 is multiplied as integers"
        return "none of its projections is in int8 without scales of its own"

    def set_compute(self, compute: Compute, rows: int = 1) -> None:
        """Choose how a quantized layer computes. It is no part of its `state_dict`; `compress_bilinear.save` keeps it.

        Args:
            compute: "on_the_fly" decodes the weights slab by slab in each call. "bfloat16" does so in bfloat16, as
                autocast would, which many processors multiply two to three times as fast as float32; it changes the
                outputs by about 0.4% of their norm, and gives them in the inputs' dtype. "int8" rounds each row of
                the longer input of a dense layer, or of a CP's or Tucker's inputs and intermediates, to int8 and
                multiplies integers (`torch._int_mm`), which costs about 1%; a Tucker's core is computed on the fly.
                "bitsandbytes" is "on_the_fly" with its kernels, to the same values, for nf4. Compiled graphs and
                transforms of torch.func decode by torch. Where the layer moves to a device on which these kernels
                cannot be used, it warns and computes on the fly.
            rows: of a call, or its pairs, from which it computes so.

        Raises: ConfigError for another mode, an unquantized layer, or a mode that is refused: see `refused_compute`.
        """
        reason = self.refused_compute(compute)
        if reason is not None:
            raise ConfigError(
                f"`compute` should be one of {self.computes} for this {self.method} layer, quantize={self.quantize!r}. "
                f"Found {compute!r}: {reason}."
            )
        for part in self.modules():
            core = part is not self and isinstance(part, CompressedBilinear)  # which does not multiply integers
            if isinstance(part, QuantizedTensor):
                part.use_bitsandbytes(compute == "bitsandbytes")
            elif isinstance(part, CompressedBilinear):
                part.compute = "on_the_fly" if compute in ("bfloat16", "int8") and core else compute
                part.compute_rows = rows
            if hasattr(part, "takes_int8"):
                cast(Any, part).integer_rows = rows if compute == "int8" and part.takes_int8 and not core else 0

    def _stored(self) -> list[QuantizedTensor]:
        return [part for part in self.modules() if isinstance(part, QuantizedTensor)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.compute != "bitsandbytes":
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            return self
        devices = [part.device.type for part in self._stored()]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if devices != [part.device.type for part in self._stored()]:
            self._try_bitsandbytes()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call, unused-ignore]
        if self.compute == "bitsandbytes" and missing() is not None:  # it was pickled where there is one
            self._try_bitsandbytes()

    def _try_bitsandbytes(self) -> None:
        """Go on by bitsandbytes; where that is refused, warn and compute on the fly."""
        refused = self.refused_compute("bitsandbytes")
        self.set_compute("bitsandbytes" if refused is None else "on_the_fly")
        if refused is not None:
            warnings.warn(f"A layer computes on the fly from now on: {refused}.", stacklevel=3)

    def extra_repr(self) -> str:
        rank = "" if self.rank is None else f", rank={self.rank}"
        stored = "" if self.quantize is None else f", quantize={self.quantize!r}"
        sizes = f"in1_features={self.in1_features}, in2_features={self.in2_features}, out_features={self.out_features}"
        return f"{sizes}{rank}, bias={self.bias is not None}{stored}"


def has_other(method: str, module: nn.Module) -> bool:
    """Whether a method that was set on the instance, `forward` say, does more than its class's."""
    # accelerate leaves the class's own there when its hook is removed
    return method in vars(module) and vars(module)[method] != MethodType(getattr(type(module), method), module)


def block_rows(
    input1: Tensor,  # (..., K, I / K)
) -> Tensor:  # (..., K, I)
    """Each block in a row of zeros, at its place in the whole row."""
    count, size = input1.shape[-2:]
    rows = input1.new_zeros(*input1.shape[:-1], count, size)
    return rows.diagonal_scatter(input1.mT, dim1=-3, dim2=-2).flatten(-2)
