"""Linear layers: in a storage format, with an identity in the matrix, and the bias alone."""

from typing import cast

import torch
from torch import Tensor, nn

from .. import ops
from ..config import Quantize
from ..quantization import FORMATS, FixedBuffers, Layout, QuantizedTensor


class QuantizedLinear(FixedBuffers):
    """`nn.Linear` with its weight in 16, 8 or 4 bits. Each call decodes it to the input's dtype, slab by slab.

    Besides input and output, a forward holds one decoded slab of at most 2²⁰ values (or one row). A backward decodes
    the slabs again, one by one.

    Attributes:
        weight: a `QuantizedTensor` of shape (out_features, in_features).
        sigma: (in_features,) float32, by which the input is multiplied first, in float32 or wider; or None.
        bias: (out_features,) in floating point, or None.
        integer_rows: the rows of an input from which they are rounded to int8 too, and integers multiplied, 0 for
            never: see `set_compute`.
    """

    bias: nn.Parameter | None
    sigma: Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.integer_rows = 0
        self.register_buffer("sigma", None)
        self.register_parameter("bias", bias)

    @property
    def takes_int8(self) -> bool:
        """Whether `integer_rows` may be set: the weight is int8 and has no scales of its own."""
        return self.weight.format.integers and self.weight.scale is None

    def forward(
        self,
        input: Tensor,  # (..., in_features)
    ) -> Tensor:  # (..., out_features)
        """The product, computed in the input's dtype, or autocast's."""
        device = input.device.type
        dtype = ops.autocast_dtype(device, input) or input.dtype
        with ops.without_autocast(device):
            if self.sigma is not None:
                input = input.to(torch.promote_types(input.dtype, torch.float32)) * self.sigma
            integers = self.integer_rows and ops.has_rows(input.shape[:-1], self.integer_rows)
            return (ops.int8_linear if integers else ops.project)(input.to(dtype), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def make_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    quantize: Quantize | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    layout: Layout = "factor",
) -> nn.Module:
    """An `nn.Linear`, or a zeroed `QuantizedLinear` without `sigma`, whose matrix has this layout."""
    if quantize is None:
        return nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
    weight = FORMATS[quantize].zeros((out_features, in_features), layout, device)
    return QuantizedLinear(weight, zero_bias(out_features, bias, device, dtype))


def zero_bias(
    size: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if bias else None


def fill_linear(linear: nn.Module, weight: Tensor) -> None:
    """Store a weight (out_features, in_features), in the layer's format."""
    if isinstance(linear, QuantizedLinear):
        linear.weight = linear.weight.encode(weight)
    else:
        # a new Parameter, which shares no memory with the decomposition
        linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))


def linear_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (out_features, in_features) of a linear layer, times `sigma`. The layer may be wrapped."""
    if isinstance(linear, InterpolativeLinear):
        return linear.dense(dtype)
    weight, sigma = linear.weight, getattr(linear, "sigma", None)
    if not isinstance(weight, QuantizedTensor):
        return cast(Tensor, weight).to(dtype)
    if not isinstance(sigma, Tensor):
        return weight.decode(dtype)
    return (weight.decode(torch.promote_types(dtype, torch.float32)) * sigma).to(dtype)


class AddBias(nn.Module):
    """The rest of an output projection that has been absorbed into the core: the bias (O,), or nothing."""

    weight = None
    bias: nn.Parameter | None

    def __init__(
        self, size: int, bias: bool, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.register_parameter("bias", zero_bias(size, bias, device, dtype))

    def forward(self, input: Tensor) -> Tensor:
        """The input (..., O) plus the bias, in the input's dtype."""
        return input if self.bias is None else input + self.bias.to(input.dtype)


class InterpolativeLinear(FixedBuffers):
    """A linear map between d and r < d dimensions whose matrix contains an identity: r of the d are copied.

    Narrowing, y = x[kept] + F x[others]; widening, y[kept] = x and y[others] = F x. r (d − r) weights instead of r d.

    Attributes:
        index: (d,), int32. Narrowing: the kept inputs, then the others. Widening: the place of each output among these.
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
        ends = (rank, size - rank) if self.widening else (size - rank, rank)
        # one scale for each of the others, of which there are fewer than of the kept
        self.rest = make_linear(*ends, False, quantize, device, dtype, "rows" if self.widening else "columns")
        self.register_parameter("bias", zero_bias(out_features, bias, device, dtype))

    @property
    def widening(self) -> bool:
        """Whether the output is the side of d dimensions."""
        return self.out_features > self.in_features

    def fill(
        self,
        order: Tensor,  # (d,)
        coefficients: Tensor,  # (d − r, r)
    ) -> None:
        """Store the matrix (d, r) whose rows `order` are [I; F], or its transpose, as `interpolation` gives it."""
        self.index = (order.argsort() if self.widening else order).to(torch.int32)
        fill_linear(self.rest, coefficients if self.widening else coefficients.T)

    def forward(
        self,
        input: Tensor,  # (..., in_features)
    ) -> Tensor:  # (..., out_features)
        if self.widening:
            output = torch.cat([input, self.rest(input).to(input.dtype)], dim=-1).index_select(-1, self.index)
            return ops.plus(output, self.bias)
        ordered = input.index_select(-1, self.index)
        kept, others = ordered.split([self.out_features, self.in_features - self.out_features], dim=-1)
        return ops.plus(kept + self.rest(others), self.bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix (out_features, in_features), differentiable in what is stored."""
        weight = linear_weight(self.rest, dtype)
        index = self.index.to(weight.device)  # raises where it is offloaded: `index_select` would read any memory
        identity = torch.eye(min(self.in_features, self.out_features), dtype=dtype, device=weight.device)
        if self.widening:
            return torch.cat([identity, weight]).index_select(0, index)
        return torch.cat([identity, weight], dim=1).index_select(1, index.argsort())

    extra_repr = QuantizedLinear.extra_repr
