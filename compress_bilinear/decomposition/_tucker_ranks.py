"""Which Tucker ranks meet a target, or are the best of each size: a search over a grid, and then near the best."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..config import MaxError, MaxSize, Quantize
from ..errors import InfeasibleError
from ._factors import relative, slabs
from ._sizes import tucker_bytes
from ._source import full_precision

_MOST_CUTS = 64  # ranks of a mode on the grid, at most
_SPARSER = 1.5  # power by which ranks on the grid grow

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Target:
    """A target for the ranks of a weight (O, I, J), and their price."""

    wanted: MaxError | MaxSize
    shape: Triple
    itemsize: int
    quantize: Quantize | None

    def price(self, rank: Sequence[Any]) -> Any:
        """Bytes that are stored; ranks may be broadcast tensors."""
        return tucker_bytes(rank, self.shape, self.itemsize, self.quantize)

    @property
    def budget(self) -> float:
        """Bytes that a `MaxSize` allows."""
        assert isinstance(self.wanted, MaxSize)
        out, in1, in2 = self.shape
        return self.wanted.fraction * out * in1 * in2 * self.itemsize

    def check_feasible(self) -> None:
        """Raise InfeasibleError where not even the smallest ranks are within the budget."""
        if not isinstance(self.wanted, MaxSize):
            return
        least = min(product(*({1, size} for size in self.shape)), key=self.price)  # a full rank may be the cheapest
        if self.price(least) > self.budget:
            raise InfeasibleError(
                f"Rank {least} stores {self.price(least)} bytes. MaxSize({self.wanted.fraction:.4g}) of the "
                f"weight's {int(self.budget / self.wanted.fraction)} bytes allows {int(self.budget)}."
            )

    def meets(self, rank: Triple, lost: float, total: float) -> bool:
        """Whether ranks that lose this much of the squared norm are within the target."""
        if isinstance(self.wanted, MaxError):
            return relative(lost, total) <= self.wanted.error
        return bool(self.price(rank) <= self.budget)

    def key(self, rank: Triple, lost: float) -> tuple[float, float]:
        """Smaller is better, among ranks that meet the target."""
        price = float(self.price(rank))
        return (price, lost) if isinstance(self.wanted, MaxError) else (lost, price)


class BlockEnergies:
    """What each leading block of a core in its HOSVD's coordinates leaves out.

    The bases are orthogonal, so the squared error of keeping the leading (r_o, r_i, r_j) block is exactly what lies
    outside it. Squares are summed into the cells of a grid in one pass over the core, and the cells from the outside,
    all positive: the total less what is inside would lose errors below 1e-8.
    """

    def __init__(
        self,
        core: Tensor,  # (a, b, c), along each axis by descending singular value, as an HOSVD gives it
        outside: float = 0.0,  # squared norm that the core leaves out
        most: int = _MOST_CUTS,
    ) -> None:
        """The grid has at most `most` ranks of each mode, all of them where its size is not larger."""
        self._core, self._outside = core, outside
        self._cuts = [_spread(size, most, core.device) for size in core.shape]
        self._lost, self.total = self._losses(self._cuts)

    def best(self, target: Target) -> tuple[tuple[float, float], Triple] | None:
        """The best ranks for the target, with their key; None where no block meets it.

        They are the best on the grid, and then of all ranks near these, until no better ones are near: within about 1%
        of the best of all.
        """
        found = self._best(target, self._cuts, self._lost)
        exact = all(len(cuts) == size for cuts, size in zip(self._cuts, self._core.shape, strict=True))
        before = None
        while found is not None and found != before and not exact:
            before, near = found, self._near(found[1])
            found = min(found, self._best(target, near, self._losses(near)[0]) or found)
        return found

    def front(
        self, prices: Callable[[Sequence[Tensor]], Tensor], anchor: float | None = None, step: float = 1.03
    ) -> list[tuple[Triple, float, float]]:
        """The best ranks for each of many sizes: (ranks, bytes, the part of the squared norm that they lose).

        Args:
            prices: bytes of ranks, which are broadcast tensors.
            anchor: a size in bytes that is one of those looked at; the others grow from it, and shrink, by `step`.

        Returns:
            In ascending order of bytes; only ranks that lose less than all smaller ones.
        """
        price = prices(_broadcast(self._cuts)).double().broadcast_to(self._lost.shape).flatten()
        order = price.argsort(stable=True)
        price, lost = price[order], self._lost.flatten()[order]
        least = lost.cummin(0).values
        anchor = float(price[-1]) if anchor is None else anchor
        first, last = (math.log(float(end) / anchor, step) for end in (price[0], price[-1]))
        sizes = anchor * step ** torch.arange(math.floor(first), math.ceil(last) + 1, dtype=torch.float64)
        counts = torch.searchsorted(price, sizes.to(price.device), right=True)  # of ranks within each size
        counts = counts[counts > 0].unique()
        # the first that loses so little is the cheapest of them
        chosen = torch.searchsorted(-least, -least[counts - 1]).unique()
        shape = self._lost.shape
        return [
            (self._triple(self._cuts, int(order[k]), shape), float(price[k]), float(lost[k]) / (self.total or 1.0))
            for k in chosen.tolist()
        ]

    def _losses(self, cuts: Sequence[Tensor]) -> tuple[Tensor, float]:
        """The squared norm that the blocks of these ranks leave out, float64, and that of all."""
        cells = _cells(self._core, cuts)
        beyond_out = _tail(cells.sum((1, 2)), 0)
        inside = cells.cumsum(0)
        lost = _tail(inside.cumsum(1), 2)
        lost += _tail(inside.sum(2), 1)[:, :, None]
        lost += beyond_out[:, None, None] + self._outside
        return lost, float(cells.sum()) + self._outside

    def _best(self, target: Target, cuts: Sequence[Tensor], lost: Tensor) -> tuple[tuple[float, float], Triple] | None:
        price = target.price(_broadcast(cuts)).double().broadcast_to(lost.shape)
        if isinstance(target.wanted, MaxError):
            allowed, first, second = lost <= target.wanted.error**2 * self.total, price, lost
        else:
            allowed, first, second = price <= target.budget, lost, price
        first = torch.where(allowed, first, torch.inf)
        least = first.min()
        if not bool(least.isfinite()):
            return None
        best = int(torch.where(first == least, second, torch.inf).argmin())
        triple = self._triple(cuts, best, lost.shape)
        return target.key(triple, float(lost.flatten()[best])), triple

    @staticmethod
    def _triple(cuts: Sequence[Tensor], flat: int, shape: Sequence[int]) -> Triple:
        rest, k = divmod(flat, shape[2])
        i, j = divmod(rest, shape[1])
        return int(cuts[0][i]), int(cuts[1][j]), int(cuts[2][k])

    def _near(self, rank: Triple) -> list[Tensor]:
        """All ranks within two steps of the grid from one, and the sizes."""
        found: list[Tensor] = []
        for cuts, r in zip(self._cuts, rank, strict=True):
            k = int(torch.searchsorted(cuts, r))
            low, high = int(cuts[max(k - 2, 0)]), int(cuts[min(k + 2, len(cuts) - 1)])
            found.append(torch.cat([torch.arange(low, high + 1, device=cuts.device), cuts[-1:]]).unique())
        return found


def _spread(size: int, most: int, device: torch.device) -> Tensor:
    """At most `most` ranks from 1 to the size: all, or ever sparser ones, for prices grow in proportion to ranks."""
    even = torch.linspace(0, 1, most + 1, dtype=torch.float64, device=device)[1:]
    cuts = (size * even**_SPARSER).round().long().clamp_min(1).unique()
    return torch.arange(1, size + 1, device=device) if size <= most else cuts


def _broadcast(cuts: Sequence[Tensor]) -> list[Tensor]:
    return [axis.view([-1 if m == mode else 1 for m in range(3)]) for mode, axis in enumerate(cuts)]


def _cells(core: Tensor, cuts: Sequence[Tensor]) -> Tensor:
    """The sums of squares between cuts, float64: products with indicators, slab by slab."""
    dtype = torch.promote_types(core.dtype, torch.float32)
    places = [
        torch.bucketize(torch.arange(1, size + 1, device=core.device), ranks)
        for size, ranks in zip(core.shape, cuts, strict=True)
    ]
    in1, in2 = (one_hot(place, len(c)).to(dtype) for place, c in zip(places[1:], cuts[1:], strict=True))
    cells = torch.zeros([len(c) for c in cuts], dtype=torch.float64, device=core.device)
    with full_precision(core.device):
        for rows in slabs(core.shape):
            squares = core[rows].to(dtype).square()
            cells.index_add_(0, places[0][rows], torch.bmm(in1.T.expand(len(squares), -1, -1), squares @ in2).double())
    return cells


def _tail(tensor: Tensor, axis: int) -> Tensor:
    """The sum of all entries after each, along an axis."""
    sums = tensor.flip(axis).cumsum(axis).flip(axis)
    return torch.cat([sums.narrow(axis, 1, sums.shape[axis] - 1), torch.zeros_like(sums.narrow(axis, 0, 1))], axis)
