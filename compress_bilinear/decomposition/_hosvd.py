"""Subspaces to begin in: the truncated HOSVD, and the blocks in its coordinates on which CP begins."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._source import Source, gram, leading, mode_product

_LARGE = 2**23  # elements of a weight whose subspaces are sketched: its Grams would cost more than what follows
_OVERSAMPLED = 8
_SAMPLED = 16  # columns for each row, to estimate the coordinates of a mode from


def compressed(source: Source, sizes: Sequence[int], generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """Orthonormal U_m (d_m, k_m) and the core T ×_m U_mᵀ / ‖T‖, about in the coordinates of its HOSVD."""
    basis, core = start(source, sizes, generator)
    core.mul_(source.total**-0.5)
    # the columns of the modes that shrink come in descending order; the other modes are turned to have it so too
    turned: list[Tensor] = []
    for mode, u in enumerate(basis):
        if u is None:
            u = leading(_sampled_gram(core, mode), core.shape[mode], source.dtype)
            core = mode_product(core, u, mode)
        turned.append(u)
    return turned, core


def start(source: Source, sizes: Sequence[int], generator: torch.Generator) -> tuple[list[Tensor | None], Tensor]:
    """Orthonormal U_m (d_m, k_m) near the leading singular vectors, None for full modes, and the core T ×_m U_mᵀ."""
    if source.weight.numel() >= _LARGE and sum(2 * k < d for k, d in zip(sizes, source.shape, strict=True)) >= 2:
        return _sketched(source, sizes, generator)
    return truncated(source, sizes)


def _sampled_gram(core: Tensor, mode: int) -> Tensor:
    """The Gram of an unfolding's strided sample: coordinates need not be exact, and the whole would cost a sweep."""
    flat = core.movedim(mode, 0).flatten(1)
    stride = max(1, flat.shape[1] // (_SAMPLED * flat.shape[0]))
    stride -= stride % 2 == 0 and stride > 1  # odd, for the columns' period is often even
    part = flat[:, ::stride].to(torch.promote_types(core.dtype, torch.float32))
    return part @ part.T


def truncated(source: Source, sizes: Sequence[int]) -> tuple[list[Tensor | None], Tensor]:
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


def _sketched(source: Source, sizes: Sequence[int], generator: torch.Generator) -> tuple[list[Tensor | None], Tensor]:
    """A random range finder (Halko, Martinsson, Tropp, 2011) in a sequentially truncated HOSVD.

    The two longest modes that shrink take turns, each by a power step on what the other's basis leaves, of which the
    first is random; the third mode comes from a Gram of the rest, which is small by then. Returns bases and core.
    """
    shrinking = [mode for mode, (size, kept) in enumerate(zip(source.shape, sizes, strict=True)) if kept < size]
    *third, second, first = sorted(shrinking, key=lambda mode: source.shape[mode])

    def draw(mode: int) -> Tensor:
        size = source.shape[mode]
        wide = min(size, sizes[mode] + _OVERSAMPLED)
        normal = torch.randn(size, wide, generator=generator, dtype=torch.float64, device="cpu")
        return torch.linalg.qr(normal)[0].to(source.weight.device, source.dtype)

    sketches = {mode: draw(mode) for mode in (second, first)}
    for mode, other in ((first, second), (second, first), (first, second)):
        rest = source.project([sketches[other] if m == other else None for m in range(3)])
        flat = rest.movedim(mode, 0).flatten(1)
        sketches[mode] = torch.linalg.qr(flat @ (flat.T @ sketches[mode]))[0]
    core = mode_product(rest, sketches[first], first)
    basis: list[Tensor | None] = [None, None, None]
    for mode in third:
        basis[mode] = leading(gram(core, mode), sizes[mode], source.dtype)
        core = mode_product(core, basis[mode], mode)
    for mode in (first, second):
        turn = leading(gram(core, mode), sizes[mode], source.dtype)
        basis[mode], core = sketches[mode] @ turn, mode_product(core, turn, mode)
    return basis, core


class Core:
    """A tensor of norm 1, less what is `outside`, in about the coordinates of its HOSVD.

    Its leading blocks hold most of the energy, so they are smaller problems to begin with.

    Attributes:
        tensor: with its axes in CP's order; meant times `scale`.
        room: elements of the weight that it is of.
    """

    def __init__(self, tensor: Tensor, outside: float, room: int) -> None:
        self.tensor, self.scale, self.outside, self.room = tensor, 1.0, outside, room

    def block(self, fraction: float) -> Tensor:
        """The leading block with this fraction of each size."""
        a, b, c = self._sizes(fraction)
        return self.tensor[:a, :b, :c].contiguous()

    def padded(self, mode: int, factor: Tensor, size: int) -> Tensor:
        """A factor of a leading block, as one of a block of this size, or of the tensor."""
        return torch.cat([factor, factor.new_zeros(size - len(factor), factor.shape[1])])

    def turned(self, mode: int, factor: Tensor) -> Tensor:
        """A factor of the tensor, in the coordinates of the blocks."""
        return factor

    def _sizes(self, fraction: float) -> list[int]:
        return [max(1, -(-int(1000 * fraction) * size // 1000)) for size in self.tensor.shape]


class Whole(Core):
    """A weight that has no smaller core. It stays in its own coordinates, and no turned copy of it is held."""

    def __init__(self, source: Source, order: Sequence[int]) -> None:
        super().__init__(source.permuted(order)[0], 0.0, source.weight.numel())
        self.scale = source.total**-0.5
        self._source, self._order = source, order
        dtype = self.tensor.dtype
        self._basis = [
            leading(_sampled_gram(self.tensor, mode), size, dtype) for mode, size in enumerate(self.tensor.shape)
        ]

    def block(self, fraction: float) -> Tensor:
        if fraction == 1:
            return self.tensor
        kept = [u[:, :size] for u, size in zip(self._basis, self._sizes(fraction), strict=True)]
        projected = self._source.project([kept[self._order.index(mode)] for mode in range(3)])
        return projected.permute(*self._order).mul(self.scale).contiguous()

    def padded(self, mode: int, factor: Tensor, size: int) -> Tensor:
        u = self._basis[mode]
        return u[:, : len(factor)] @ factor if size == len(u) else super().padded(mode, factor, size)

    def turned(self, mode: int, factor: Tensor) -> Tensor:
        return self._basis[mode].T @ factor
