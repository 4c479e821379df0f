"""Choose one candidate for each layer: under one limit for each, or within one size for all."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy
from numpy.typing import NDArray

from ..errors import InfeasibleError
from ..fitting import Candidate, smallest_within
from ..modules import method_name
from ..report import Note, error, size

_Array: TypeAlias = NDArray[numpy.float64]

_STATES = 4000  # undominated partial choices above which some are left out
_ABOVE = 1.08  # times a size: what lies just above it


def best_within(candidates: Sequence[Candidate], limit: float, prefer: str) -> Candidate:
    """The cheapest candidate whose error is at most `limit`; keeping the layer always is one."""
    if prefer == "speed":
        fit = [candidate for candidate in candidates if candidate.error <= limit]
        return min(fit, key=lambda candidate: (candidate.latency or math.inf, candidate.bytes))
    return smallest_within(candidates, limit)


def allocate(fronts: Mapping[str, Sequence[Candidate]], budget: int, prefer: str) -> dict[str, Candidate]:
    """One candidate for each layer, of at most `budget` bytes in all, with the least sum of squared errors.

    With `prefer="speed"`, as few layers as possible become slower, and what is as small and as good is the fastest.
    The first candidate of each layer keeps it. See `_least_sum`.

    Raises: InfeasibleError where even the smallest candidates together are larger.
    """
    # a candidate that loses all of a layer's outputs is no replacement, whatever its bytes
    usable = [[c for c in candidates if c.error < 1] for candidates in fronts.values()]
    least = sum(min(c.bytes for c in candidates) for candidates in usable)
    if least > budget:
        raise InfeasibleError(
            f"A size of {budget} bytes for {len(fronts)} layers is out of reach: the smallest replacements that were "
            f"tried take {least}."
        )

    def loss(candidate: Candidate, kept: Candidate) -> float:
        slower = prefer == "speed" and (candidate.latency or 0.0) > (kept.latency or math.inf)
        return candidate.error**2 + slower * len(fronts)

    sizes = [[c.bytes for c in candidates] for candidates in usable]
    losses = [[loss(c, candidates[0]) for c in candidates] for candidates in usable]
    chosen = {}
    for name, candidates, k in zip(fronts, usable, _least_sum(sizes, losses, budget), strict=True):
        now = candidates[k]
        as_good = [c for c in candidates if prefer == "speed" and c.bytes <= now.bytes and c.error <= now.error]
        chosen[name] = min([now, *as_good], key=lambda c: math.inf if c.latency is None else c.latency)
    return chosen


def just_above(
    fronts: Mapping[str, Sequence[Candidate]], budget: int, prefer: str, chosen: Mapping[str, Candidate]
) -> dict[str, tuple[Note, ...]]:
    """What some layers would become within a few percent more than the budget, where that at least halves the error."""

    def loss(candidates: Iterable[Candidate]) -> float:
        return sum(candidate.error**2 for candidate in candidates)

    def note(each: Candidate) -> Note:
        quantize = each.config and each.config.quantize
        what = "the layer itself" if each.config is None else f"{method_name(each.config)} {quantize or 'unrounded'}"
        what += f" with an error of {error(each.error)} in {size(each.bytes)}"
        return Note("just_above", f"just above this size: {what}, by `size={math.ceil(1e4 * fraction + 1e-3) / 1e4:g}`")

    found = allocate(fronts, int(_ABOVE * budget), prefer)
    fraction = sum(c.bytes for c in found.values()) / sum(candidates[0].bytes for candidates in fronts.values())
    if fraction >= 1 or 4 * loss(found.values()) > loss(chosen.values()):
        return {}
    return {name: (note(each),) for name, each in found.items() if each.error < chosen[name].error}


def _least_sum(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The number of one candidate of each layer, within the budget and with the least sum of losses: a knapsack.

    Dynamic programming: layer by layer, all undominated pairs of bytes and loss so far. What cannot be better than a
    known choice is left out, by the bound that a price on bytes gives (Dyer, Kayal and Walker, "A branch and bound
    algorithm for solving the multiple-choice knapsack problem", 1984). This is exact while the pairs are few, as with
    tens of layers. Of more, some at even distances go on, and the sum is within about 1e-4 of the least.
    """
    size, loss = (numpy.full((len(sizes), max(map(len, sizes))), numpy.inf) for _ in range(2))
    for k, values in enumerate(sizes):
        size[k, : len(values)], loss[k, : len(values)] = values, losses[k]
    price, known = _priced(size, loss, budget)
    least = numpy.add.accumulate(numpy.take_along_axis(loss, known[:, None], 1))[-1, 0]
    priced = loss + price * size
    cheapest, smallest = priced.min(1).cumsum(), size.min(1).cumsum()
    # how far above the cheapest at this price a choice can be that is better than the known one; and rounding
    excess = (1 + 1e-9) * (least + price * budget) - cheapest[-1]
    sums, lost, steps = numpy.zeros(1), numpy.zeros(1), []
    for k in range(len(sizes)):
        near = numpy.flatnonzero(priced[k] <= priced[k].min() + excess)
        sums, lost = numpy.add.outer(sums, size[k, near]).ravel(), numpy.add.outer(lost, loss[k, near]).ravel()
        fits = (sums <= budget - smallest[-1] + smallest[k]) & (lost + price * sums <= cheapest[k] + excess)
        kept = numpy.flatnonzero(fits)
        kept = kept[_undominated(sums[kept], lost[kept])]
        sums, lost = sums[kept], lost[kept]
        steps.append((kept // len(near), near[kept % len(near)]))
    if len(lost) == 0 or lost[-1] > least:  # where too few pairs went on
        return [int(k) for k in known]
    picked, last = [], len(lost) - 1
    for former, number in reversed(steps):
        picked.append(int(number[last]))
        last = former[last]
    return picked[::-1]


def _undominated(sums: _Array, lost: _Array) -> NDArray[numpy.int64]:
    """The indices of undominated pairs, by bytes; of too many, the last in each of `_STATES` equal ranges of bytes."""
    index = numpy.lexsort((lost, sums))
    ordered = numpy.append(numpy.inf, lost[index])
    index = index[ordered[1:] < numpy.minimum.accumulate(ordered)[:-1]]
    if len(index) > _STATES:
        ranges = (sums[index] - sums[index[0]]) * _STATES // (sums[index[-1]] - sums[index[0]] + 1)
        index = index[numpy.append(ranges[1:] != ranges[:-1], True)]
    return index


def _priced(size: _Array, loss: _Array, budget: int) -> tuple[float, NDArray[numpy.int64]]:
    """The least price of a byte at which the cheapest candidates fit into the budget, and these."""
    rows, low, high = numpy.arange(len(size)), 0.0, float(len(size) + 1)  # above every loss: the smallest are cheapest
    smaller = (loss + high * size).argmin(1)
    for _ in range(64):
        price = (low + high) / 2
        cheapest = (loss + price * size).argmin(1)
        if size[rows, cheapest].sum() <= budget:
            high, smaller = price, cheapest
        else:
            low = price
    return high, smaller
