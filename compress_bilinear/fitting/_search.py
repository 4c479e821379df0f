"""Which methods, ranks and formats to try for one layer of an `AutoConfig`, or under a `MaxError` on the outputs."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import nn

from ..config import DenseConfig, LayerConfig, MaxSize, Quantize
from ..decomposition import Budget, smallest
from ..errors import CompressionError, InfeasibleError
from ..modules import METHODS, Method, method_of
from ..quantization import FORMATS
from ._candidate import Candidate
from ._fit_weight import WeightFitting
from ._latency import latencies, timing_inputs
from ._measure import stored_bytes

_MOST_TRIES = 12  # sizes, in the search for the smallest
_LEAST_FRACTION, _MOST_FRACTION = 1e-4, 0.97
_FIRST_FRACTION = 0.125
_SHARE = 0.25  # of the time left, for one candidate
_STEPS = (0.5, 0.7, 1.0)  # times the fraction that all layers may take: the sizes that are tried for a single layer
_MORE_STEPS = (1.4, 2.0, 4.0)  # and where other layers may leave it some of theirs
_FULL = 0.9  # of the weight's numbers: factors of more are hardly smaller than the weight in the same format
_ROUNDING = 0.03  # an error above which that of 8-bit rounding hardly matters, and a lower rank in more bits loses
_NEARLY = 1.05  # times a limit: an error from which a search may still meet it
_DENSE = 0.05  # of the work
_BEHIND = 1.6  # times the least error at a size


class Search:
    """Tries candidates for one layer and collects them in `candidates`; keeping the layer is the first."""

    def __init__(
        self, fitting: WeightFitting, budget: Budget | None = None, seed: int = 0, exact: bool = False
    ) -> None:
        """`exact` lets the unrounded dense layer compete too, for its speed."""
        self.fitting, self.layer = fitting, fitting.layer
        self._budget, self._seed, self._exact = budget or Budget(), seed, exact
        bits = 8 * self.layer.weight.element_size()
        # formats of few bits nearly always win; a layer in half precision has 16 bits already
        self._few: tuple[Quantize, ...] = tuple(name for name in get_args(Quantize) if FORMATS[name].coarse)
        wide = [name for name in get_args(Quantize) if 8 < FORMATS[name].bits < bits]
        self._many: tuple[Quantize | None, ...] = (*wide, None)
        self._quick = [row for row in METHODS.values() if row.solve is not None and not row.slow]
        self._slow = [row for row in METHODS.values() if row.solve is not None and row.slow]
        self._tried: dict[tuple[LayerConfig, float], Candidate | None] = {}
        self._span = (0.0, 1.0)
        self.candidates = [Candidate.kept(self.layer)]

    def within(self, limit: float, fast: bool = False) -> None:
        """Try to find, for every method and format, the smallest candidate whose error is at most `limit`.

        What cannot be smaller than others is left out, unless it may be the fastest, and `fast` asks for that.
        """
        self._dense()
        few = [*self._configs(self._quick, self._few), *self._configs(self._slow, self._few)]
        wide = [config for q in self._many for config in self._configs([*self._quick, *self._slow], [q])]
        for number, config in enumerate((*few, *wide)):
            alike = [each for each in self.candidates if type(each.config) is type(config)]
            if not fast and number >= len(few) and any(each.error <= limit for each in alike):
                continue  # the same rank in more bits is hardly better, and larger
            self._reach(number, len(few) + len(wide))
            if not fast and not self._may_win(config, limit):
                continue
            if self.fitting.on_output:
                self.smallest(config, limit)
            else:
                self._solved_within(config, limit)

    def smallest(self, config: LayerConfig, limit: float) -> list[Candidate]:
        """What was tried while closing in on the smallest candidate of this method and format within `limit`."""

        def attempt(size: float) -> tuple[Candidate, float] | None:
            found = self._at(config, size)
            return None if found is None else (found, found.error)

        largest = self._largest(config)
        trials = smallest(attempt, limit, _LEAST_FRACTION, largest, first=_FIRST_FRACTION, tries=_MOST_TRIES)
        return [trial.result for trial in trials if trial.result is not None]

    def sized(self, fraction: float, alone: bool) -> None:
        """Try every method and format at sizes around this fraction of the layer's bytes."""
        self._dense()
        steps = _STEPS if alone else (*_STEPS, *_MORE_STEPS)
        sizes = sorted({min(step * fraction, _MOST_FRACTION) for step in steps}, reverse=True)
        behind: set[LayerConfig] = set()
        for number, size in enumerate(sizes):
            self._reach(number, len(sizes))
            rounded = self._least(size)
            self._all_at(self._configs(self._quick, self._few), size, behind)
            # where the whole weight in few bits loses little, a slow method gains only on a weight of low rank
            if rounded > _ROUNDING or self._least(size) < rounded:
                self._all_at(self._configs(self._slow, self._few), size, behind)
            # lower ranks in more bits gain only on a weight of low rank: the quick methods tell
            whole = self._least(size, lambda config: isinstance(config, DenseConfig))
            factors = self._least(size, _decomposes)
            for quantize in self._many if factors < min(_ROUNDING, whole) else ():
                before = self._least(size)
                self._all_at(self._configs(self._quick, [quantize]), size, behind)
                # also try CP if CP is best in few bits: a tensor of full multilinear rank can have a low CP rank
                if self._least(size) == before and self._least(size, _is_slow) > before:
                    continue
                self._all_at(self._configs(self._slow, [quantize]), size, behind)

    def improved(self, candidate: Candidate, budget: Budget) -> Candidate:
        """The candidate, or one that is as small and does better where it is fitted to the plain weight.

        Where that does better for it, it may for other methods and formats too, which are then compared with it. A
        candidate with a latency stays of its method and rank.
        """
        if not _decomposes(candidate.config):
            return candidate
        smaller = sorted((each for each in self.candidates if each.bytes <= candidate.bytes), key=lambda c: c.error)
        kinds: dict[tuple[type, Quantize | None], tuple[LayerConfig, Candidate]] = {}
        for each in (candidate, *(smaller if candidate.latency is None else ())):
            if each.config is not None and _decomposes(each.config):
                kinds.setdefault((type(each.config), each.config.quantize), (each.config, each))
        best = candidate
        for number, (config, each) in enumerate(kinds.values()):
            if number and (best.error == candidate.error or budget.left() <= 0):
                break
            found = self.fitting.improved(config, each, budget.child(), candidate.latency is not None)
            if found.error < best.error:
                best = replace(found, latency=candidate.latency)
        return best

    def time(self, rows: int) -> None:
        """Measure the latencies of all candidates side by side, in calls of so many rows."""
        inputs = timing_inputs(self.layer, rows)
        calls = {str(k): partial(each.module or self.layer, *inputs) for k, each in enumerate(self.candidates)}
        with torch.no_grad():
            found = latencies(calls, self.layer.weight.device, seconds=0.2 * len(calls))
        self.candidates = [replace(each, latency=found[str(k)].median) for k, each in enumerate(self.candidates)]

    def _dense(self) -> None:
        """8-bit dense is near lossless at a quarter of the size: what all others have to beat."""
        formats = (*self._few, *(q for q in self._many if q is not None or self._exact))
        for number, quantize in enumerate(formats):
            self._span = (_DENSE * number / len(formats), _DENSE * (number + 1) / len(formats))
            self.candidates.append(self.fitting.dense(DenseConfig(quantize=quantize), self._part()))

    def _configs(self, rows: Iterable[Method], formats: Iterable[Quantize | None]) -> list[LayerConfig]:
        formats = list(formats)
        return [row.configure(None, quantize, self._seed) for row in rows for quantize in formats]

    def _all_at(self, configs: Iterable[LayerConfig], size: float, behind: set[LayerConfig]) -> None:
        """Try those that are not far behind, and note those that are: so they would be at the next smaller size."""
        found = {config: self._at(config, size) for config in configs if config not in behind}
        for config, fit in found.items():
            # dense ones may not fit at the next
            least = self._least(min(size, self._largest(config)), _decomposes)
            if fit is not None and fit.error > _BEHIND * least:
                behind.add(config)

    def _may_win(self, config: LayerConfig, limit: float) -> bool:
        """Whether it meets the limit, or nearly does, in the bytes of the smallest that has been found to do so."""
        size = min(each.bytes for each in self.candidates if each.error <= limit) / self.candidates[0].bytes
        if size > self._largest(config):
            return True  # so far it is the layer itself, or nothing of this method is so large
        with self.fitting.probing():
            found = self._at(config, size)
        return found is None or found.error <= _NEARLY * limit

    def _solved_within(self, config: LayerConfig, limit: float) -> None:
        """The smallest within `limit`, by the solvers' own search for it."""
        if self._budget.left() <= 0:
            return
        try:
            found = self.fitting.within(config, limit, self._part())
        except CompressionError:  # out of reach
            return
        if found.bytes < self.candidates[0].bytes:
            self.candidates.append(found)

    def _at(self, config: LayerConfig, fraction: float) -> Candidate | None:
        """The candidate of this kind and size, or the largest below; None where there is none, or no time for it."""
        key = (config, min(fraction, self._largest(config)))
        if key not in self._tried:
            self._tried[key] = self._solved(*key)
        return self._tried[key]

    def _solved(self, config: LayerConfig, fraction: float) -> Candidate | None:
        if self._budget.left() <= 0:
            return None
        try:
            rank = without_bias(MaxSize(fraction), self.layer)
            found = self.fitting.at(config, rank, self._part(), thorough=False)
        except CompressionError:  # too small for any rank, or factors out of range
            return None
        if found.bytes >= self.candidates[0].bytes:
            return None
        self.candidates.append(found)
        return found

    def _least(self, fraction: float, matches: Callable[[LayerConfig | None], bool] = lambda config: True) -> float:
        """The least error that was found in this size, of all or of the configs that match."""
        most = fraction * self.candidates[0].bytes
        return min((c.error for c in self.candidates if c.bytes <= most and matches(c.config)), default=math.inf)

    def _largest(self, config: LayerConfig) -> float:
        """The fraction from which the weight itself in this format is about as small, and loses nothing else."""
        numbers = 1.0  # that the layer's bytes would hold in the format, for each of the weight's; without scales
        if config.quantize is not None:
            numbers = 8 * self.layer.weight.element_size() / FORMATS[config.quantize].bits
        return min(_MOST_FRACTION, _FULL / numbers, method_of(config).largest(self.layer.weight.shape, numbers))

    def _reach(self, number: int, count: int) -> None:
        """From here on, this one of so many parts of the work after the dense layers is reported."""
        self._span = (_DENSE + (1 - _DENSE) * number / count, _DENSE + (1 - _DENSE) * (number + 1) / count)

    def _part(self) -> Budget:
        return self._budget.child(_SHARE, self._span)


def _is_slow(config: LayerConfig | None) -> bool:
    return config is not None and method_of(config).slow


def _decomposes(config: LayerConfig | None) -> bool:
    return config is not None and method_of(config).solve is not None


def without_bias(target: MaxSize, layer: nn.Bilinear) -> MaxSize:
    """A layer's size as a fraction of its weight: the bias is stored as it is, and the weight has what is left."""
    weight, total = layer.weight.numel() * layer.weight.element_size(), stored_bytes(layer)
    left = target.fraction * total - (total - weight)
    if left <= 0:
        raise InfeasibleError(
            f"MaxSize({target.fraction:g}) of the layer is too small beside its bias: the bias alone takes "
            f"{total - weight} bytes, and {int(target.fraction * total)} of the layer's {total} are allowed."
        )
    return MaxSize(min(left / weight, 1 - 1e-9))
