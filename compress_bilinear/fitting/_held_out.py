"""Which rows of a sample are held out, so that what is measured on them holds for inputs that no fit has seen.

Rows depend on each other: those of one batch are of one graph or sentence, and share inputs. So whole batches are held
out or, where these are few, whole groups of rows that share inputs. Nothing is fitted to a near-copy of a held-out row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST_ROWS = 32  # below which nothing is fitted to rows
FEWEST_GROUPS = 8  # batches, or values of an input, below which a quarter of them would say little
_SHARE = 1 / 4  # of the rows that is held out
_VALUES_SHARE = 1 / 3  # of the values of each input, where both are divided: a ninth of all pairs of them
_SAME = 1e-5  # two rows have one value where they differ by less, relative to the spread of all rows
_NEAR = 1e-3  # one is a near-copy of the other
_DIRECTIONS = 8  # on which rows are projected to compare them
_BLOCK = 64  # rows whose distances to others are held at once


@dataclass(frozen=True, eq=False)
class Split:
    """A sample of rows, divided.

    Attributes:
        fit, held: the indices of the rows to fit to and of those to measure on. Some may be in neither.
        values: (2, n), a number for each value of input1 and of input2; those of an index count as new in each row.
    """

    fit: Tensor
    held: Tensor
    values: Tensor

    def groups(self, most: int | None = None) -> int:
        """The independent groups among the first held-out rows: distinct values of the input that has fewer."""
        return min(len(values.unique()) for values in self.values[:, self.held[:most]])


def split_rows(
    input1: Tensor,  # (n, I)
    input2: Tensor,  # (n, J)
    batch_held: Tensor | None,  # (n,), whether a row's batch is held out; None for rows of few batches
    seed: int,
) -> Split:
    """Divide a sample. All rows are held out where they are few, or all alike."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.stack([_points(rows, generator) for rows in (input1, input2)])
    values = torch.stack([_values(each) for each in points])
    for mode, rows in enumerate((input1, input2)):
        if rows.shape[1] > 1 and bool(((rows != 0).sum(1) == 1).all()):  # an index: it has no values but a table's
            values[mode] = torch.arange(len(rows), device="cpu")
    pairs = torch.cat([points[0], points[1]], 1)
    if batch_held is None:
        fit, held = _by_values(values, generator)
    else:
        fit, held = ~batch_held, batch_held
    fit = _without_copies(fit, held, pairs)
    if batch_held is not None and 2 * int(fit.sum()) < len(fit):  # batches come again and again
        held = _drawn(values.unique(dim=1, return_inverse=True)[1], _SHARE, generator)
        fit = _without_copies(~held, held, pairs)
    if len(fit) < FEWEST_ROWS or not (fit.any() and held.any()):
        fit, held = torch.zeros_like(fit), torch.ones_like(held)
    return Split(fit.nonzero()[:, 0], held.nonzero()[:, 0], values)


def _by_values(values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows to fit to, and rows to hold out.

    Rows that share an input, directly or through others, are one group. Where that leaves too few groups to divide, as
    among all pairs of one sentence, values are held out of each input that has enough of them. Pairs of a value that is
    held out and one that is not are left out.
    """
    groups = _joined(values)
    held = _drawn(groups, _SHARE, generator)
    if 1 / 8 <= float(held.double().mean()) <= 1 / 2:
        return ~held, held
    counts = [int(each.max()) + 1 for each in values]
    if min(counts) < FEWEST_GROUPS:
        held = _drawn(values[counts.index(max(counts))], _SHARE, generator)
        return ~held, held
    first, second = (_drawn(each, _VALUES_SHARE, generator) for each in values)
    return ~first & ~second, first & second


def _points(rows: Tensor, generator: torch.Generator) -> Tensor:  # (n, d) -> (n, 8)
    """Rows as points whose distances are near the rows' own, relative to their spread; in float64, on the CPU."""
    directions = torch.randn(rows.shape[1], _DIRECTIONS, generator=generator, dtype=torch.float64, device="cpu")
    peak = float(rows.abs().max()) or 1.0  # squares stay in the range
    points = (rows.double() @ (directions / peak).to(rows.device)).cpu()
    centred = points - points.mean(0)
    # a constant's rounding errors are no spread
    scale = torch.maximum(centred.norm(), 0.1 * points.norm()) / len(points) ** 0.5
    return centred / scale.clamp_min(torch.finfo(torch.float64).tiny)


def _values(points: Tensor) -> Tensor:  # (n, 8) -> (n,)
    """A number for each value, from 0: equal rows, but for rounding, are neighbours in the order of a direction."""
    order = points[:, 0].argsort()
    values = torch.zeros_like(order)
    values[order[1:]] = (points[order].diff(dim=0).abs() > _SAME).any(1).cumsum(0)
    return values


def _joined(labels: Tensor) -> Tensor:  # (k, n) -> (n,)
    """The connected components of rows that have any of k labels in common, numbered from 0.

    Each row points to the first that it is known to be joined to (after Shiloach and Vishkin, 1982).
    """
    found = torch.arange(labels.shape[1], device=labels.device)
    while True:
        before = found
        for each in labels:
            first = torch.full_like(found, len(found)).scatter_reduce(0, each, found, "amin")
            found = first[each]
            found = found[found]
        if torch.equal(found, before):
            return found.unique(return_inverse=True)[1]


def _drawn(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:  # (n,) -> (n,), bool
    """The rows of some labels, drawn so that they are about this share of all rows; none of a label of most rows."""
    counts = labels.bincount()
    keys = torch.rand(len(counts), generator=generator, dtype=torch.float32, device="cpu") + (2 * counts > len(labels))
    order = keys.argsort()
    sums = counts[order].cumsum(0)
    return torch.isin(labels, order[2 * sums - counts[order] <= int(2 * share * len(labels))])


def _without_copies(fit: Tensor, held: Tensor, points: Tensor) -> Tensor:  # (n,), (n,), (n, d) -> (n,), bool
    """The rows of `fit` that are no near-copies of held-out ones."""
    found = fit.clone()
    for rows in fit.nonzero()[:, 0].split(_BLOCK) if held.any() else ():
        found[rows] = torch.cdist(points[rows], points[held]).amin(1) > _NEAR
    return found
