"""x Wᵀ on a CPU by whichever of torch's two libraries is faster for it.

torch multiplies float32 matrices by MKL, which keeps its fastest kernels to Intel's processors; oneDNN, which the same
wheels bring and torch uses for 16-bit products, does not. On an AMD EPYC with AVX-512 oneDNN is about twice as fast,
but costs some 12 microseconds more a call and lays out the weight anew in each, so it is taken where both are small
beside the product. Both sum in float32. Everything that records a graph or transforms functions sees `F.linear`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as _plain

from ..quantization import dequantize

_LEAST_ROWS = 16  # below, laying out the weight costs more than it saves
LEAST_PRODUCTS = 2**21  # multiply-adds below which a call's overhead costs more than it saves


def linear(
    input: Tensor,  # (..., K)
    weight: Tensor,  # (M, K), of any strides
    bias: Tensor | None = None,  # (M,)
) -> Tensor:  # (..., M)
    """input weightᵀ + bias."""
    if not prefers_onednn(input, weight):
        return _plain(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, weight, bias)):
        return _Linear.apply(rows, weight, bias).unflatten(0, input.shape[:-1])  # type: ignore[no-untyped-call]
    return _product(rows, weight, bias).view(*input.shape[:-1], weight.shape[0])


def linear_times(
    input: Tensor,  # (..., K)
    weight: Tensor,  # (M, K), of any strides
    other: Tensor,  # (..., M)
) -> Tensor:  # (..., M)
    """(input weightᵀ) * other, in one pass where no gradient is wanted."""
    wanted = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad or other.requires_grad)
    if wanted or other.dtype != input.dtype or not prefers_onednn(input, weight):
        product = linear(input, weight)
        return product * other if wanted or product.dtype != other.dtype or is_recorded() else product.mul_(other)
    shape = other.shape
    rows, other = input.reshape(-1, input.shape[-1]), other.reshape(-1, shape[-1])
    found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, other, weight, None, "mul")
    return found.view(shape)


def stored_linear(
    input: Tensor,  # (..., K)
    decode: Callable[[torch.dtype], Tensor],  # dtype -> the weight (M, K)
    *stored: Tensor,
) -> Tensor:  # (..., M)
    """input weightᵀ, of a weight that is decoded for the product and once more for the backward, not kept between.

    Args:
        decode: how to read it, from `stored`.
        stored: the tensors that hold it, which a gradient's graph keeps alive, and which must not change before it.
    """
    wanted = torch.is_grad_enabled() and input.requires_grad
    if not wanted or is_recorded() or any(tensor.requires_grad for tensor in stored):
        return linear(input, decode(input.dtype))
    output: Tensor = _StoredLinear.apply(input, decode, *stored)  # type: ignore[no-untyped-call]
    return output


class _StoredLinear(torch.autograd.Function):
    """`stored_linear` with the gradient of its input, itself differentiable."""

    @staticmethod
    def forward(context: Any, input: Tensor, decode: Callable[[torch.dtype], Tensor], *stored: Tensor) -> Tensor:
        context.save_for_backward(*stored)
        context.decode = decode
        return linear(input, decode(input.dtype))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stored = context.saved_tensors  # raises where one has been changed in place
        return linear(gradient, context.decode(gradient.dtype).T), None, *([None] * len(stored))


def values(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor in `dtype`: int8 has the step 2⁻⁷, which every floating dtype holds exactly."""
    return dequantize(factor, None, dtype) if factor.dtype == torch.int8 else factor


class _Linear(torch.autograd.Function):
    """`linear` by oneDNN with its gradients, themselves differentiable."""

    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = context.saved_tensors
        wanted = context.needs_input_grad
        return (
            linear(gradient, weight.T) if wanted[0] else None,
            linear(gradient.T, rows.T) if wanted[1] else None,
            gradient.sum(0) if wanted[2] else None,
        )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return found


def prefers_onednn(input: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes oneDNN for this product."""
    if torch.compiler.is_compiling():
        return False
    outputs, width = weight.shape
    if width == 0 or input.numel() * outputs < LEAST_PRODUCTS:  # first, for here a small call ends
        return False
    return (
        input.numel() >= _LEAST_ROWS * width
        and input.is_cpu
        and input.dtype == torch.float32
        and weight.dtype == torch.float32
        and type(input) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and onednn_is_faster()
        and not is_recorded()
    )


def is_mkls(*tensors: Tensor | None) -> bool:
    """Whether MKL at its best multiplies these, plain and of one dtype, and nothing records or transforms the call."""
    first, wanted = tensors[0], torch.is_grad_enabled()
    if first is None or first.dtype not in (torch.float32, torch.float64):
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.dtype != first.dtype or not tensor.is_cpu:
            return False
        if wanted and tensor.requires_grad:
            return False
    return not (onednn_is_faster() or is_recorded())


def onednn_is_faster() -> bool:
    """Whether float32 products on this processor are oneDNN's: it is not Intel's, and torch's BLAS is MKL."""
    return bool(torch.backends.mkldnn.enabled) and has_slow_mkl()


@cache
def has_slow_mkl() -> bool:
    """Whether this processor is not Intel's, torch's BLAS is MKL, and oneDNN stands beside it."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in lines)
    except OSError:
        return False


def is_recorded() -> bool:
    """Whether operators are watched or transformed: by tracing, torch.func, a dispatch mode, forward AD or autocast."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined, unused-ignore]
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )
