"""Which Tucker ranks meet a target: an exact search over all triples."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..config import MaxError, MaxSize, Quantize
from ..errors import InfeasibleError
from ._factors import relative, slabs
from ._sizes import tucker_bytes

_SLAB = 2**20  # triples that are looked at together, at most

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


def best_block(
    core: Tensor,  # (a, b, c), along each axis by descending singular value, as an HOSVD gives it
    outside: float,  # squared norm that the core leaves out
    total: float,  # squared norm of the whole
    target: Target,
    slab: int = _SLAB,
) -> tuple[tuple[float, float], Triple] | None:
    """The best ranks whose leading block of the core meets the target, with their key; None where no block does.

    The bases are orthogonal, so the squared error of keeping the leading (r_o, r_i, r_j) block is exactly what lies
    outside it: cumulative sums of squares give it for every triple. They are summed from the outside, all positive:
    the total less what is inside would lose errors below 1e-8.
    """
    sizes = core.shape
    by_out = torch.stack([slab.double().square().sum() for slab in core])
    beyond_out = _tail(by_out, 0)
    inside = torch.zeros(sizes[1:], dtype=torch.float64, device=core.device)
    axes = [torch.arange(1, size + 1, device=core.device) for size in sizes]
    found: tuple[tuple[float, float], Triple] | None = None
    for rows in slabs(sizes, most=min(slab, max(2**12, core.numel() // 16))):  # of which several copies are held
        energy = core[rows].double().square().cumsum(0) + inside
        inside = energy[-1].clone()
        lost = _tail(energy.cumsum(1), 2)
        lost += _tail(energy.sum(2), 1)[:, :, None]
        lost += beyond_out[rows, None, None] + outside
        out = axes[0][rows, None, None]
        ranks = [out, axes[1][None, :, None], axes[2][None, None, :]]
        price = target.price(ranks).double()
        allowed = (
            lost <= target.wanted.error**2 * total if isinstance(target.wanted, MaxError) else price <= target.budget
        )
        first, second = (price, lost / total) if isinstance(target.wanted, MaxError) else (lost, price)
        first = torch.where(allowed, first, torch.inf)
        least = first.min()
        if not bool(least.isfinite()):
            continue
        best = int(torch.where(first == least, second, torch.inf).argmin())
        a, b, c = (int(i) for i in torch.unravel_index(torch.tensor(best), lost.shape))
        triple = (rows.start + a + 1, b + 1, c + 1)
        key = target.key(triple, float(lost[a, b, c]))
        if found is None or key < found[0]:
            found = key, triple
    return found


def _tail(tensor: Tensor, axis: int) -> Tensor:
    """The sum of all entries after each, along an axis."""
    sums = tensor.flip(axis).cumsum(axis).flip(axis)
    return torch.cat([sums.narrow(axis, 1, sums.shape[axis] - 1), torch.zeros_like(sums.narrow(axis, 0, 1))], axis)
