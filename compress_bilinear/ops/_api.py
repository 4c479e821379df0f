"""The public operations: each takes tensors, chooses a path, and gives what `reference` defines."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..quantization import decode_int8
from ._choice import TRACED_ROWS, Backend, Choice, Method, Problem, choose, fits_one_kernel, prefers_triton
from ._context import autocast_enabled, follows_autocast, gradient_wanted, reason_for_plain_operators
from ._cp import composed_cp, composed_cp_pairs, small_cp
from ._dense import ORDERS, Order, composed_dense, small_dense
from ._dense_pairs import composed_dense_pairs
from ._gemm import linear
from ._stored import Weight, project, read_by_kernels, reason_against_kernels, unpacked
from ._tucker import composed_tucker, composed_tucker_pairs
from .triton import _operators as triton


@follows_autocast
def bilinear_dense(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J), the same leading dimensions
    weight: Weight,  # (O, I, J); int8 with `scale`
    bias: Tensor | None = None,  # (O,)
    *,
    scale: Tensor | None = None,  # one for each block of entries: see `QuantizedTensor`
    order: Order | None = None,
    backend: Backend | None = None,
) -> Tensor:  # (..., O)
    """y_o = x1ᵀ W_o x2 + b_o, exact up to rounding.

    Args:
        order: "in1_first", "in2_first" or "outer", which the composed path takes; None chooses by shape (`best_order`).
        backend: None, "composed" or "triton"; None takes the path that should be faster.

    Raises: InputError for different leading dimensions, an unknown `order`, or a `backend` that cannot run here.
    """
    if order is None and backend is None and scale is None and isinstance(weight, Tensor):
        output = small_dense(input1, input2, weight, bias)
        if output is not None:
            return output
    _check(input1, input2, shape := _shape(weight))
    if order is not None and (order not in ORDERS or backend == "triton"):
        raise InputError(
            f"`order` should be None or one of {ORDERS}, and `backend` not 'triton' with it. "
            f"Found {order!r} and {backend!r}."
        )
    weight, scale = unpacked(weight, scale)
    operands = (input1, input2, weight, bias)
    if order is not None or not _fused("dense", operands, shape, (), weight, scale, backend):
        return composed_dense(input1, input2, weight, bias, scale, order)
    output = triton.fused_dense(*_rows(input1, input2), read_by_kernels(weight), scale)
    return _leading(output if bias is None else output + bias, input1)


@follows_autocast
def bilinear_cp(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J), the same leading dimensions
    in1: Weight,  # (R, I)
    in2: Weight,  # (R, J)
    out: Weight,  # (O, R)
    bias: Tensor | None = None,  # (O,)
    *,
    sigma: Tensor | None = None,  # (R,), float32
    backend: Backend | None = None,
) -> Tensor:  # (..., O)
    """y = (σ * (A x1) * (B x2)) Cᵀ + b, with σ applied in float32. Raises InputError as `bilinear_dense` does."""
    if backend is None and sigma is None and isinstance(in1, Tensor):
        output = small_cp(input1, input2, in1, in2, out, bias)
        if output is not None:
            return output
    _check(input1, input2, shape := (out.shape[0], in1.shape[1], in2.shape[1]))
    operands = (input1, input2, in1, in2, out, bias)
    if not _fused("cp", operands, shape, in1.shape[:1], in1, sigma, backend):
        return composed_cp(*operands, sigma)
    factors = [read_by_kernels(weight) for weight in (in1, in2, out)]
    return _leading(triton.fused_cp(*_rows(input1, input2), *factors, bias, sigma), input1)


@follows_autocast
def bilinear_tucker(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J), the same leading dimensions
    in1: Weight | None,  # (R_i, I); None where the core takes the input itself
    in2: Weight | None,  # (R_j, J)
    core: Weight,  # (R_o, R_i, R_j)
    out: Weight | None,  # (O, R_o); None where the core gives the output
    bias: Tensor | None = None,  # (O,)
    *,
    scale: Tensor | None = None,  # of an int8 core, as `bilinear_dense` takes it
    backend: Backend | None = None,
) -> Tensor:  # (..., O)
    """y = G(A x1, B x2) Uᵀ + b.

    Args:
        backend: None, "composed" or "triton"; None takes the path that should be faster.

    Raises: InputError as `bilinear_dense` does.
    """
    _check(input1, input2, shape := _tucker_shape(in1, in2, core, out))
    core, scale = unpacked(core, scale)
    operands = (input1, input2, in1, in2, core, out, bias)
    if not _fused("tucker", operands, shape, _shape(core), core, scale, backend):
        return composed_tucker(*operands, scale)
    rows1, rows2 = _rows(input1, input2)
    in1, in2, out = (None if weight is None else read_by_kernels(weight) for weight in (in1, in2, out))
    core = read_by_kernels(core)
    int8 = {tensor is not None and tensor.dtype == torch.int8 for tensor in (in1, in2, core, out)}
    wide = True in int8 or input1.dtype == torch.float32
    if not (in1 is None or in2 is None or out is None or len(int8) > 1) and fits_one_kernel(core.shape, wide):
        return _leading(triton.fused_tucker(rows1, rows2, in1, in2, core, out, bias, scale), input1)
    output = triton.fused_dense(project(rows1, in1), project(rows2, in2), core, scale)
    if out is not None:
        output = project(output, out, bias)
    elif bias is not None:
        output = output + bias
    return _leading(output, input1)


@follows_autocast
def pairwise_dense(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J), the same leading dimensions
    weight: Weight,  # (O, I, J); int8 with `scale`
    bias: Tensor | None = None,  # (O,)
    *,
    scale: Tensor | None = None,  # one for each block of entries: see `QuantizedTensor`
    backend: Backend | None = None,
) -> Tensor:  # (..., L1, L2, O)
    """y_klo = x1_kᵀ W_o x2_l + b_o for all pairs of k and l, without expanding the inputs over the pairs."""
    _check(input1, input2, shape := _shape(weight), 2)
    _fused("dense", (input1, input2, weight, bias), shape, (), weight, scale, backend, pairs=True)
    return composed_dense_pairs(input1, input2, weight, bias, scale)


@follows_autocast
def pairwise_cp(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J), the same leading dimensions
    in1: Weight,  # (R, I)
    in2: Weight,  # (R, J)
    out: Weight,  # (O, R)
    bias: Tensor | None = None,  # (O,)
    *,
    sigma: Tensor | None = None,  # (R,), float32
    backend: Backend | None = None,
) -> Tensor:  # (..., L1, L2, O)
    """`bilinear_cp` for all pairs: y_kl = (σ * (A x1_k) * (B x2_l)) Cᵀ + b."""
    _check(input1, input2, shape := (out.shape[0], in1.shape[1], in2.shape[1]), 2)
    operands = (input1, input2, in1, in2, out, bias)
    if not _fused("cp", operands, shape, in1.shape[:1], in1, sigma, backend, pairs=True):
        return composed_cp_pairs(*operands, sigma)
    left, right = project(input1, in1), project(input2, in2)
    return _all_pairs(triton.fused_cp_pairs(*_batches(left, right), read_by_kernels(out), bias, sigma), input1, input2)


@follows_autocast
def pairwise_tucker(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J), the same leading dimensions
    in1: Weight | None,  # (R_i, I)
    in2: Weight | None,  # (R_j, J)
    core: Weight,  # (R_o, R_i, R_j)
    out: Weight | None,  # (O, R_o)
    bias: Tensor | None = None,  # (O,)
    *,
    scale: Tensor | None = None,  # of an int8 core, as `bilinear_dense` takes it
    backend: Backend | None = None,
) -> Tensor:  # (..., L1, L2, O)
    """`bilinear_tucker` for all pairs."""
    _check(input1, input2, shape := _tucker_shape(in1, in2, core, out), 2)
    core, scale = unpacked(core, scale)
    operands = (input1, input2, in1, in2, core, out, bias)
    reason = "the kernel for pairs fuses the output's projection, and there is none" if out is None else None
    if not _fused("tucker", operands, shape, _shape(core), core, scale, backend, pairs=True, reason_against=reason):
        return composed_tucker_pairs(*operands, scale)
    assert out is not None
    core, out = read_by_kernels(core), read_by_kernels(out)
    left, right = _batches(project(input1, in1), project(input2, in2))
    by_outputs = core if scale is None else decode_int8(core, scale, left.dtype)
    t = linear(left, by_outputs.transpose(1, 2).flatten(0, 1)).unflatten(-1, (core.shape[0], core.shape[2]))
    return _all_pairs(triton.fused_tucker_pairs(t, right, out, bias), input1, input2)


def explain(
    method: str,
    shape: tuple[int, int, int],
    rank: tuple[int, ...],
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    weight_bits: int,
    *,
    pairs: bool = False,
    gradient: bool = False,
    reason_against: str | None = None,
) -> Choice:
    """The choice for operands of these sizes.

    Args:
        method: "dense", "cp" or "tucker".
        shape: (O, I, J).
        rank: () of a dense weight, (R,) or (R_o, R_i, R_j).
        weight_bits: 8 for int8.
        reason_against: what the caller knows to rule the fused kernels out.
    """
    problem = Problem(method, shape, rank, rows, pairs, device, dtype, weight_bits, gradient)  # type: ignore[arg-type]
    return choose(problem, None, reason_against)


def _fused(
    method: Method,
    operands: Sequence[Weight | None],
    shape: tuple[int, int, int],
    rank: tuple[int, ...],
    stored: Weight,
    scale: Tensor | None,
    backend: Backend | None,
    *,
    pairs: bool = False,
    reason_against: str | None = None,
) -> bool:
    """Whether a fused kernel runs. On a CPU, without a `backend`, that is decided at once."""
    input1, input2 = operands[:2]
    assert isinstance(input1, Tensor) and isinstance(input2, Tensor)  # noqa: PT018
    if backend is None and input1.is_cpu:
        return False
    tensors = [value for value in operands if isinstance(value, Tensor)]
    reason = reason_for_plain_operators(*tensors, scale)
    reason = reason or next(filter(None, map(reason_against_kernels, operands)), None)
    if reason is None and scale is not None and scale.requires_grad:
        reason = "the fused kernels take scales as constants, and one requires a gradient"
    reason = reason or reason_against
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if reason is None and dtypes != {input1.dtype}:
        reason = f"the operands have several dtypes, {', '.join(sorted(map(str, dtypes)))}"
    compiling = torch.compiler.is_compiling()
    # the choice must not tie a graph to a number of rows
    rows = TRACED_ROWS if compiling else math.prod(input1.shape[:-1]) * (input2.shape[-2] if pairs else 1)
    bits = 8 * (stored.element_size() if isinstance(stored, Tensor) else 1)
    gradient = gradient_wanted(*tensors)
    problem = (method, shape, tuple(rank), rows, pairs, input1.device, input1.dtype, bits, gradient)
    if backend is None and reason is None and not compiling:
        return prefers_triton(*problem)
    return choose(Problem(*problem), backend, reason).backend == "triton"


def _check(input1: Tensor, input2: Tensor, shape: tuple[int, int, int], last: int = 1) -> None:
    """Raise InputError for other sizes than the weight's, and where leading dimensions or dtypes differ."""
    shape1, shape2 = input1.shape, input2.shape
    if min(len(shape1), len(shape2)) < last or shape1[:-last] != shape2[:-last]:
        raise InputError(
            f"The inputs should have the same leading dimensions. Found {tuple(shape1)} and {tuple(shape2)}."
        )
    if shape1[-1] != shape[1] or shape2[-1] != shape[2]:
        raise InputError(
            f"The inputs' last dimensions should be {shape[1]} and {shape[2]}, as of the weight. "
            f"Found {tuple(shape1)} and {tuple(shape2)}."
        )
    if input1.dtype != input2.dtype and not autocast_enabled(input1.device.type):
        raise InputError(f"The inputs should have the same dtype. Found {input1.dtype} and {input2.dtype}.")


def _shape(weight: Weight) -> tuple[int, int, int]:
    out, in1, in2 = weight.shape
    return out, in1, in2


def _tucker_shape(in1: Weight | None, in2: Weight | None, core: Weight, out: Weight | None) -> tuple[int, int, int]:
    return (
        core.shape[0] if out is None else out.shape[0],
        core.shape[1] if in1 is None else in1.shape[1],
        core.shape[2] if in2 is None else in2.shape[1],
    )


def _rows(input1: Tensor, input2: Tensor) -> tuple[Tensor, Tensor]:
    return input1.reshape(-1, input1.shape[-1]), input2.reshape(-1, input2.shape[-1])


def _batches(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left.reshape(-1, *left.shape[-2:]), right.reshape(-1, *right.shape[-2:])


def _leading(output: Tensor, input1: Tensor) -> Tensor:
    return output.reshape(*input1.shape[:-1], output.shape[-1])


def _all_pairs(output: Tensor, input1: Tensor, input2: Tensor) -> Tensor:
    return output.reshape(*input1.shape[:-1], input2.shape[-2], output.shape[-1])
