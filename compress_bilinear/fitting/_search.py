"""Which methods, ranks and storage formats there are for a layer, and what each is measured to lose and to cost."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import get_args

import torch
from torch import nn

from .. import ops
from ..config import CPConfig, DenseConfig, LayerConfig, MaxSize, Quantize, TuckerConfig
from ..decomposition import Progress
from ..errors import CompressionError, InfeasibleError
from ..quantization import FORMATS
from ._candidate import Option
from ._fit import Fitted, Fitting
from ._fit_weight import WeightFitting
from ._measure import latencies, stored_bytes

_MOST_TRIES = 12  # sizes, in the search for the smallest
_LEAST_FRACTION, _MOST_FRACTION = 1e-4, 0.97
_FIRST_FRACTION = 0.125
_SHARE = 0.25  # of the time left, for one replacement
_CLOSE = 1.04  # ratio of two sizes, the larger of which meets a limit and the smaller does not
_STEPS = (0.5, 0.7, 1.0)  # times the fraction that all layers may take: the sizes that are tried for a single layer
_MORE_STEPS = (1.4, 2.0, 4.0)  # and where others may leave it some of theirs
_FULL = 0.9  # of the weight's numbers: factors of more are hardly smaller than the weight in the same format
_MOST_COMPONENTS = 8  # times the largest size: a CP of more takes minutes, and is little smaller than the weight
_ROUNDING = 0.03  # an error above which that of 8-bit rounding hardly matters, and a lower rank in more bits loses
_NEARLY = 1.05  # times a limit: an error from which a search may still meet it
_DENSE = 0.05  # of the work
_BEHIND = 1.6  # times the least error at a size


class Chooser:
    """Tries replacements for one layer, and remembers them in `options`; keeping the layer is the first."""

    _many: tuple[Quantize | None, ...]

    def __init__(
        self,
        layer: nn.Bilinear,
        fitting: Fitting,
        seconds: float | None = None,
        progress: Progress | None = None,
        seed: int = 0,
        exact: bool = False,
    ) -> None:
        """`exact` has the unrounded dense layer compete too, which is for speed."""
        self.layer, self.fitting = layer, fitting
        self._seconds, self._progress, self._seed, self._exact = seconds, progress, seed, exact
        # formats of few bits nearly always win; a layer in half precision has 16 bits already
        self._few = tuple(name for name in get_args(Quantize) if FORMATS[name].coarse)
        fewer = (n for n in get_args(Quantize) if 8 < FORMATS[n].bits < 8 * layer.weight.element_size())
        self._many = (*fewer, None)
        self._found: dict[tuple[LayerConfig, float], Fitted | None] = {}
        self._begun = time.perf_counter()
        self._span = (0.0, 1.0)
        shape = (layer.out_features, layer.in1_features, layer.in2_features)
        self.options = [Option(None, None, stored_bytes(layer), ops.dense_flops(shape), 0.0)]

    def within(self, limit: float, fast: bool = False) -> None:
        """Try to find, for every method and format, the smallest replacement whose error is at most `limit`.

        What cannot be smaller than others is left out, unless it may be the fastest, and `fast` asks for that.
        """
        self._dense()
        kinds: list[CPConfig | TuckerConfig] = [*map(_tucker, self._few)]  # which are found sooner
        kinds += [_cp(q, self._seed) for q in self._few]
        wide: list[CPConfig | TuckerConfig] = [kind for q in self._many for kind in (_tucker(q), _cp(q, self._seed))]
        for number, config in enumerate((*kinds, *wide)):
            alike = [o for o in self.options if type(o.config) is type(config)]
            if not fast and number >= len(kinds) and any(option.error <= limit for option in alike):
                continue  # the same rank in more bits is hardly better, and larger
            self._reach(number, len((*kinds, *wide)))
            if not fast and not self._may_win(config, limit):
                continue
            if isinstance(self.fitting, WeightFitting):
                self._exactly(config, self.fitting, limit)
            else:
                self.smallest(config, limit)

    def _may_win(self, config: CPConfig | TuckerConfig, limit: float) -> bool:
        """Whether it meets the limit, or nearly does, in the bytes of the smallest that has been found to do so."""
        size = min(option.bytes for option in self.options if option.error <= limit) / self.options[0].bytes
        if size > self._largest(config):
            return True  # so far it is the layer itself, or nothing of this kind is so large
        with self.fitting.probing():
            found = self._at(config, size)
        return found is None or found.error <= _NEARLY * limit

    def _exactly(self, config: CPConfig | TuckerConfig, fitting: WeightFitting, limit: float) -> None:
        """The smallest within `limit`, by the solvers' own search for it."""
        left = self._left()
        if left is not None and left <= 0:
            return
        try:
            found = fitting.within(
                config,
                limit,
                seconds=None if left is None else _SHARE * left,
                progress=self._reported(),
            )
        except CompressionError:  # out of reach
            return
        if stored_bytes(found.module) < self.options[0].bytes:
            self._add(replace(config, rank=found.module.rank), found)  # type: ignore[arg-type]

    def smallest(self, config: CPConfig | TuckerConfig, limit: float) -> list[Fitted]:
        """What was found while closing in on the smallest replacement of this kind within `limit`."""
        return [found for _, found in smallest(lambda size: self._at(config, size), limit, self._largest(config))]

    def sized(self, fraction: float, alone: bool) -> None:
        """Try every method and format at sizes around this fraction of the layer's bytes."""
        self._dense()
        steps = _STEPS if alone else (*_STEPS, *_MORE_STEPS)
        sizes = sorted({min(step * fraction, _MOST_FRACTION) for step in steps}, reverse=True)
        behind: set[LayerConfig] = set()
        for number, size in enumerate(sizes):
            self._reach(number, len(sizes))
            rounded = self._least(size)
            self._all_at(map(_tucker, self._few), size, behind)
            # where the whole weight in fewer bits loses little, only a weight of low rank has a CP that loses less
            if rounded > _ROUNDING or self._least(size) < rounded:
                self._all_at((_cp(q, self._seed) for q in self._few), size, behind)
            # lower ranks in more bits: where even Tucker's, which are found soon, gain nothing, none do
            low_rank = self._least(size, (CPConfig, TuckerConfig)) < min(_ROUNDING, self._least(size, (DenseConfig,)))
            for quantize in self._many if low_rank else ():
                before = self._least(size)
                self._all_at([_tucker(quantize)], size, behind)
                # nor does CP, unless in few bits it is the best: of full multilinear rank it may yet be exact
                if self._least(size) == before and self._least(size, (CPConfig,)) > before:
                    continue  # to more bits, whose own rounding may be below what was found
                self._all_at([_cp(quantize, self._seed)], size, behind)

    def _all_at(self, configs: Iterable[CPConfig | TuckerConfig], size: float, behind: set[LayerConfig]) -> None:
        """Try those that are not far behind, and note those that are: so they would be at the next smaller size."""
        found = {config: self._at(config, size) for config in configs if config not in behind}
        for config, fit in found.items():
            # dense ones may not fit at the next
            least = self._least(min(size, self._largest(config)), (CPConfig, TuckerConfig))
            if fit is not None and fit.error > _BEHIND * least:
                behind.add(config)

    def _least(self, fraction: float, kinds: tuple[type, ...] = (object,)) -> float:
        """The least error that was found in this size, of all or of these kinds of configs."""
        most = fraction * self.options[0].bytes
        fit = (option.error for option in self.options if option.bytes <= most and isinstance(option.config, kinds))
        return min(fit, default=math.inf)

    def _dense(self) -> None:
        """8-bit dense is near lossless at a quarter of the size: what all others have to beat."""
        formats = (*self._few, *(q for q in self._many if q is not None or self._exact))
        for number, quantize in enumerate(formats):
            self._span = (_DENSE * number / len(formats), _DENSE * (number + 1) / len(formats))
            config = DenseConfig(quantize=quantize)
            left = self._left()
            seconds = None if left is None else max(_SHARE * left, 1e-3)
            self._add(config, self.fitting.dense(config, seconds=seconds, progress=self._reported()))

    def assured(self, option: Option, seconds: float | None = None, progress: Progress | None = None) -> Option:
        """The option, or what is as small and does better where it is fitted to the plain weight.

        Where that does better for it, it may for other methods and formats too, which are then compared with it. An
        option with a latency stays of its kind and rank.
        """
        if not isinstance(option.config, (CPConfig, TuckerConfig)):
            return option
        smaller = sorted((o for o in self.options if o.bytes <= option.bytes), key=lambda o: o.error)
        kinds = {_kind(option): option}
        for other in smaller if option.latency is None else ():
            if isinstance(other.config, (CPConfig, TuckerConfig)):
                kinds.setdefault(_kind(other), other)
        begun, best = time.perf_counter(), option
        for number, each in enumerate(kinds.values()):
            left = None if seconds is None else seconds - (time.perf_counter() - begun)
            if number and (best.error == option.error or (left is not None and left <= 0)):
                break
            assert isinstance(each.config, (CPConfig, TuckerConfig))
            assert each.fitted is not None
            found = self.fitting.assured(
                each.config,
                each.fitted,
                seconds=left and max(left, 1e-3),
                progress=progress,
                same_rank=option.latency is not None,
            )
            if found.error < best.error:
                config = replace(each.config, rank=found.module.rank)  # type: ignore[arg-type]
                sizes = stored_bytes(found.module), found.module.flops_per_row
                best = Option(config, found, *sizes, found.error, option.latency)
        return best

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
        """The replacement of this kind and size, or the largest below; None where there is none, or no time for it."""
        fraction = min(fraction, self._largest(config))
        if (config, fraction) not in self._found:
            self._found[config, fraction] = self._solved(config, fraction)
        return self._found[config, fraction]

    def _solved(self, config: CPConfig | TuckerConfig, fraction: float) -> Fitted | None:
        left = self._left()
        if left is not None and left <= 0:
            return None
        try:
            found = self.fitting.at(
                config,
                without_bias(MaxSize(fraction), self.layer),
                seconds=None if left is None else _SHARE * left,
                progress=self._reported(),
                thorough=False,
            )
        except CompressionError:  # too small for any rank, or factors out of range
            return None
        if stored_bytes(found.module) >= self.options[0].bytes:
            return None
        self._add(replace(config, rank=found.module.rank), found)  # type: ignore[arg-type]
        return found

    def _left(self) -> float | None:
        """Seconds until the search is to end; None where it has no limit."""
        return None if self._seconds is None else self._seconds - (time.perf_counter() - self._begun)

    def _reach(self, number: int, count: int) -> None:
        """What is reported from here on is of this one of so many parts of the work after the dense layers."""
        self._span = tuple(_DENSE + (1 - _DENSE) * part / count for part in (number, number + 1))  # type: ignore[assignment]

    def _reported(self) -> Progress | None:
        told, (start, end) = self._progress, self._span
        return told and (lambda part, error: told(start + (end - start) * part, error))

    def _largest(self, config: CPConfig | TuckerConfig) -> float:
        """The size from which the weight itself in this format is about as small, and loses nothing else."""
        bound = min(_MOST_FRACTION, _FULL / self._numbers(config))
        if isinstance(config, TuckerConfig):
            return bound
        shape = self.layer.weight.shape
        components = self._numbers(config) * shape.numel() / (sum(shape) * max(shape))  # for each index of the longest
        return min(bound, _MOST_COMPONENTS / components)

    def _numbers(self, config: CPConfig | TuckerConfig) -> float:
        """How many numbers the layer's bytes would hold, for each of the weight's; scales are left out."""
        size = self.layer.weight.element_size()
        return 1.0 if config.quantize is None else 8 * size / FORMATS[config.quantize].bits

    def _add(self, wanted: LayerConfig, found: Fitted) -> None:
        size, flops = stored_bytes(found.module), found.module.flops_per_row
        self.options.append(Option(wanted, found, size, flops, found.error))


def _kind(option: Option) -> tuple[type, Quantize | None]:
    return type(option.config), None if option.config is None else option.config.quantize


def _cp(quantize: Quantize | None, seed: int) -> CPConfig:
    return CPConfig(rank=1, quantize=quantize, seed=seed)


def _tucker(quantize: Quantize | None) -> TuckerConfig:
    return TuckerConfig(rank=(1, 1, 1), quantize=quantize)


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


def smallest(
    evaluate: Callable[[float], Fitted | None], limit: float, largest: float = _MOST_FRACTION
) -> list[tuple[float, Fitted]]:
    """Fractions of a layer's bytes and the replacements there, found while closing in on the smallest within `limit`.

    `evaluate` gives None where nothing is so small. The error falls about as a power of the size, which tells where to
    look next; sizes are bracketed to within 4%. Where nothing in the list meets the limit, nothing up to `largest`
    does.
    """
    tried: list[tuple[float, Fitted]] = []
    low, high = None, None
    fraction = min(_FIRST_FRACTION, largest)
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
            if fraction >= largest:
                break
            fraction = min(largest, 2 * fraction)
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
