"""A linear layer, plain or stored in 16, 8 or 4 bits."""

import math
from collections.abc import Callable, Iterator
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import ops
from ..config import Quantize
from ..quantization import FORMATS, Layout, QuantizedTensor, restore_dtypes
from ._autocast import autocast_dtype, without_autocast
from ._base import block_rows
from ._int8_matmul import int8_linear

CHUNK = 2**20  # values that are de-quantized at once (or one row of them): four megabytes in float32
_TRACED_PARTS = 16

_Kind = TypeVar("_Kind", bound=nn.Module)


class QuantizedLinear(nn.Module):
    """`nn.Linear` with its weight in 16, 8 or 4 bits, de-quantized on the fly to the input's dtype, part by part.

    Beside input and output, a forward holds one part of at most 2²⁰ de-quantized values (or one row). For a backward
    none are kept: parts are de-quantized again, one by one.

    Attributes:
        weight: a `QuantizedTensor` of shape (out_features, in_features).
        sigma: (in_features,) float32, by which the input is multiplied first, in float32 or wider; or None.
        bias: (out_features,) in floating point, or None.
        integer: whether to round each row of the input to int8 as well and to multiply integers, where the weight is
            int8 without scales: see `set_compute`.
    """

    bias: nn.Parameter | None
    sigma: Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None = None, sigma: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.integer = False
        self.register_buffer("sigma", sigma)
        self.register_parameter("bias", bias)

    @property
    def takes_int8(self) -> bool:
        """Whether `integer` may be set: the weight is int8 without scales."""
        return self.weight.is_int8 and self.weight.scale is None

    def forward(
        self,
        input: Tensor,  # (..., in_features)
    ) -> Tensor:  # (..., out_features)
        dtype = autocast_dtype(input.device.type, input) or input.dtype
        return self._scaled(input, dtype)

    def of_product(
        self,
        left: Tensor,  # (..., in_features)
        right: Tensor,  # broadcastable to that
        dtype: torch.dtype,
    ) -> Tensor:  # (..., out_features)
        """`forward(left * right)` in `dtype`; the product is formed in float32, for in float16 it could overflow."""
        wide = torch.promote_types(left.dtype, torch.float32)
        return self._scaled(left.to(wide) * right.to(wide), dtype, own=True)

    def _scaled(self, input: Tensor, dtype: torch.dtype, own: bool = False) -> Tensor:
        """The output; `own` says that nobody else has this float32 or wider input."""
        with without_autocast(input.device.type):
            if self.sigma is not None and own and not (torch.is_grad_enabled() or ops.traced()):
                input = input.mul_(self.sigma)
            elif self.sigma is not None:
                input = input.to(torch.promote_types(input.dtype, torch.float32)) * self.sigma
            bias = self.bias if self.bias is None else self.bias.to(dtype)
            if self.integer:
                output = int8_linear(input.to(dtype), self.weight.qdata)
                return output if bias is None else output + bias
            return quantized_linear(input.to(dtype), self.weight, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_dtypes(self, before)  # sigma stays float32
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def is_plain(layer: nn.Module, kind: type[_Kind]) -> TypeGuard[_Kind]:
    """A layer of this very type that does nothing else: not wrapped, hooked or patched."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and "forward" not in vars(layer) and not any(hooks)


def project_blocks(
    linear: nn.Module,
    input: Tensor,  # (..., K, I / K)
) -> Tensor:  # (..., K, out_features)
    """Each of K blocks of the input projected by its own columns of a linear layer of I inputs."""
    if is_plain(linear, nn.Linear) and linear.bias is None:
        weight = linear.weight.unflatten(1, tuple(input.shape[-2:]))
        return torch.einsum("...kb,rkb->...kr", input, weight)
    projected: Tensor = linear(block_rows(input))  # any other module takes whole rows
    return projected


def row_parts(tensor: QuantizedTensor) -> Iterator[slice]:
    """The first axis in parts of at most `CHUNK` values each, or one row; in a traced graph, of at most 16 parts."""
    rows = max(1, CHUNK // max(1, math.prod(tensor.shape[1:])))
    if ops.traced():
        rows = max(rows, -(-tensor.shape[0] // _TRACED_PARTS))
    for start in range(0, tensor.shape[0], rows):
        yield slice(start, min(start + rows, tensor.shape[0]))


def quantized_linear(
    input: Tensor,  # (..., I)
    weight: QuantizedTensor,  # (O, I)
    bias: Tensor | None,  # (O,)
) -> Tensor:  # (..., O)
    """x Wᵀ + b in the input's dtype, de-quantizing one part of W after another."""
    parts = list(row_parts(weight))
    tracing = ops.traced()
    recorded = torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad))
    if len(parts) <= 1 and (tracing or not recorded):
        return ops.linear(input, weight.decode(input.dtype), bias)
    if recorded or tracing:
        pieces = [_linear_part(input, weight, rows) for rows in parts]
        output = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return output if bias is None else output + bias
    output = input.new_empty(*input.shape[:-1], weight.shape[0])
    for rows in parts:
        output[..., rows] = _linear_part(input, weight, rows)
    return output if bias is None else output.add_(bias)


def _linear_part(input: Tensor, weight: QuantizedTensor, rows: slice) -> Tensor:
    if weight.resident is not None and weight.resident.dtype == input.dtype:
        return ops.linear(input, weight.decode(input.dtype, rows))
    return ops.stored_linear(input, lambda dtype, *_: weight.decode(dtype, rows), *weight.buffers())


def make_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    quantize: Quantize | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    layout: Layout = "factor",
    scaled: bool = False,
) -> nn.Module:
    """An `nn.Linear`, or a zeroed `QuantizedLinear`.

    Args:
        layout: of a quantized matrix.
        scaled: whether a quantized layer has a `sigma`.
    """
    if quantize is None:
        return nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
    weight = FORMATS[quantize].zeros((out_features, in_features), layout, device)
    sigma = torch.zeros(in_features, device=device) if scaled else None
    return QuantizedLinear(weight, _zero_bias(out_features, bias, device, dtype), sigma)


def _zero_bias(
    size: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(size, device=device, dtype=dtype)) if bias else None


def fill_linear(linear: nn.Module, weight: Tensor) -> None:
    """Store a weight (out_features, in_features), quantizing it where the layer is quantized."""
    if isinstance(linear, QuantizedLinear):
        linear.weight = linear.weight.encode(weight)
    else:
        # a Parameter of its own, which shares no storage with the decomposition
        linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))


def linear_weight(linear: nn.Module) -> Callable[[torch.dtype], Tensor]:
    """How to read a (possibly wrapped) linear layer's weight in a given dtype, `sigma` multiplied into it."""
    if isinstance(linear, InterpolativeLinear):
        return linear.dense
    weight = linear.weight
    if not isinstance(weight, QuantizedTensor):
        return weight.to  # type: ignore[return-value]
    sigma = getattr(linear, "sigma", None)
    if not isinstance(sigma, Tensor):
        return weight.decode
    return lambda dtype: (weight.decode(torch.promote_types(dtype, torch.float32)) * sigma).to(dtype)


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
        ends = (rank, size - rank) if self.widening else (size - rank, rank)
        # scales for each of the others, which are fewer than the kept
        self.rest = make_linear(*ends, False, quantize, device, dtype, "rows" if self.widening else "columns")
        self.register_parameter("bias", _zero_bias(out_features, bias, device, dtype))

    @property
    def widening(self) -> bool:
        """Whether the output has the d dimensions."""
        return self.out_features > self.in_features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore_dtypes(self, before)  # .type(dtype) on a parent converts integers too
        return self

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
