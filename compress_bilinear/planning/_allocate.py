"""What to choose from the fronts of a network's layers: under one limit for each, or in one size for all."""

import math
from collections.abc import Mapping, Sequence

from ..errors import InfeasibleError
from ..fitting import Option


def best_within(options: Sequence[Option], limit: float, prefer: str) -> Option:
    """The cheapest option whose error is at most `limit`: keeping the layer always is one."""
    fit = [option for option in options if option.error <= limit]
    if prefer == "speed":
        return min(fit, key=lambda option: (option.latency or math.inf, option.bytes))
    return min(fit, key=lambda option: (option.bytes, option.error))


def allocate(fronts: Mapping[str, Sequence[Option]], budget: int, prefer: str) -> dict[str, Option]:
    """One option for each layer, of at most `budget` bytes in all, with the least sum of squared errors that was found.

    Greedy along the lower convex hulls of the fronts (the Lagrangian optimum for the budgets at its steps: Shoham and
    Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988); then what is left of the budget goes
    to whatever single change still lowers the sum most.

    Raises: InfeasibleError where even the smallest options together are larger.
    """
    # what loses all of a layer's outputs is no replacement: the layer would be kept, whatever its bytes
    fronts = {name: [o for o in options if o.error < 1] for name, options in fronts.items()}
    if prefer == "speed":
        fronts = _not_slower(fronts, budget)
    chosen = {name: min(options, key=lambda o: (o.bytes, o.error)) for name, options in fronts.items()}
    left = budget - sum(option.bytes for option in chosen.values())
    if left < 0:
        raise InfeasibleError(
            f"A size of {budget} bytes for {len(chosen)} layers is out of reach: the smallest replacements that were "
            f"tried take {budget - left}."
        )
    hulls = {name: _hull(options) for name, options in fronts.items()}
    for along_hulls in (True, False):
        while True:
            best: tuple[float, str, Option] | None = None
            for name, now in chosen.items():
                for option in hulls[name] if along_hulls else fronts[name]:
                    more, gain = option.bytes - now.bytes, now.error**2 - option.error**2
                    if gain <= 0 or more > left:
                        continue
                    value = (gain / more if more > 0 else math.inf) if along_hulls else gain
                    if best is None or value > best[0]:
                        best = (value, name, option)
            if best is None:
                break
            _, name, option = best
            left -= option.bytes - chosen[name].bytes
            chosen[name] = option
    if prefer == "speed":
        for name, now in chosen.items():
            as_good = [o for o in fronts[name] if o.bytes <= now.bytes and o.error <= now.error]
            chosen[name] = min([now, *as_good], key=lambda o: math.inf if o.latency is None else o.latency)
    return chosen


def _not_slower(fronts: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Sequence[Option]]:
    """What is not slower than each layer itself; all, for the layers that are largest so, until the budget is met."""
    quick: dict[str, Sequence[Option]] = {}
    for name, options in fronts.items():
        kept = next(option for option in options if option.config is None)
        quick[name] = [o for o in options if o.latency is None or kept.latency is None or o.latency <= kept.latency]

    def saved(name: str) -> int:
        return min(o.bytes for o in quick[name]) - min(o.bytes for o in fronts[name])

    while sum(min(o.bytes for o in options) for options in quick.values()) > budget:
        name = max(quick, key=saved)
        if saved(name) == 0:
            break
        quick[name] = fronts[name]
    return quick


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of squared error over bytes, from the smallest option on."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(first: Option, second: Option) -> float:
    return (second.error**2 - first.error**2) / max(second.bytes - first.bytes, 1)
