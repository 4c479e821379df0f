"""Where solvers begin: the truncated HOSVD, the blocks in its coordinates, and CP's first factors on these."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._factors import SMALL
from ._metric import PLAIN, Metric
from ._source import Source, full_precision, gram, leading, mode_product, turned_


def compressed(source: Source, sizes: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Orthonormal U_m (d_m, k_m) and the core T ×_m U_mᵀ / ‖T‖, in about the coordinates of its HOSVD."""
    basis, core = start(source, sizes)
    core.mul_(source.total**-0.5)
    turns = [turn.to(core.dtype) for turn in ordered_(core)]  # the modes that do not shrink have to be turned
    return [turn if u is None else u @ turn for u, turn in zip(basis, turns, strict=True)], core


def ordered(
    weight: Tensor,  # (O, I, J)
    metric: Metric = PLAIN,
) -> tuple[Tensor, Metric]:
    """The weight in a metric and in the coordinates of its HOSVD, and the metric whose `whiten` gives that tensor.

    Its leading blocks hold most of the energy. The result is the only copy of a large weight, in float32, for which
    Grams are in float32 too; float64 weights and small ones are worked on in float64.
    """
    small = weight.numel() <= SMALL
    tensor = metric.whiten(weight.detach().double() if small else weight)
    with full_precision(weight.device):
        return tensor, metric.turned(ordered_(tensor))


def ordered_(tensor: Tensor) -> list[Tensor]:
    """Turn a tensor in place to the coordinates of its HOSVD; return the orthogonal U (d, d), float64, of each mode."""
    bases: list[Tensor] = []
    for mode, size in enumerate(tensor.shape):
        bases.append(leading(gram(tensor, mode, tensor.dtype).double(), size, torch.float64))
        turned_(tensor, bases[mode].to(tensor.dtype), mode)
    return bases


def start(source: Source, sizes: Sequence[int]) -> tuple[list[Tensor | None], Tensor]:
    """The sequentially truncated HOSVD, the mode that shrinks most first: bases, None for full modes, and the core.

    Grams are in the working dtype: it is a start, which HOOI or ALS refine.
    """
    basis: list[Tensor | None] = [None, None, None]
    rest: Tensor | None = None
    for mode in sorted(range(3), key=lambda m: (sizes[m] / source.shape[m], -m)):  # the last needs no copies
        if sizes[mode] < source.shape[mode]:
            matrix = source.gram(mode, source.dtype) if rest is None else gram(rest, mode, source.dtype)
            basis[mode] = leading(matrix, sizes[mode], source.dtype)
            rest = source.project(basis) if rest is None else mode_product(rest, basis[mode], mode)
    return basis, source.project(basis) if rest is None else rest


def leading_block(tensor: Tensor, fraction: float) -> Tensor:
    """The leading block with this fraction of each size: a smaller problem to begin with."""
    a, b, c = (math.ceil(fraction * size) for size in tensor.shape)
    return tensor[:a, :b, :c].contiguous()


def random_start(core: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Unit Gaussian columns, drawn on the CPU, so that a seed means the same on every device."""
    draws = [torch.randn(size, rank, generator=generator, dtype=torch.float64, device="cpu") for size in core.shape]
    return [(draw / draw.norm(dim=0)).to(core) for draw in draws]


def hosvd_start(core: Tensor, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Leading singular vectors of each mode, filled up with random columns where the rank exceeds its size.

    The core is in HOSVD coordinates, so its singular vectors are the unit vectors.
    """
    start = random_start(core, rank, generator)
    for factor in start:
        kept = min(factor.shape)
        factor[:, :kept] = torch.eye(factor.shape[0], kept, dtype=core.dtype, device=core.device)
    return start
