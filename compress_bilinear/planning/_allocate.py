"""Choose one candidate for each layer: under one limit for each, or within one size for all."""

import math
from collections.abc import Mapping, Sequence

from ..errors import InfeasibleError
from ..fitting import Candidate


def best_within(candidates: Sequence[Candidate], limit: float, prefer: str) -> Candidate:
    """The cheapest candidate whose error is at most `limit`; keeping the layer always is one."""
    fit = [candidate for candidate in candidates if candidate.error <= limit]
    if prefer == "speed":
        return min(fit, key=lambda candidate: (candidate.latency or math.inf, candidate.bytes))
    return min(fit, key=lambda candidate: (candidate.bytes, candidate.error))


def allocate(fronts: Mapping[str, Sequence[Candidate]], budget: int, prefer: str) -> dict[str, Candidate]:
    """One candidate for each layer, of at most `budget` bytes in all, with the least sum of squared errors found.

    Greedy along the lower convex hulls of the fronts (the Lagrangian optimum for the budgets at its steps: Shoham and
    Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988). Then what is left of the budget goes
    to whatever single change still lowers the sum most.

    Raises: InfeasibleError where even the smallest candidates together are larger.
    """
    # a candidate that loses all of a layer's outputs is no replacement, whatever its bytes
    fronts = {name: [c for c in candidates if c.error < 1] for name, candidates in fronts.items()}
    if prefer == "speed":
        fronts = _not_slower(fronts, budget)
    chosen = {name: min(candidates, key=lambda c: (c.bytes, c.error)) for name, candidates in fronts.items()}
    left = budget - sum(candidate.bytes for candidate in chosen.values())
    if left < 0:
        raise InfeasibleError(
            f"A size of {budget} bytes for {len(chosen)} layers is out of reach: the smallest replacements that were "
            f"tried take {budget - left}."
        )
    hulls = {name: _hull(candidates) for name, candidates in fronts.items()}
    left = _spend(chosen, hulls, left, per_byte=True)
    _spend(chosen, fronts, left, per_byte=False)
    if prefer == "speed":
        for name, now in chosen.items():
            as_good = [c for c in fronts[name] if c.bytes <= now.bytes and c.error <= now.error]
            chosen[name] = min([now, *as_good], key=lambda c: math.inf if c.latency is None else c.latency)
    return chosen


def _spend(chosen: dict[str, Candidate], fronts: Mapping[str, Sequence[Candidate]], left: int, per_byte: bool) -> int:
    """Make the change that gains most, for each byte or in all, until none fits into what is left; returns that."""
    while True:
        best: tuple[float, str, Candidate] | None = None
        for name, now in chosen.items():
            for candidate in fronts[name]:
                more, gain = candidate.bytes - now.bytes, now.error**2 - candidate.error**2
                if gain <= 0 or more > left:
                    continue
                value = gain if not per_byte else gain / more if more > 0 else math.inf
                if best is None or value > best[0]:
                    best = (value, name, candidate)
        if best is None:
            return left
        _, name, candidate = best
        left -= candidate.bytes - chosen[name].bytes
        chosen[name] = candidate


def _not_slower(fronts: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, Sequence[Candidate]]:
    """Drop candidates slower than the original layer; restore them where that saves most until the budget is met."""
    quick: dict[str, Sequence[Candidate]] = {}
    for name, candidates in fronts.items():
        kept = next(candidate for candidate in candidates if candidate.config is None)
        quick[name] = [c for c in candidates if c.latency is None or kept.latency is None or c.latency <= kept.latency]

    def saved(name: str) -> int:
        return min(c.bytes for c in quick[name]) - min(c.bytes for c in fronts[name])

    while sum(min(c.bytes for c in candidates) for candidates in quick.values()) > budget:
        name = max(quick, key=saved)
        if saved(name) == 0:
            break
        quick[name] = fronts[name]
    return quick


def _hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The lower convex hull of squared error over bytes, from the smallest candidate on."""
    hull: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.bytes, c.error)):
        if hull and candidate.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull


def _slope(first: Candidate, second: Candidate) -> float:
    return (second.error**2 - first.error**2) / max(second.bytes - first.bytes, 1)
