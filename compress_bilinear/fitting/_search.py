"""The candidates of one layer: predicted for every method, format and size first; a few of them are made and measured.

The error of a Tucker rank is what its block of the HOSVD's core leaves out; of other methods it is extrapolated from
quick solutions at two lower ranks. The error of rounding, a constant of the format, adds in quadrature.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias, get_args

import numpy
import torch

from ..config import DenseConfig, LayerConfig, Quantize
from ..decomposition import Budget
from ..errors import CompressionError, InfeasibleError
from ..modules import METHODS, Method, Rank, method_of
from ..quantization import FORMATS
from ._candidate import Candidate
from ._fit_weight import WeightFitting, largest_rank
from ._latency import Latency, latencies, timing_inputs
from ._measure import bias_bytes
from ._work import SKETCH_SWEEPS, making_is_all, most_rank

_STEP = 1.03  # between two sizes of a prediction
_OPTIMISM = 0.93  # times a predicted error, until something of its kind was measured: what is not made cannot surprise
_MORE_OPTIMISM = 0.85  # the same of an error that is extrapolated
_SKETCHED = 2  # the rank that fills a size, over the larger one of the quick solutions; the other is half of it
_FEW_SWEEPS = 20  # over the whole, below which a rank is not worth the time
_SHARE = 0.25  # of the time left, for one candidate
_AS_GOOD = 1.05  # times the least error: what is faster is then better
_EXACT = 1e-5  # an error that is none
_NONE = 1e6  # the ratio of a measured error to a predicted one where nothing could be made

_ROUNDS = 6  # of making what is picked, and more if they take next to no time
_MOST_ROUNDS, _SHORT = 40, 1.0  # seconds

Kind: TypeAlias = tuple[str, Quantize | None]
"""The name of a method, and a format."""


class _Point(NamedTuple):
    """What is predicted of a rank: bytes without the bias, and the relative squared error before rounding."""

    rank: Rank
    bytes: float
    lost: float


class Search:
    """Candidates of one layer, in `candidates`: made ones and predicted ones. Keeping the layer is the first."""

    def __init__(
        self,
        fitting: WeightFitting,
        budget: Budget | None = None,
        seed: int = 0,
        exact: bool = False,
        only: LayerConfig | None = None,
    ) -> None:
        """`exact` lets the unrounded dense layer compete too, for its speed; `only` has one method and format."""
        self.fitting, self.layer = fitting, fitting.layer
        self.budget, self._seed = budget or Budget(), seed
        self.candidates = [Candidate.kept(self.layer)]
        bits = 8 * self.layer.weight.element_size()
        formats = [name for name in get_args(Quantize) if FORMATS[name].coarse or FORMATS[name].bits < bits]
        self._dense = [] if only is not None else [*formats, None] if exact else formats
        self._kinds: list[tuple[Method, Quantize | None]] = [
            (row, quantize) for row in METHODS.values() if row.solve is not None for quantize in (*formats, None)
        ]
        if only is not None:
            self._kinds = [(method_of(only), only.quantize)]
        self._predicted: dict[Kind, list[Candidate]] = {}  # at first
        self._ratios: dict[Kind, dict[int, float]] = {}  # of measured errors to these, by bytes
        self._polished: set[Candidate] = set()
        self._solved: dict[str, dict[int, float]] = {}  # errors of quick solutions of a method, by rank

    @property
    def made(self) -> list[Candidate]:
        """Those that were made and measured, and the layer itself."""
        return [candidate for candidate in self.candidates if not candidate.predicted]

    def predict(self, size: float | None = None, limit: float | None = None) -> None:
        """Predict all candidates, at every size; dense ones of few bits are measured. Again for another target.

        Args:
            size: of these bytes, one prediction is exactly the largest below.
            limit: an error; a method that needs quick solutions has them near the size at which others meet it.
        """
        self.candidates = self.made
        weight, itemsize = self.fitting.ordered[0], self.layer.weight.element_size()
        rows = {row.name: row for row, _ in self._kinds}
        by_method = {name: row.predict(weight) for name, row in rows.items() if row.predict is not None}
        for quantize in self._dense:
            if ("dense", quantize) not in self._predicted:
                self._predicted["dense", quantize] = [self._dense_prediction(quantize)]
            self._predict_again(("dense", quantize))
        bias = bias_bytes(self.layer)
        anchor = (self.candidates[0].bytes if size is None else size) - bias
        for row, quantize in self._kinds:
            if row.name in by_method:
                self._add(row, quantize, [_Point(*p) for p in by_method[row.name](itemsize, quantize, anchor)])
        if size is None and limit is not None:
            within = [candidate.bytes for candidate in self.candidates if candidate.error <= limit]
            anchor = min(within) - bias
        for row in rows.values():
            if row.predict is None:
                self._sketch(row, [quantize for other, quantize in self._kinds if other is row], anchor)
        self.budget.report(0.3, 1.0)

    def build(self, point: Candidate) -> None:
        """Make a predicted candidate; others of its kind are predicted anew from what it measures."""
        assert point.config is not None
        self.candidates.remove(point)
        ratio = _NONE
        try:
            part = self.budget.child(1.0 if making_is_all(point) else _SHARE)
            if isinstance(point.config, DenseConfig):
                found = self.fitting.dense(point.config, part, quick=True)
            else:
                found = self.fitting.build(point.config, point.config.rank, part)
        except CompressionError:  # factors out of range
            pass
        else:
            self.candidates.append(found)
            before = next(each for each in self._predicted[point.kind] if each.config == point.config)
            ratio = max(found.error, 1e-12) / max(before.error, 1e-12)
        self._ratios.setdefault(point.kind, {})[point.bytes] = ratio
        self._predict_again(point.kind)

    def polish(self, candidate: Candidate, budget: Budget, more: bool = True) -> Candidate:
        """The candidate, or a better one of its kind and size, which takes its place; once for each. See `polished`."""
        if candidate in self._polished:
            return candidate
        better = replace(self.fitting.polished(candidate, budget, more), latency=candidate.latency)
        self._polished.add(better)
        self.candidates[self.candidates.index(candidate)] = better
        return better

    def time(self, rows: int) -> None:
        """Measure the latencies of what was made side by side, in calls of so many rows."""
        found = {id(each): latency.median for each, latency in self._latencies(self.made, rows)}
        self.candidates = [replace(each, latency=found.get(id(each))) for each in self.candidates]

    def quickest_as_good(self, candidate: Candidate, rows: int) -> Candidate:
        """The fastest of what is as small and has at most 1.05 times the error of a candidate, in so many rows."""
        most = _AS_GOOD * candidate.error
        for each in [each for each in self.candidates if each.predicted and each.kind[0] == "dense"]:
            if each.bytes <= candidate.bytes and each.error <= most and self.budget.left() > 0:
                self.build(each)
        rivals = [each for each in self.made[1:] if each.bytes <= candidate.bytes and each.error <= most]
        if len(rivals) < 2 or candidate.module is None or self.budget.left() <= 0:
            return candidate
        timed = self._latencies(rivals, rows)
        fastest, latency = min(timed, key=lambda pair: pair[1].median)
        now = next(other for each, other in timed if each is candidate)
        return fastest if latency.upper < now.lower else candidate

    def _latencies(self, candidates: Sequence[Candidate], rows: int) -> list[tuple[Candidate, Latency]]:
        inputs = timing_inputs(self.layer, rows)
        calls = {str(k): partial(each.module or self.layer, *inputs) for k, each in enumerate(candidates)}
        with torch.no_grad():
            found = latencies(calls, self.layer.weight.device, min(0.2 * len(calls), max(self.budget.left(), 0.0)))
        return [(each, found[str(k)]) for k, each in enumerate(candidates)]

    def build_quickest(self, candidate: Candidate, limit: float | None) -> None:
        """Of every method and format, make what is predicted to need least work: within a limit, or as small."""
        for kind in list(self._predicted):
            fit = [
                each
                for each in self.candidates
                if each.predicted and each.kind == kind
                if (each.bytes <= candidate.bytes if limit is None else each.error <= limit)
            ]
            if fit and self.budget.left() > 0:
                self.build(min(fit, key=lambda each: (each.flops, each.error)))

    def _dense_prediction(self, quantize: Quantize | None) -> Candidate:
        """The weight itself in a format. With few bits it is measured if there is time, and not kept."""
        config, weight = DenseConfig(quantize=quantize), self.layer.weight
        if quantize is not None and FORMATS[quantize].coarse and self.budget.left() > 0:
            return replace(self.fitting.dense(config, quick=True), module=None)
        size, error = weight.numel() * weight.element_size(), 0.0
        if quantize is not None:
            form = FORMATS[quantize]
            size, error = form.nbytes(weight.shape, "weight"), form.error / math.sqrt(3)  # that is of three factors
        return self._prediction(config, size + bias_bytes(self.layer), error, self.candidates[0].flops)

    def _add(self, row: Method, quantize: Quantize | None, points: list[_Point]) -> None:
        """Predicted candidates of a method and format, those that are smaller than the layer."""
        dense = [each.error for each in self._predicted.get(("dense", quantize), ())]
        rounding = 0.0 if quantize is None else FORMATS[quantize].error
        if dense and quantize is not None and FORMATS[quantize].coarse:
            # inputs that are nearly of low rank see less of it
            rounding = min(rounding, *dense)
        optimism = _OPTIMISM if row.predict is not None else _MORE_OPTIMISM
        whole, bias = self.candidates[0].bytes, bias_bytes(self.layer)
        found, shape = [], self.layer.weight.shape
        for rank, size, lost in points:
            if self._dense and rank == tuple(shape):
                continue  # a Tucker that leaves nothing out is a dense layer
            if size + bias < whole and lost < 1:
                error = optimism * math.sqrt(lost + rounding**2 * (1 - lost))
                config = row.configure(rank, quantize, self._seed)
                flops = 2 * int(row.nbytes(rank, shape, 1, None))
                found.append(self._prediction(config, int(size + bias), error, flops))
        self._predicted[row.name, quantize] = found
        self._predict_again((row.name, quantize))

    def _prediction(self, config: LayerConfig, size: int, error: float, flops: int) -> Candidate:
        on = self.fitting.on_output
        return Candidate(config=config, module=None, bytes=size, flops=flops, error=error, on_output=on)

    def _sketch(self, row: Method, formats: list[Quantize | None], anchor: float) -> None:
        """Predict a method whose ranks are integers from quick solutions at two low ranks."""
        shape, itemsize = self.layer.weight.shape, self.layer.weight.element_size()
        fullest = {q: largest_rank(row, shape, itemsize, q, anchor) for q in formats}
        most = most_rank(self.layer, max(fullest.values()))
        solved = self._solved.setdefault(row.name, {})
        before = dict(solved)
        begin = 1 if self.fitting.is_cheap(most) else _SKETCHED
        parts = (2 * begin, begin, *(begin * 2**k for k in range(2, 8)))
        wanted = 2
        if solved:  # for another size: only a rank that is far beyond the known ones
            parts, wanted = (begin,), len(solved) + (most > _SKETCHED * begin * max(solved))
        for part in parts:
            rank = max(1, most // part)
            if len(solved) == wanted or rank in solved or self.budget.left() <= 0:
                continue
            begun = time.perf_counter()
            config = row.configure(rank, None, self._seed)
            try:
                budget = self.budget.child(_SHARE, (0.75, 1.0) if solved else (0.3, 0.75))
                solved[rank] = self.fitting.solved(config, rank, budget, SKETCH_SWEEPS).error
            except CompressionError:
                continue  # above the method's largest rank, say: lower ones follow
            if self.budget.limited and rank < most:  # the rest of the time is about twice what predictions have left
                each = (time.perf_counter() - begun) / rank * _FEW_SWEEPS / SKETCH_SWEEPS
                most = min(most, max(rank, int(2 * self.budget.left() / each)))
        if not solved:
            return
        for quantize in formats:
            if solved != before:
                self._ratios.pop((row.name, quantize), None)
            sizes = sorted({min(most, rank) for rank in _geometric(max(1, min(solved) // 2), 4 * most)})
            sizes = sorted({*sizes, *solved, *({fullest[quantize]} if 0 < fullest[quantize] <= most else ())})
            points = [
                _Point(rank, row.nbytes(rank, shape, itemsize, quantize), _extrapolated(solved, rank)) for rank in sizes
            ]
            self._add(row, quantize, points)

    def _predict_again(self, kind: Kind) -> None:
        """Predict a kind anew: between what was measured, its ratio to the first prediction is interpolated."""
        known = sorted(self._ratios.get(kind, {1: 1.0}).items())
        places, ratios = ([math.log(size) for size, _ in known], [math.log(ratio) for _, ratio in known])
        made = {candidate.config for candidate in self.made}
        self.candidates = [each for each in self.candidates if not (each.predicted and each.kind == kind)]
        for each in self._predicted[kind]:
            if each.config not in made:
                ratio = math.exp(min(numpy.interp(math.log(each.bytes), places, ratios), 50.0))
                self.candidates.append(replace(each, error=each.error * ratio))


def settle(
    searches: Sequence[Search],
    pick: Callable[[list[list[Candidate]]], list[Candidate]],
    tell: Callable[[int, Candidate], object] = lambda number, candidate: None,
) -> list[Candidate]:
    """Make what is picked until nothing that is only predicted is picked any more, or the time is up.

    Args:
        pick: one candidate of each list, or InfeasibleError.
        tell: called with the number of a search and what it makes next.
    """
    begun = time.perf_counter()

    def build_picked() -> bool:
        chosen = pick([search.candidates for search in searches])
        for number, each in enumerate(chosen):
            if each.predicted:
                tell(number, each)
                searches[number].build(each)
        return any(each.predicted for each in chosen)

    for number in range(_MOST_ROUNDS):
        over = not build_picked() or any(search.budget.left() <= 0 for search in searches)
        if over or (number >= _ROUNDS and time.perf_counter() - begun > _SHORT):
            break
    while True:
        try:
            return pick([search.made for search in searches])
        except InfeasibleError:  # something that is small enough has to be made, whatever the time
            build_picked()


def _geometric(low: int, high: int) -> list[int]:
    """Integers from low to high, each at least `_STEP` times the one before."""
    found, value = [], float(low)
    while value <= high:
        found.append(int(value))
        value = max(value * _STEP, int(value) + 1)
    return found


def _extrapolated(solved: dict[int, float], rank: int) -> float:
    """The squared error at a rank, from two known ones; of an exact solution there is none beyond its rank.

    The errors of CP fall faster than a power of the rank and slower than exponentially: this is halfway between the
    two. On weights of power-law spectra it is within about 10% at twice the larger known rank.
    """
    exact = min((known for known, error in solved.items() if error <= _EXACT), default=None)
    if exact is not None and rank >= exact:
        return 0.0
    known = sorted((other, error) for other, error in solved.items() if error > _EXACT)
    if len(known) < 2:  # the squared error on straight lines between rank 0, the known rank and the exact one
        places, squares = [0.0, *(float(one) for one, _ in known)], [1.0, *(error**2 for _, error in known)]
        end = [] if exact is None else [float(exact)]
        return float(numpy.interp(rank, [*places, *end], [*squares, *[0.0 for _ in end]]))
    last = next((k for k, (other, _) in enumerate(known[1:], 1) if other >= rank), len(known) - 1)
    (low, high), (more, less) = known[last - 1 : last + 1]
    fallen = min(math.log(less / high), 0.0)
    power, exponential = math.log(rank / more) / math.log(more / low), (rank - more) / (more - low)
    steps = 0.5 * (power + exponential) if rank > more else power
    # each component leaves out less than the one before, so that the squared error is below the line from rank 0
    line = 1 - (1 - high**2) * rank / low if rank < low else 1.0
    return min(line, (less * math.exp(fallen * steps)) ** 2)
