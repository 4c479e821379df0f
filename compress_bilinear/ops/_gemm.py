"""Linear maps x Wᵀ: on a CPU by the faster of torch's two libraries, and of weights that are decoded for each use.

torch multiplies float32 matrices by MKL, which keeps its fastest kernels to Intel's processors. oneDNN, which comes in
the same wheels, does not: on an AMD EPYC with AVX-512 it is about twice as fast. Both sum in float32. While a graph is
recorded or a transform is active, every product is `F.linear`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from ._blocks import tuning
from ._context import gradient_wanted, plain, recorded, traced


def linear(
    input: Tensor,  # (..., K)
    weight: Tensor,  # (M, K), of any strides
    bias: Tensor | None = None,  # (M,)
) -> Tensor:  # (..., M)
    """input weightᵀ + bias."""
    if not uses_onednn(input, weight):
        return torch_linear(input, weight, bias)
    rows = input.reshape(-1, input.shape[-1])
    if gradient_wanted(input, weight, bias):
        return _Linear.apply(rows, weight, bias).unflatten(0, input.shape[:-1])  # type: ignore[no-untyped-call]
    return _onednn_linear(rows, weight, bias).view(*input.shape[:-1], weight.shape[0])


def stored_linear(
    input: Tensor,  # (..., K)
    decode: Callable[..., Tensor],  # dtype and `stored` -> the weight (M, K)
    *stored: Tensor,
) -> Tensor:  # (..., M)
    """input weightᵀ of a weight that is decoded for this product, and again for the backward, but not kept.

    Args:
        decode: reads the weight from `stored`. It should not refer to them otherwise: a graph keeps it alive.
        stored: the tensors that hold the weight. A gradient's graph keeps them alive; they must not change before it.
    """
    if not gradient_wanted(input) or recorded(input.device.type) or any(tensor.requires_grad for tensor in stored):
        return linear(input, decode(input.dtype, *stored))
    output: Tensor = _StoredLinear.apply(input, decode, *stored)  # type: ignore[no-untyped-call]
    return output


class _StoredLinear(torch.autograd.Function):
    """`stored_linear` with the gradient of its input, which is differentiable too."""

    @staticmethod
    def forward(context: Any, input: Tensor, decode: Callable[..., Tensor], *stored: Tensor) -> Tensor:
        context.save_for_backward(*stored)
        context.decode = decode
        return linear(input, decode(input.dtype, *stored))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        stored = context.saved_tensors  # raises where one has been changed in place
        return linear(gradient, context.decode(gradient.dtype, *stored).T), None, *([None] * len(stored))


class _Linear(torch.autograd.Function):
    """`linear` by oneDNN with its gradients, which are differentiable too."""

    @staticmethod
    def forward(context: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(rows, weight)
        return _onednn_linear(rows, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = context.saved_tensors
        wanted = context.needs_input_grad
        return (
            linear(gradient, weight.T) if wanted[0] else None,
            linear(gradient.T, rows.T) if wanted[1] else None,
            gradient.sum(0) if wanted[2] else None,
        )


def _onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return output


def uses_onednn(input: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes oneDNN for this product."""
    if traced():
        return False  # before sizes are looked at, which would tie the graph to them
    (outputs, width), count, limits = weight.shape, input.numel(), tuning()
    if count * outputs <= limits.onednn_products or count < limits.onednn_rows * width or width == 0:
        return False
    if not (input.is_cpu and input.dtype == weight.dtype == torch.float32 and plain(input, weight)):
        return False
    return onednn_is_faster() and not recorded("cpu")


def uses_fast_mkl(*tensors: Tensor | None) -> bool:
    """Whether MKL with its fastest kernels multiplies these: plain CPU tensors of one dtype, float32 or float64."""
    first = tensors[0]
    if first is None or first.dtype not in (torch.float32, torch.float64) or onednn_is_faster():
        return False
    return plain(*tensors) and all(t is None or (t.is_cpu and t.dtype == first.dtype) for t in tensors)


def onednn_is_faster() -> bool:
    """Whether float32 products on this processor are left to oneDNN."""
    chosen = tuning().onednn
    return bool(torch.backends.mkldnn.enabled) and (has_slow_mkl() if chosen is None else chosen)


@cache
def has_slow_mkl() -> bool:
    """Whether this processor is AMD's, torch's BLAS is MKL, and torch brings oneDNN too."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return any(line.startswith("vendor_id") and "AuthenticAMD" in line for line in lines)
    except OSError:
        return False
