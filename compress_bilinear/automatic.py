"""Which method, rank and storage format for each layer: fronts of what was measured, and one choice over all layers."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import nn

from . import ops
from .config import CPConfig, DenseConfig, LayerConfig, MaxSize, Quantize, TuckerConfig
from .decomposition import Progress
from .errors import CompressionError, InfeasibleError
from .fitting import Fitted, Fitting
from .measure import latencies, stored_bytes
from .weight_fitting import WeightFitting

_MOST_TRIES = 12  # sizes, in the search for the smallest
_LEAST_FRACTION, _MOST_FRACTION = 1e-4, 0.97
_FIRST_FRACTION = 0.125
_SHARE = 0.25  # of the time left, for one replacement
_CLOSE = 1.04  # ratio of two sizes, the larger of which meets a limit and the smaller does not
_STEPS = (0.5, 0.7, 1.0)  # times the fraction that all layers may take: the sizes that are tried for a single layer
_MORE_STEPS = (1.4, 2.0, 4.0)  # and where others may leave it some of theirs
_FULL = 0.9  # of the weight's numbers: factors of more are hardly smaller than the weight in the same format
_MOST_COMPONENTS = (
    8  # times the largest size: a CP of more takes minutes to solve, to be little smaller than the weight
)
_ROUNDING = 0.03  # an error above which that of 8-bit rounding hardly matters, and a lower rank in full precision loses

FORMATS: tuple[Quantize, ...] = get_args(Quantize)


@dataclass(frozen=True, eq=False)
class Option:
    """One way to replace a layer, or to keep it.

    Attributes:
        config: what asks for exactly this; None keeps the layer.
        fitted: the replacement; None keeps the layer.
        bytes, flops: everything that is stored, and the work for a row.
        error: of the outputs on held-out rows; without calibration, of the weight.
        latency: median milliseconds of a call; None where nothing was timed.
    """

    config: LayerConfig | None
    fitted: Fitted | None
    bytes: int
    flops: int
    error: float
    latency: float | None = None


class Chooser:
    """Tries replacements for one layer, and remembers them in `options`; keeping the layer is the first."""

    def __init__(
        self,
        layer: nn.Bilinear,
        fitting: Fitting,
        seconds: float | None = None,
        progress: Progress | None = None,
        seed: int = 0,
    ) -> None:
        self.layer, self.fitting = layer, fitting
        self._seconds, self._progress, self._seed = seconds, progress, seed
        self._begun = time.perf_counter()
        self._span = (0.0, 1.0)
        shape = (layer.out_features, layer.in1_features, layer.in2_features)
        self.options = [Option(None, None, stored_bytes(layer), ops.dense_flops(shape), 0.0)]

    def within(self, limit: float) -> None:
        """Try to find, for every method and format, the smallest replacement whose error is at most `limit`."""
        self._dense()
        for number, quantize in enumerate((*FORMATS, None)):
            for second, config in enumerate(self._configs(quantize)):
                alike = [o for o in self.options if type(o.config) is type(config)]
                if quantize is None and any(option.error <= limit for option in alike):
                    continue  # the same rank in full precision is hardly better, and larger
                self._span = ((2 * number + second) / 6, (2 * number + second + 1) / 6)
                if isinstance(self.fitting, WeightFitting):
                    self._exactly(config, self.fitting, limit)
                else:
                    self.smallest(config, limit)

    def _exactly(self, config: CPConfig | TuckerConfig, fitting: WeightFitting, limit: float) -> None:
        """The smallest within `limit`, by the solvers' own search for it."""
        left = None if self._seconds is None else self._seconds - (time.perf_counter() - self._begun)
        if left is not None and left <= 0:
            return
        told, (start, end) = self._progress, self._span
        try:
            found = fitting.within(
                config,
                limit,
                seconds=None if left is None else _SHARE * left,
                progress=told and (lambda part, error: told(start + (end - start) * part, error)),
            )
        except CompressionError:  # out of reach
            return
        if stored_bytes(found.module) < self.options[0].bytes:
            self._add(replace(config, rank=found.module.rank), found)  # type: ignore[arg-type]

    def smallest(self, config: CPConfig | TuckerConfig, limit: float) -> list[Fitted]:
        """What was found while closing in on the smallest replacement of this kind within `limit`."""
        return [found for _, found in smallest(lambda fraction: self._at(config, fraction), limit)]

    def sized(self, fraction: float, alone: bool) -> None:
        """Try every method and format at sizes around this fraction of the layer's bytes."""
        self._dense()
        steps = _STEPS if alone else (*_STEPS, *_MORE_STEPS)
        sizes = sorted({min(step * fraction, _MOST_FRACTION) for step in steps}, reverse=True)
        for number, size in enumerate(sizes):
            self._span = (number / len(sizes), (number + 1) / len(sizes))
            found = [self._at(config, size) for quantize in FORMATS for config in self._configs(quantize)]
            if any(fitted is not None and fitted.error < _ROUNDING for fitted in found):
                for config in self._configs(None):
                    self._at(config, size)

    def _dense(self) -> None:
        """8-bit dense is near lossless at a quarter of the size: what all others have to beat."""
        for quantize in FORMATS:
            config = DenseConfig(quantize=quantize)
            self._add(config, self.fitting.dense(config))

    def _configs(self, quantize: Quantize | None) -> tuple[CPConfig | TuckerConfig, ...]:
        return CPConfig(rank=1, quantize=quantize, seed=self._seed), TuckerConfig(rank=(1, 1, 1), quantize=quantize)

    def timed(self, rows: int) -> list[Option]:
        """The options with their latencies, measured side by side."""
        weight = self.layer.weight
        generator = torch.Generator().manual_seed(0)
        input1, input2 = (
            torch.randn(rows, size, generator=generator).to(weight.device, weight.dtype)
            for size in (self.layer.in1_features, self.layer.in2_features)
        )

        def run(module: nn.Module) -> Callable[[], object]:
            return lambda: module(input1, input2)

        calls = {str(k): run(o.fitted.module if o.fitted else self.layer) for k, o in enumerate(self.options)}
        with torch.no_grad():
            measured = latencies(calls, weight.device, seconds=0.2 * len(calls))
        return [replace(option, latency=measured[str(k)].median) for k, option in enumerate(self.options)]

    def _at(self, config: CPConfig | TuckerConfig, fraction: float) -> Fitted | None:
        """The replacement of this kind and size; None where there is none, or no time for it."""
        left = None if self._seconds is None else self._seconds - (time.perf_counter() - self._begun)
        if left is not None and left <= 0:
            return None
        if self._numbers(config, fraction) > _FULL or self._components(config, fraction) > _MOST_COMPONENTS:
            return None  # the weight itself in this format is about as small, and loses nothing else
        told, (start, end) = self._progress, self._span
        try:
            found = self.fitting.at(
                config,
                without_bias(MaxSize(fraction), self.layer),
                seconds=None if left is None else _SHARE * left,
                progress=told and (lambda part, error: told(start + (end - start) * part, error)),
                thorough=False,
            )
        except CompressionError:  # too small for any rank, or factors out of range
            return None
        if stored_bytes(found.module) >= self.options[0].bytes:
            return None
        self._add(replace(config, rank=found.module.rank), found)  # type: ignore[arg-type]
        return found

    def _numbers(self, config: CPConfig | TuckerConfig, fraction: float) -> float:
        """How many numbers such a size holds, for each of the weight's; scales are left out."""
        size = self.layer.weight.element_size()
        return fraction * {None: 1.0, "int8": size, "nf4": 2.0 * size}[config.quantize]

    def _components(self, config: CPConfig | TuckerConfig, fraction: float) -> float:
        """How many components a CP of such a size has, for each index of the longest mode."""
        if isinstance(config, TuckerConfig):
            return 0.0
        shape = self.layer.weight.shape
        return self._numbers(config, fraction) * self.layer.weight.numel() / (sum(shape) * max(shape))

    def _add(self, wanted: LayerConfig, found: Fitted) -> None:
        size, flops = stored_bytes(found.module), found.module.flops_per_row
        self.options.append(Option(wanted, found, size, flops, found.error))


