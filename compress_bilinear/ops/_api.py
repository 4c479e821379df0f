"""The public operations: each takes tensors, chooses a path, and gives what `reference` defines."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..quantization import dequantize
from ._choice import TRACED_ROWS, Backend, Choice, Problem, choose, chosen, transformed
from ._cp import composed_cp, composed_cp_pairs, small_cp
from ._dense import ORDERS, Order, check_inputs, composed_dense, composed_dense_pairs
from ._gemm import linear
from ._small import small_dense
from ._tucker import composed_tucker, composed_tucker_pairs, project
from .triton import _operators as _dispatch
from .triton._pair_operators import fused_cp_pairs, fused_tucker_pairs


def bilinear_dense(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J), the same leading dimensions
    weight: Tensor,  # (O, I, J); int8 with `scale`
    bias: Tensor | None = None,  # (O,)
    *,
    scale: Tensor | None = None,  # one for each block of entries: see `QuantizedTensor`
    order: Order | None = None,
    backend: Backend | None = None,
) -> Tensor:  # (..., O)
    """y_o = x1ᵀ W_o x2 + b_o, exact up to rounding.

    Args:
        order: one of "in1_first", "in2_first", "outer", which is composed; None chooses by shape (`best_order`).
        backend: None, "composed" or "triton"; None takes what should be faster.

    Raises: InputError for other leading dimensions, or an `order` or `backend` that there is not or that cannot run.
    """
    if order is None and backend is None and scale is None:
        small = small_dense(input1, input2, weight, bias)
        if small is not None:
            return small
    check_inputs(input1, input2)
    if order is not None and (order not in ORDERS or backend == "triton"):
        raise InputError(
            f"`order` should be None or one of {ORDERS}, and `backend` not 'triton' with it. "
            f"Found {order!r} and {backend!r}."
        )
    found = _under_autocast(bilinear_dense, (input1, input2, weight, bias), scale=scale, order=order, backend=backend)
    if found is not None:
        return found
    operands = (input1, input2, weight, bias, scale)
    if order is not None or not _fused("dense", operands[:4], _shape(weight), (), weight, backend, fixed=(scale,)):
        return composed_dense(input1, input2, weight, bias, scale, order)
    output = _dispatch.launched(_dispatch.fused_dense, *_rows(input1, input2), weight, scale)
    return _leading(output if bias is None else output + bias, input1)


def bilinear_cp(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J), the same leading dimensions
    in1: Tensor,  # (R, I), floating, or int8 of step 2⁻⁷
    in2: Tensor,  # (R, J)
    out: Tensor,  # (O, R)
    bias: Tensor | None = None,  # (O,)
    *,
    sigma: Tensor | None = None,  # (R,), float32
    backend: Backend | None = None,
) -> Tensor:  # (..., O)
    """y = (σ * (A x1) * (B x2)) Cᵀ + b, with σ applied in float32. Raises InputError as `bilinear_dense` does."""
    if backend is None and sigma is None:
        small = small_cp(input1, input2, in1, in2, out, bias)
        if small is not None:
            return small
    check_inputs(input1, input2)
    operands = (input1, input2, in1, in2, out, bias, sigma)
    found = _under_autocast(bilinear_cp, operands[:6], sigma=sigma, backend=backend)
    if found is not None:
        return found
    shape = (out.shape[0], in1.shape[1], in2.shape[1])
    if not _fused("cp", operands[:6], shape, (in1.shape[0],), in1, backend, fixed=(sigma,)):
        return composed_cp(*operands)
    return _leading(_dispatch.launched(_dispatch.fused_cp, *_rows(input1, input2), *operands[2:]), input1)


def bilinear_tucker(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J), the same leading dimensions
    in1: Tensor | None,  # (R_i, I), floating, or int8 of step 2⁻⁷; None where the core takes the input as it is
    in2: Tensor | None,  # (R_j, J)
    core: Tensor,  # (R_o, R_i, R_j)
    out: Tensor | None,  # (O, R_o); None where the core gives the output
    bias: Tensor | None = None,  # (O,)
    *,
    scale: Tensor | None = None,  # of an int8 core, as `bilinear_dense` takes it
    backend: Backend | None = None,
) -> Tensor:  # (..., O)
    """y = G(A x1, B x2) Uᵀ + b.

    Args:
        backend: None, "composed" or "triton"; None takes what should be faster.

    Raises: InputError as `bilinear_dense` does.
    """
    operands = (input1, input2, in1, in2, core, out, bias)
    if backend is None and input1.is_cpu and not torch.is_autocast_enabled("cpu"):
        return composed_tucker(*operands, scale)  # which checks the projections instead
    check_inputs(input1, input2)
    found = _under_autocast(bilinear_tucker, operands, scale=scale, backend=backend)
    if found is not None:
        return found
    shape = _tucker_shape(in1, in2, core, out)
    if not _fused("tucker", operands, shape, _shape(core), core, backend, fixed=(scale,)):
        return composed_tucker(*operands, scale)
    rows1, rows2 = _rows(input1, input2)
    int8 = {tensor is not None and tensor.dtype == torch.int8 for tensor in (in1, in2, core, out)}
    wide = True in int8 or input1.dtype == torch.float32
    if in1 is None or in2 is None or out is None or len(int8) > 1 or not _dispatch.fits_one_kernel(_shape(core), wide):
        inner = _dispatch.launched(_dispatch.fused_dense, project(rows1, in1), project(rows2, in2), core, scale)
        if out is None:
            return _leading(inner if bias is None else inner + bias, input1)
        return _leading(linear(inner, _dispatch.values(out, inner.dtype), bias), input1)
    return _leading(_dispatch.launched(_dispatch.fused_tucker, rows1, rows2, in1, in2, core, out, bias, scale), input1)


def pairwise_dense(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J), the same leading dimensions
    weight: Tensor,  # (O, I, J); int8 with `scale`
    bias: Tensor | None = None,  # (O,)
    *,
    scale: Tensor | None = None,  # one for each block of entries: see `QuantizedTensor`
    backend: Backend | None = None,
) -> Tensor:  # (..., L1, L2, O)
    """y_klo = x1_kᵀ W_o x2_l + b_o for all pairs of k and l, without expanding the inputs over the pairs."""
    check_inputs(input1, input2, pairs=True)
    found = _under_autocast(pairwise_dense, (input1, input2, weight, bias), scale=scale, backend=backend)
    if found is not None:
        return found
    operands = (input1, input2, weight, bias, scale)
    _fused("dense", operands[:4], _shape(weight), (), weight, backend, pairs=True)
    return composed_dense_pairs(input1, input2, weight, bias, scale)


def pairwise_cp(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J), the same leading dimensions
    in1: Tensor,  # (R, I), floating, or int8 of step 2⁻⁷
    in2: Tensor,  # (R, J)
    out: Tensor,  # (O, R)
    bias: Tensor | None = None,  # (O,)
    *,
    sigma: Tensor | None = None,  # (R,), float32
    backend: Backend | None = None,
) -> Tensor:  # (..., L1, L2, O)
    """`bilinear_cp` for all pairs: y_kl = (σ * (A x1_k) * (B x2_l)) Cᵀ + b."""
    check_inputs(input1, input2, pairs=True)
    operands = (input1, input2, in1, in2, out, bias, sigma)
    found = _under_autocast(pairwise_cp, operands[:6], sigma=sigma, backend=backend)
    if found is not None:
        return found
    shape = (out.shape[0], in1.shape[1], in2.shape[1])
    if not _fused("cp", operands[:6], shape, (in1.shape[0],), in1, backend, fixed=(sigma,), pairs=True):
        return composed_cp_pairs(*operands)
    left, right = project(input1, in1), project(input2, in2)
    return _all_pairs(_dispatch.launched(fused_cp_pairs, *_batches(left, right), out, bias, sigma), input1, input2)


def pairwise_tucker(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J), the same leading dimensions
    in1: Tensor | None,  # (R_i, I), floating or int8
    in2: Tensor | None,  # (R_j, J)
    core: Tensor,  # (R_o, R_i, R_j)
    out: Tensor | None,  # (O, R_o)
    bias: Tensor | None = None,  # (O,)
    *,
    scale: Tensor | None = None,  # of an int8 core, as `bilinear_dense` takes it
    backend: Backend | None = None,
) -> Tensor:  # (..., L1, L2, O)
    """`bilinear_tucker` for all pairs."""
    check_inputs(input1, input2, pairs=True)
    operands = (input1, input2, in1, in2, core, out, bias)
    found = _under_autocast(pairwise_tucker, operands, scale=scale, backend=backend)
    if found is not None:
        return found
    shape = _tucker_shape(in1, in2, core, out)
    if not _fused("tucker", operands, shape, _shape(core), core, backend, pairs=True, whole=out is not None):
        return composed_tucker_pairs(*operands, scale)
    assert out is not None
    left, right = _batches(project(input1, in1), project(input2, in2))
    plain = core if scale is None else dequantize(core, scale, left.dtype)
    turned = linear(left, plain.transpose(1, 2).flatten(0, 1)).unflatten(-1, (core.shape[0], core.shape[2]))
    return _all_pairs(_dispatch.launched(fused_tucker_pairs, turned, right, out, bias), input1, input2)


def _under_autocast(
    operation: Callable[..., Tensor], operands: Sequence[Tensor | None], **options: Any
) -> Tensor | None:
    """The operation as autocast has a matrix product, its floating operands in autocast's dtype; None where it is off.

    Scales, which are no operands, keep their dtype. Where an operand is in float64, which autocast leaves alone, the
    operators of torch decide.
    """
    assert operands[0] is not None
    device = operands[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in operands):
        return None
    dtype = torch.get_autocast_dtype(device)
    cast = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in operands]
    with torch.autocast(device, enabled=False):
        return operation(*cast, **options)


def _fused(
    form: str,
    operands: Sequence[Tensor | None],
    shape: tuple[int, int, int],
    rank: tuple[int, ...],
    stored: Tensor,
    backend: Backend | None,
    *,
    fixed: Sequence[Tensor | None] = (),
    pairs: bool = False,
    whole: bool = True,
) -> bool:
    """Whether a fused kernel runs; on a CPU that nobody asked anything of, decided at once."""
    input1, input2 = operands[:2]
    assert input1 is not None and input2 is not None  # noqa: PT018
    if backend is None and input1.device.type == "cpu":
        return False
    gradient = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in operands)
    if torch.compiler.is_compiling():
        rows = TRACED_ROWS  # a graph is not to be tied to a number of rows by the choice
    else:
        rows = math.prod(input1.shape[:-1]) * (input2.shape[-2] if pairs else 1)
    obstacle = transformed([*operands, *fixed])
    if obstacle is None and any(tensor is not None and tensor.requires_grad for tensor in fixed):
        obstacle = "the fused kernels take scales as constants, and one requires a gradient"
    if obstacle is None and not whole:
        obstacle = "the kernel for pairs fuses the output's projection, and there is none"
    floating = {tensor.dtype for tensor in operands if tensor is not None and tensor.is_floating_point()}
    if floating != {input1.dtype}:
        obstacle = obstacle or f"the operands have several dtypes, {', '.join(sorted(map(str, floating)))}"
    bits = 8 * stored.element_size()
    problem = (form, shape, rank, rows, pairs, input1.device, input1.dtype, bits, gradient)
    if backend is None and obstacle is None and not torch.compiler.is_compiling():
        return chosen(*problem)
    return choose(Problem(*problem), backend, obstacle).backend == "triton"  # type: ignore[arg-type]


def explain(
    form: str,
    shape: tuple[int, int, int],
    rank: tuple[int, ...],
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    weight_bits: int,
    *,
    pairs: bool = False,
    gradient: bool = False,
    obstacle: str | None = None,
) -> Choice:
    """The choice for operands of these sizes.

    Args:
        form: "dense", "cp" or "tucker".
        shape: (O, I, J).
        rank: () of a dense weight, (R,) or (R_o, R_i, R_j).
        weight_bits: 8 for int8.
        obstacle: what the caller knows to rule the fused kernels out.
    """
    return choose(Problem(form, shape, rank, rows, pairs, device, dtype, weight_bits, gradient), None, obstacle)  # type: ignore[arg-type]


def _shape(weight: Tensor) -> tuple[int, int, int]:
    out, in1, in2 = weight.shape
    return out, in1, in2


def _tucker_shape(in1: Tensor | None, in2: Tensor | None, core: Tensor, out: Tensor | None) -> tuple[int, int, int]:
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
