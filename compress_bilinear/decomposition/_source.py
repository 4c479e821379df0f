"""A weight as the solvers read it: slab by slab, in the working dtype, so that no whole copy of it is needed.

Sums of squares are in float64, and so are Grams unless a caller asks for less: a float32 Gram loses every singular
value below about 1e-4 of the largest.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from ._factors import peak, slabs, squared_norm, working_dtype

Basis: TypeAlias = Sequence[Tensor | None]
"""Orthonormal columns (d_m, r_m) for each mode; None for a mode that is left as it is."""

_SLAB = 2**20  # elements of a slab, at most: 4 MiB in float32


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 nor bfloat16 in float32 products: the solvers choose their precision themselves."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by PyTorch's newer names, which do not mix with these
        before = None
    with torch.autocast(device.type, enabled=False):
        if before in (None, "highest"):
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


class Source:
    """A weight (O, I, J) times a power of two that keeps the squares of its entries within range.

    Attributes:
        dtype: the working dtype.
        scale: the power of two.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype | None = None, slab: int = _SLAB) -> None:
        """`dtype` is the working dtype, if not the usual one; `slab` the most elements that a slab may have."""
        self._slab = slab
        self.weight = weight.detach().contiguous()  # another layout would round otherwise
        self.shape: tuple[int, int, int] = tuple(weight.shape)  # type: ignore[assignment]
        self.dtype = dtype or working_dtype(weight)
        largest = peak(self.weight)
        # a weight of usual size is read as it is, which saves a pass over it
        self.scale = (
            1.0 if largest == 0 or 1e-6 < largest < 1e6 else 2.0 ** -max(-1000, min(1000, math.frexp(largest)[1]))
        )

    @cached_property
    def total(self) -> float:
        """The squared Frobenius norm of the scaled weight."""
        return sum(squared_norm(slab) for _, slab in self.slabs())

    def _scaled(self, part: Tensor) -> Tensor:
        """Part of the weight, scaled, in the working dtype."""
        # float16 could not hold the scaled value before it is widened; an extreme scale must not pass through float32
        part = part.to(self.dtype) if 1e-30 < self.scale < 1e30 else part.double()
        return part if self.scale == 1.0 else (part * self.scale).to(self.dtype)

    def slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the first axis and their slabs (·, I, J): scaled, in the working dtype."""
        for rows in slabs(self.shape, most=self._slab):
            yield rows, self._scaled(self.weight[rows])

    def gram(self, mode: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """The unfolding times its transpose (d, d)."""
        return gram(self.weight, mode, dtype, self._scaled, self._slab)

    def permuted(self, order: Sequence[int]) -> tuple[Tensor, float]:
        """The weight in the working dtype, with this order of its axes, and a factor that gives it norm 1.

        The first two axes can be flattened without a copy. It is the caller's own tensor where that will do.
        """
        factor = 1 / math.sqrt(self.total)
        view = self.weight.permute(*order)
        if self.scale == 1.0 and view.dtype == self.dtype and order[0] + 1 == order[1]:
            return view, factor
        copy = torch.empty(view.shape, dtype=self.dtype, device=view.device)
        target = copy.permute(*(list(order).index(m) for m in range(3)))
        for rows, slab in self.slabs():
            target[rows] = slab
        return copy, factor

    def project(self, basis: Basis, skip: int | None = None) -> Tensor:
        """W ×_m U_mᵀ over all modes but `skip`, for U_m (d_m, r_m) in the working dtype; None leaves a mode."""
        out, in1, in2 = (None if mode == skip else u for mode, u in enumerate(basis))
        if in1 is None and in2 is None and out is not None:
            result = torch.empty(out.shape[1], *self.shape[1:], dtype=self.dtype, device=self.weight.device)
            for columns in slabs(self.shape, 1, most=self._slab):
                result[:, columns] = mode_product(self._scaled(self.weight[:, columns]), out, 0)
            return result
        sizes = [size if u is None else u.shape[1] for size, u in zip(self.shape, (None, in1, in2), strict=True)]
        result = torch.empty(sizes, dtype=self.dtype, device=self.weight.device)
        for rows, slab in self.slabs():
            if sizes[1] * self.shape[2] < sizes[2] * self.shape[1]:  # the axis that shrinks more goes first
                result[rows] = mode_product(mode_product(slab, in1, 1), in2, 2)
            else:
                result[rows] = mode_product(mode_product(slab, in2, 2), in1, 1)
        if out is not None and 2 * out.shape[1] > out.shape[0]:  # the result then needs no more memory than it has
            flat = result.flatten(1)
            for columns in slabs(flat.shape, 1, most=self._slab):
                flat[: out.shape[1], columns] = out.T @ flat[:, columns]
            return result[: out.shape[1]]
        return mode_product(result, out, 0)

    def mttkrp(self, factors: Sequence[Tensor], mode: int) -> Tensor:  # (d_mode, R) float64
        """The unfolding times the Khatri-Rao product of the other two of the factors (d_m, R)."""
        out, in1, in2 = (factor.to(self.dtype) for factor in factors)
        total = torch.zeros(factors[mode].shape, dtype=torch.float64, device=self.weight.device)
        for rows, slab in self.slabs():
            partial = slab.mT @ in1 if mode == 2 else slab @ in2
            if mode == 0:
                total[rows] = (partial * in1).sum(1).double()
            else:
                total += (partial * out[rows, None]).sum(0).double()
        return total


def mode_product(tensor: Tensor, matrix: Tensor | None, mode: int) -> Tensor:
    """Tensor ×_mode matrixᵀ for a matrix (d_mode, r): the axis d_mode becomes r. No permuted copies."""
    if matrix is None:
        return tensor
    match mode:
        case 0:
            return (matrix.T @ tensor.flatten(1)).unflatten(1, tensor.shape[1:])
        case 1:
            return torch.bmm(matrix.T.expand(tensor.shape[0], -1, -1), tensor)  # matmul would copy the tensor
        case _:
            return tensor @ matrix


def turned_(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """`mode_product` with a square matrix, in place."""
    along = 1 if mode == 0 else 0
    for part in slabs(tensor.shape, along):
        slab = tensor[:, part] if along else tensor[part]
        slab.copy_(mode_product(slab, matrix, mode))
    return tensor


def gram(
    tensor: Tensor,  # (a, b, c)
    mode: int,
    dtype: torch.dtype = torch.float64,
    prepare: Callable[[Tensor], Tensor] = lambda part: part,
    slab: int = _SLAB,
) -> Tensor:
    """The Gram matrix (d, d) of an unfolding, summed over slabs that `prepare` is applied to."""
    size = tensor.shape[mode]
    total = torch.zeros(size, size, dtype=dtype, device=tensor.device)
    along = 1 if mode == 0 else 0
    for part in slabs(tensor.shape, along, most=min(slab, max(2**12, tensor.numel() // 16))):  # two copies may be wider
        values = prepare(tensor[:, part] if along else tensor[part]).to(dtype)
        flat = values.flatten(0, 1).T if mode == 2 else values.movedim(mode, 0).flatten(1)
        del values
        total += flat @ flat.T
        del flat  # before the next is made
    return total


def leading(gram_matrix: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The `count` leading eigenvectors of a Gram matrix, that is left singular vectors of the unfolding."""
    vectors: Tensor = torch.linalg.eigh(gram_matrix)[1]
    return vectors.flip(1)[:, :count].to(dtype).contiguous()