def without_bias(target: MaxSize, layer: nn.Bilinear) -> MaxSize:
    """A layer's budget as a fraction of its weight: the bias is stored as it was, and the weight has what is left."""
    weight, total = layer.weight.numel() * layer.weight.element_size(), stored_bytes(layer)
    left = target.fraction * total - (total - weight)
    if left <= 0:
        raise InfeasibleError(
            f"The bias alone takes {total - weight} bytes. MaxSize({target.fraction:g}) of the layer's {total} bytes "
            f"allows {int(target.fraction * total)}."
        )
    return MaxSize(min(left / weight, 1 - 1e-9))


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


def smallest(evaluate: Callable[[float], Fitted | None], limit: float) -> list[tuple[float, Fitted]]:
    """Fractions of a layer's bytes and the replacements there, found while closing in on the smallest within `limit`.

    `evaluate` gives None where nothing is so small. The error falls about as a power of the size, which tells where to
    look next; sizes are bracketed to within 4%. Where nothing in the list meets the limit, nothing smaller than the
    layer does.
    """
    tried: list[tuple[float, Fitted]] = []
    low, high = None, None
    fraction = _FIRST_FRACTION
    for _ in range(_MOST_TRIES):
        found = evaluate(fraction)
        if found is not None:
            tried.append((fraction, found))
        point = (fraction, max(found.error, 1e-12) if found is not None else None)
        if found is not None and found.error <= limit:
            high = point
        else:
            low = point
        if high is None:
            if fraction >= _MOST_FRACTION:
                break
            fraction = min(_MOST_FRACTION, 2 * fraction)
        elif low is None:
            fraction /= 2
            if fraction < _LEAST_FRACTION:
                break
        elif high[0] / low[0] < _CLOSE:
            break
        else:
            fraction = _between(low, high, limit)
    return tried


def _between(low: tuple[float, float | None], high: tuple[float, float | None], limit: float) -> float:
    """Where a power law through the two points meets the limit, but well within them."""
    ratio = high[0] / low[0]
    part = 0.5
    if low[1] is not None and high[1] is not None and low[1] > high[1] and low[1] < math.inf:
        part = math.log(low[1] / limit) / math.log(low[1] / high[1])
    return low[0] * ratio ** min(max(part, 0.15), 0.85)
