"""A linear layer, plain or stored in int8."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..config import Quantize
from ..quantization import QuantizedTensor


class QuantizedLinear(nn.Module):
    """`nn.Linear` with its weight in int8, de-quantized on the fly to the input's dtype.

    Attributes:
        weight: a `QuantizedTensor` of shape (out_features, in_features).
        bias: (out_features,) in floating point, or None.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(
        self,
        input: Tensor,  # (..., in_features)
    ) -> Tensor:  # (..., out_features)
        bias = self.bias if self.bias is None else self.bias.to(input.dtype)
        return torch.nn.functional.linear(input, self.weight.dequantize(input.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def make_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    quantize: Quantize | None,
    component: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """An `nn.Linear`, or a zeroed `QuantizedLinear` with one scale for each index of the axis `component`."""
    if quantize is None:
        return nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
    weight = QuantizedTensor.empty((out_features, in_features), dim=1 - component, device=device)
    return QuantizedLinear(weight, _zero_bias(out_features, bias, device, dtype))


def _zero_bias(
    size: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if bias else None


def fill_linear(linear: nn.Module, weight: Tensor, component: int) -> None:
    """Store a weight (out_features, in_features), quantizing it where the layer is quantized."""
    if isinstance(linear, QuantizedLinear):
        linear.weight = QuantizedTensor.quantize(weight, dim=1 - component)
    else:
        # a Parameter of its own, which shares no storage with the decomposition
        linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))


def linear_weight(linear: nn.Module) -> Callable[[torch.dtype], Tensor]:
    """How to read a (possibly wrapped) linear layer's weight in a given dtype."""
    if isinstance(linear, InterpolativeLinear):
        return linear.dense
    weight = linear.weight
    return weight.dequantize if isinstance(weight, QuantizedTensor) else weight.to  # type: ignore[return-value]


class AddBias(nn.Module):
    """What is left of an output projection that has been absorbed into the core: its bias (O,), or nothing."""

    bias: nn.Parameter | None

    def __init__(
        self, size: int, bias: bool, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.register_parameter("bias", _zero_bias(size, bias, device, dtype))

    def forward(self, input: Tensor) -> Tensor:
        """The input (..., O) plus the bias, in the input's dtype."""
        return input if self.bias is None else input + self.bias.to(input.dtype)


class InterpolativeLinear(nn.Module):
    """A linear map between d and r < d dimensions that takes r of the d as they are: its matrix holds an identity.

    Narrowing, y = x[kept] + F x[others]; widening, y[kept] = x and y[others] = F x. r (d − r) weights instead of r d.

    Attributes:
        index: (d,), int32. Narrowing, the kept inputs and then the others; widening, where each output is among these.
        rest: the linear map F of the others, plain or quantized.
        bias: (out_features,) in floating point, or None.

    Source: Cheng et al., "On the compression of low rank matrices" (2005), the interpolative decomposition.
    """

    bias: nn.Parameter | None
    index: Tensor
    rest: nn.Module

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        quantize: Quantize | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        size, rank = max(in_features, out_features), min(in_features, out_features)
        self.register_buffer("index", torch.arange(size, dtype=torch.int32, device=device))
        if self.widening:
            self.rest = make_linear(rank, size - rank, False, quantize, 1, device, dtype)
        else:
            self.rest = make_linear(size - rank, rank, False, quantize, 0, device, dtype)
        self.register_parameter("bias", _zero_bias(out_features, bias, device, dtype))

    @property
    def widening(self) -> bool:
        """Whether the output has the d dimensions."""
        return self.out_features > self.in_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.index
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.index.dtype != torch.int32:  # .type(dtype) on a parent converts integers too
            self.index = before.to(device=self.index.device)
        return self

    def fill(
        self,
        order: Tensor,  # (d,)
        coefficients: Tensor,  # (d − r, r)
    ) -> None:
        """Store the matrix (d, r) whose rows `order` are [I; F], or its transpose, as `interpolation` gives it."""
        self.index = (order.argsort() if self.widening else order).to(torch.int32)
        if self.widening:
            fill_linear(self.rest, coefficients, 1)
        else:
            fill_linear(self.rest, coefficients.T, 0)

    def forward(
        self,
        input: Tensor,  # (..., in_features)
    ) -> Tensor:  # (..., out_features)
        if self.widening:
            output = torch.cat([input, self.rest(input).to(input.dtype)], dim=-1).index_select(-1, self.index)
            return output if self.bias is None else output + self.bias.to(output.dtype)
        ordered = input.index_select(-1, self.index)
        kept, others = ordered.split([self.out_features, self.in_features - self.out_features], dim=-1)
        narrow = kept + self.rest(others)
        return narrow if self.bias is None else narrow + self.bias.to(narrow.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out_features, in_features), differentiable in what is stored."""
        weight = linear_weight(self.rest)(dtype)
        identity = torch.eye(min(self.in_features, self.out_features), dtype=dtype, device=weight.device)
        if self.widening:
            return torch.cat([identity, weight]).index_select(0, self.index)
        return torch.cat([identity, weight], dim=1).index_select(1, self.index.argsort())

    extra_repr = QuantizedLinear.extra_repr
