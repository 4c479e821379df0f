"""Which Tucker ranks meet a target, or are the best of each size: a search over a grid, and then near the best."""

import math
from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ._factors import relative, slabs
from ._source import full_precision

_MOST_CUTS = 64  # ranks of a mode on the grid, at most
_SPARSER = 1.5  # power by which ranks on the grid grow

Triple = tuple[int, int, int]


class BlockEnergies:
    """What each leading block of a core in its HOSVD's coordinates leaves out.

    The bases are orthogonal, so the squared error of keeping the leading (r_o, r_i, r_j) block is exactly what lies
    outside it. Squares are summed into the cells of a grid in one pass over the core, and the cells from the outside,
    all positive: the total less what is inside would lose errors below 1e-8.
    """

    def __init__(
        self,
        core: Tensor,  # (a, b, c), along each axis by descending singular value, as an HOSVD gives it
        most: int = _MOST_CUTS,
        cuts: Sequence[Tensor] | None = None,
    ) -> None:
        """The grid has these ranks of each mode, or at most `most`: all of them where its size is not larger."""
        self._core = core
        self._cuts = cuts or [_spread(size, most, core.device) for size in core.shape]
        cells = _cells(core, self._cuts)
        inside = cells.cumsum(0)
        lost = _tail(inside.cumsum(1), 2)
        lost += _tail(inside.sum(2), 1)[:, :, None]
        lost += _tail(cells.sum((1, 2)), 0)[:, None, None]
        self._lost, self.total = lost, float(cells.sum())  # of each block, float64

    def best(
        self, prices: Callable[[Sequence[Tensor]], Tensor], size: float | None = None, error: float = 1.0
    ) -> tuple[Triple, float, float] | None:
        """The best ranks on the grid, then of all near these until none is better: (ranks, bytes, relative error).

        They have the least error of those of at most `size` bytes; without one, the fewest bytes of those of at most
        this relative `error`. None where there are none.

        Args:
            prices: bytes of ranks, which are broadcast tensors.
        """
        found = self._best(prices, size, error)
        exact = all(len(cuts) == d for cuts, d in zip(self._cuts, self._core.shape, strict=True))
        while found is not None and not exact:
            better = BlockEnergies(self._core, cuts=self._near(found[0]))._best(prices, size, error)
            if better is None or not (better[1] < found[1] if size is None else better[2] < found[2]):
                break
            found = better
        return found

    def _near(self, rank: Triple) -> list[Tensor]:
        """All ranks within two steps of the grid from one, and the sizes."""
        near: list[Tensor] = []
        for cuts, r in zip(self._cuts, rank, strict=True):
            k = int(torch.searchsorted(cuts, r))
            low, high = int(cuts[max(k - 2, 0)]), int(cuts[min(k + 2, len(cuts) - 1)])
            near.append(torch.cat([torch.arange(low, high + 1, device=cuts.device), cuts[-1:]]).unique())
        return near

    def _best(
        self, prices: Callable[[Sequence[Tensor]], Tensor], size: float | None, error: float
    ) -> tuple[Triple, float, float] | None:
        price = prices(_broadcast(self._cuts)).double().broadcast_to(self._lost.shape)
        if size is None:
            allowed, first, second = self._lost <= error**2 * self.total, price, self._lost
        else:
            allowed, first, second = price <= size, self._lost, price
        first = torch.where(allowed, first, torch.inf)
        least = first.min()
        if not bool(least.isfinite()):
            return None
        best = int(torch.where(first == least, second, torch.inf).argmin())
        lost = float(self._lost.flatten()[best])
        return self._triple(best), float(price.flatten()[best]), relative(lost, self.total)

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
        sizes = anchor * step ** torch.arange(math.floor(first), math.ceil(last) + 1, dtype=torch.float64, device="cpu")
        counts = torch.searchsorted(price, sizes.to(price.device), right=True)  # of ranks within each size
        counts = counts[counts > 0].unique()
        # the first that loses so little is the cheapest of them
        chosen = torch.searchsorted(-least, -least[counts - 1]).unique()
        return [
            (self._triple(int(order[k])), float(price[k]), float(lost[k]) / (self.total or 1.0))
            for k in chosen.tolist()
        ]

    def _triple(self, flat: int) -> Triple:
        places = numpy.unravel_index(flat, self._lost.shape)
        out, in1, in2 = (int(cuts[k]) for cuts, k in zip(self._cuts, places, strict=True))
        return out, in1, in2


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
