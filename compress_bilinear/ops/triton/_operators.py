"""The fused kernels as operators of torch, with what graphs and gradients need.

A launcher computes grids and splits from sizes in Python, so each is one opaque operator: traced as a Triton operator
of torch, its graph would be tied to the sizes that it was traced with. Triton is loaded at the first call of a kernel,
here and nowhere else. Each operator's gradient is made of these operators and of torch's, so it has gradients too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...errors import InputError
from ...quantization import decode_int8
from .._blocks import TRACED_PARTS, TRACED_ROW
from .._choice import reason_against_gpu
from .._context import gradient_wanted, observed

Gradients = Sequence[Tensor | None]


def operator(
    name: str, fake: Callable[..., Tensor], gradients: Callable[..., Gradients]
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Make a launcher an operator of torch.

    A call goes past torch's dispatcher, which costs two launches, where nothing needs to be recorded.

    Args:
        fake: an empty output of the right shape and dtype, for the launcher's arguments.
        gradients: for which arguments gradients are wanted, the output's gradient and the arguments -> a gradient or
            None for each of the first arguments; the others have none. torch can differentiate it in turn.
    """

    def backward(context: Any, dy: Tensor) -> Gradients:
        operands, wanted = context.saved_tensors, context.needs_input_grad
        computed = gradients(wanted, dy, *operands)
        kept = [gradient if want else None for gradient, want in zip(computed, wanted, strict=False)]
        return (*kept, *[None] * (len(operands) - len(kept)))

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def launch(*args: Any) -> Tensor:
            if not args[0].is_cuda:
                return function(*args)
            if reason := reason_against_gpu(args[0].device.index):  # a graph is recorded without this question
                raise InputError(f"A Triton kernel cannot run here: {reason}. Record the graph without `backend`.")
            with torch.cuda.device(args[0].device):  # Triton launches on the current device
                return function(*args)

        registered = torch.library.custom_op(f"compress_bilinear::{name}", launch, mutates_args=())
        registered.register_fake(fake)
        registered.register_autograd(backward, setup_context=_save)

        @functools.wraps(function)
        def call(*args: Any) -> Tensor:
            recorded = torch.compiler.is_compiling() or observed()
            wanted = recorded or gradient_wanted(*(arg for arg in args if isinstance(arg, Tensor)))
            output: Tensor = (registered if wanted else launch)(*args)
            return output

        return call

    return register


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _dense_gradients(wanted: Sequence[bool], dy: Tensor, x1: Tensor, x2: Tensor, weight: Tensor) -> Gradients:
    """The inputs' gradients are dense bilinears of the weight with its axes in another order: the same kernel."""
    return (
        fused_dense(dy, x2, weight.permute(1, 0, 2)) if wanted[0] else None,
        fused_dense(dy, x1, weight.permute(2, 0, 1)) if wanted[1] else None,
        _weight_gradient(dy, x1, x2) if wanted[2] else None,
    )


def _weight_gradient(
    dy: Tensor,  # (N, O)
    x1: Tensor,  # (N, I)
    x2: Tensor,  # (N, J)
) -> Tensor:  # (O, I, J)
    """Σ_n dy_no x1_ni x2_nj by matrix products of torch, some outputs at once, in a number that no graph ties to N."""
    if x1.shape[1] > x2.shape[1]:
        return _weight_gradient(dy, x2, x1).mT
    outputs = max(1, TRACED_ROW // x1.shape[1], -(-dy.shape[1] // TRACED_PARTS))
    parts = [(part.unsqueeze(1) * x1.T).flatten(0, 1) @ x2 for part in dy.T.split(outputs)]
    return torch.cat(parts).view(-1, x1.shape[1], x2.shape[1])


@operator(
    "dense",
    lambda x1, x2, weight: x1.new_empty(x1.shape[0], weight.shape[0]),
    _dense_gradients,
)
def fused_dense(
    x1: Tensor,  # (N, I)
    x2: Tensor,  # (N, J)
    weight: Tensor,  # (O, I, J)
) -> Tensor:  # (N, O)
    """y_no = Σ_ij x1_ni W_oij x2_nj."""
    from ._dense import launch_dense

    return launch_dense(x1, x2, weight)


def _product_gradients(
    wanted: Sequence[bool], dh: Tensor, x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, sigma: Tensor | None
) -> Gradients:
    """By torch's matrix products, which take both projections again."""
    dtype = x1.dtype
    if sigma is not None:
        dh = dh.float() * sigma
    elif torch.int8 in (in1.dtype, in2.dtype):  # of which products could overflow in float16
        dh = dh.float()
    in1, in2 = (decode_int8(factor, None, dtype) if factor.dtype == torch.int8 else factor for factor in (in1, in2))

    def of(x: Tensor, weight: Tensor, other: Callable[[], Tensor], inputs: bool, factor: bool) -> Gradients:
        if not (inputs or factor):
            return None, None
        projected = (dh * other()).to(dtype)
        return projected @ weight if inputs else None, projected.T @ x if factor else None

    dx1, din1 = of(x1, in1, lambda: linear(x2, in2), wanted[0], wanted[2])
    dx2, din2 = of(x2, in2, lambda: linear(x1, in1), wanted[1], wanted[3])
    return dx1, dx2, din1, din2


@operator(
    "cp_product",
    lambda x1, x2, in1, in2, sigma: x1.new_empty(x1.shape[0], in1.shape[0]),
    _product_gradients,
)
def fused_product(
    x1: Tensor,  # (N, I)
    x2: Tensor,  # (N, J)
    in1: Tensor,  # (R, I), floating or int8
    in2: Tensor,  # (R, J)
    sigma: Tensor | None,  # (R,), float32
) -> Tensor:  # (N, R)
    """σ * (x1 Aᵀ) * (x2 Bᵀ)."""
    from ._cp import launch_product

    return launch_product(x1, x2, in1, in2, sigma)
