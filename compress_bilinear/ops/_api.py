"""The public operations: each takes tensors, chooses a path, and gives what `reference` defines."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ._choice import BACKENDS, Backend, reason_against_kernel
from ._context import autocast_enabled, follows_autocast, reason_for_plain_operators, traced
from ._cp import composed_cp, composed_cp_pairs, small_cp
from ._dense import ORDERS, Order, composed_dense, composed_dense_pairs, small_dense
from ._stored import Weight, project, read_by_kernels, reason_against_kernels
from .triton import _operators as triton


@follows_autocast
def bilinear_dense(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J), the same leading dimensions
    weight: Weight,  # (O, I, J)
    bias: Tensor | None = None,  # (O,)
    *,
    order: Order | None = None,
    backend: Backend | None = None,
) -> Tensor:  # (..., O)
    """y_o = x1ᵀ W_o x2 + b_o, exact up to rounding.

    Args:
        order: "in1_first", "in2_first" or "outer", which the composed path takes; None chooses by shape (`best_order`).
        backend: None, "triton" takes the fused kernel, which has not been timed; None and "composed" products of torch.

    Raises: InputError for different leading dimensions, an unknown `order`, or a `backend` that cannot run here.
    """
    if order is None and backend is None and isinstance(weight, Tensor) and weight.dim() == 3:
        output = small_dense(input1, input2, weight, bias)
        if output is not None:
            return output
    check_inputs(input1, input2, _shape(weight))
    if order is not None and (order not in ORDERS or backend == "triton"):
        raise InputError(
            f"`order` should be None or one of {ORDERS}, and `backend` not 'triton' with it. "
            f"Found {order!r} and {backend!r}."
        )
    operands = (input1, input2, weight, bias)
    if order is not None or not _fused("dense", operands, None, backend):
        return composed_dense(input1, input2, weight, bias, order)
    output = triton.fused_dense(*_rows(input1, input2), read_by_kernels(weight))
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
    check_inputs(input1, input2, (out.shape[0], in1.shape[1], in2.shape[1]))
    if not _fused("cp", (input1, input2, in1, in2, out, bias), sigma, backend):
        return composed_cp(input1, input2, in1, in2, out, bias, sigma)
    product = triton.fused_product(*_rows(input1, input2), read_by_kernels(in1), read_by_kernels(in2), sigma)
    return _leading(project(product, out, bias), input1)


@follows_autocast
def bilinear_tucker(
    input1: Tensor,  # (..., I)
    input2: Tensor,  # (..., J), the same leading dimensions
    in1: Weight | None,  # (R_i, I); None where the core takes the input itself
    in2: Weight | None,  # (R_j, J)
    core: Weight,  # (R_o, R_i, R_j)
    out: Weight | None,  # (O, R_o); None where the core gives the output
    bias: Tensor | None = None,  # (O,)
) -> Tensor:  # (..., O)
    """y = G(A x1, B x2) Uᵀ + b. Raises InputError for different leading dimensions. There is no kernel for it."""
    check_inputs(input1, input2, _tucker_shape(in1, in2, core, out))
    left, right = project(input1, in1), project(input2, in2)
    if out is None:
        return composed_dense(left, right, core, bias)
    return project(composed_dense(left, right, core), out, bias)


@follows_autocast
def pairwise_dense(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J), the same leading dimensions
    weight: Weight,  # (O, I, J)
    bias: Tensor | None = None,  # (O,)
) -> Tensor:  # (..., L1, L2, O)
    """y_klo = x1_kᵀ W_o x2_l + b_o for all pairs of k and l, without expanding the inputs over the pairs.

    There is no kernel for pairs. Raises: InputError for different leading dimensions.
    """
    check_inputs(input1, input2, _shape(weight), 2)
    return composed_dense_pairs(input1, input2, weight, bias)


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
) -> Tensor:  # (..., L1, L2, O)
    """`bilinear_cp` for all pairs: y_kl = (σ * (A x1_k) * (B x2_l)) Cᵀ + b."""
    check_inputs(input1, input2, (out.shape[0], in1.shape[1], in2.shape[1]), 2)
    return composed_cp_pairs(input1, input2, in1, in2, out, bias, sigma)


@follows_autocast
def pairwise_tucker(
    input1: Tensor,  # (..., L1, I)
    input2: Tensor,  # (..., L2, J), the same leading dimensions
    in1: Weight | None,  # (R_i, I)
    in2: Weight | None,  # (R_j, J)
    core: Weight,  # (R_o, R_i, R_j)
    out: Weight | None,  # (O, R_o)
    bias: Tensor | None = None,  # (O,)
) -> Tensor:  # (..., L1, L2, O)
    """`bilinear_tucker` for all pairs."""
    check_inputs(input1, input2, _tucker_shape(in1, in2, core, out), 2)
    left, right = project(input1, in1), project(input2, in2)
    if out is None:
        return composed_dense_pairs(left, right, core, bias)
    return project(composed_dense_pairs(left, right, core), out, bias)


def _fused(
    method: str,
    operands: Sequence[Weight | None],  # inputs first, then what is stored
    sigma: Tensor | None,
    backend: Backend | None,
) -> bool:
    """Whether a fused kernel runs. Raises: InputError where one is asked for that cannot."""
    if backend in (None, "composed"):
        return False
    if backend != "triton":
        raise InputError(f"`backend` should be None or one of {BACKENDS}. Found {backend!r}.")
    input1, *_ = tensors = [value for value in operands if isinstance(value, Tensor)]
    stored = operands[2:4] if method == "cp" else operands[2:3]
    rows = 1 if traced() else math.prod(input1.shape[:-1])  # any number, which must not tie the graph to it
    dtypes = {tensor.dtype for tensor in tensors}
    reasons = [reason_for_plain_operators(*tensors, sigma), *map(reason_against_kernels, stored)]
    if method == "dense" and not isinstance(stored[0], Tensor):
        reasons.append("the dense kernel reads weights in floating point")
    if sigma is not None and sigma.requires_grad:
        reasons.append("the fused kernels take scales as constants, and one requires a gradient")
    if dtypes != {input1.dtype}:
        reasons.append(f"the operands have several dtypes, {', '.join(sorted(map(str, dtypes)))}")
    reasons.append(reason_against_kernel(method, input1.device, input1.dtype, rows=rows))
    if against := "; ".join(filter(None, reasons)):
        raise InputError(f"`backend` should be None or 'composed' here, for {against}. Found 'triton'.")
    return True


def check_inputs(
    input1: Tensor,
    input2: Tensor,
    shape: tuple[int, int, int],  # (O, I, J)
    last: int = 1,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise InputError for inputs of other sizes than the weight's, or whose leading dimensions or dtypes differ.

    Args:
        last: how many dimensions do not have to be the same: 1 of rows, 2 of pairs.
        dtype: that the inputs should have, where there is no autocast; None takes any floating one.
    """
    shape1, shape2, dtype1, dtype2 = input1.shape, input2.shape, input1.dtype, input2.dtype
    # not the shapes whole: a graph of pairs would be tied to inputs of one length
    if shape1[:-last] != shape2[:-last] or len(shape1) < last or len(shape2) < last:
        required = "(..., I) and (..., J)" if last == 1 else "(..., L1, I) and (..., L2, J)"
        raise InputError(
            f"`input1` and `input2` should be {required} with the same leading dimensions. "
            f"Found {tuple(shape1)} and {tuple(shape2)}."
        )
    _, in1, in2 = shape
    if shape1[-1] != in1 or shape2[-1] != in2:
        name, size, found = ("input1", in1, shape1) if shape1[-1] != in1 else ("input2", in2, shape2)
        raise InputError(f"`{name}` should have shape (..., {size}). Found {tuple(found)}.")
    if dtype1 == dtype2 and dtype1.is_floating_point and (dtype is None or dtype == dtype1):
        return
    mixed = autocast_enabled(input1.device.type)
    if dtype1 != dtype2 and not mixed:
        raise InputError(f"`input1` and `input2` should have the same dtype. Found {dtype1} and {dtype2}.")
    if not (dtype1.is_floating_point and dtype2.is_floating_point):
        raise InputError(f"`input1` and `input2` should be floating. Found {dtype1} and {dtype2}.")
    if dtype is not None and dtype != dtype1 and not mixed:
        raise InputError(f"`input1` and `input2` should be {dtype}, as the weight is. Found {dtype1}.")


def _shape(weight: Weight) -> tuple[int, int, int]:
    """(O, I, J). Raises: InputError for other dimensions, or for integers."""
    if len(weight.shape) != 3:
        raise InputError(f"A weight or core should have three dimensions. Found {tuple(weight.shape)}.")
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise InputError(f"A weight or core should be floating or a `QuantizedTensor`. Found {weight.dtype}.")
    out, in1, in2 = weight.shape
    return out, in1, in2


def _tucker_shape(in1: Weight | None, in2: Weight | None, core: Weight, out: Weight | None) -> tuple[int, int, int]:
    ranks = _shape(core)
    return (
        ranks[0] if out is None else out.shape[0],
        ranks[1] if in1 is None else in1.shape[1],
        ranks[2] if in2 is None else in2.shape[1],
    )


def _rows(input1: Tensor, input2: Tensor) -> tuple[Tensor, Tensor]:
    return input1.reshape(-1, input1.shape[-1]), input2.reshape(-1, input2.shape[-1])


def _leading(output: Tensor, input1: Tensor) -> Tensor:
    return output.reshape(*input1.shape[:-1], output.shape[-1])
