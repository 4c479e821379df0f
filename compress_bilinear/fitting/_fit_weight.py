"""Candidates fitted to a layer's weight: what is done where there are no inputs to fit to."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal, cast

from torch import Tensor, nn

from .. import decomposition as decompose
from ..config import DenseConfig, LayerConfig, MaxError, MaxSize, Quantize
from ..decomposition import PLAIN, Budget, Metric, tightened
from ..errors import InfeasibleError
from ..modules import CompressedBilinear, Decomposition, DenseBilinear, Method, Rank, method_of
from ..quantization import FORMATS
from ..report import Note
from ._candidate import Candidate
from ._measure import weight_error

_MOST_EXPECTED = 0.011  # error of rounding that a first attempt allows for
_CHEAP = 2**20  # entries times rank up to which a slow method is solved to the end at once
SWEEPS = 60  # of a slow method, to see how good it is
_NEAR, _FROM_NEAR = 1.3, 20  # ratio of two ranks at which the one is a good start for the other, and sweeps from there
MORE_SWEEPS = 70  # of the one that is chosen


class WeightFitting:
    """Makes candidates for one layer. Their `error` is that of the weight."""

    on_output = False
    notes: tuple[Note, ...] = ()  # on its decompositions

    def __init__(self, layer: nn.Bilinear) -> None:
        """`layer` is left as it is."""
        self.layer = layer
        self._near: dict[str, Decomposition] = {}  # what a slow method has found

    @property
    def weight(self) -> Tensor:
        """The layer's weight (O, I, J), without its graph."""
        return self.layer.weight.detach()

    @property
    def target(self) -> Tensor:
        """What decompositions should be near to (O, I, J)."""
        return self.weight

    @property
    def metric(self) -> Metric:
        """The metric in which factors are fitted."""
        return PLAIN

    @cached_property
    def ordered(self) -> tuple[Tensor, Metric]:
        """The weight in that metric and in the coordinates of its HOSVD (O, I, J), and the metric that does both."""
        return decompose.ordered(self.target, self.metric)

    def at(self, config: LayerConfig, rank: Rank, budget: Budget | None = None) -> Candidate:
        """The best candidate of a rank or size that was found.

        Args:
            rank: instead of the config's own.
            budget: time for all of it.

        Raises:
            ConfigError: the rank does not fit the layer.
            InfeasibleError: no rank meets the target.
            CompressionError: no factors are within the range of the layer's dtype.
        """
        return self._rounded(config, self._solved(config, rank, budget or Budget()))

    def build(self, config: LayerConfig, rank: Rank, budget: Budget | None = None) -> Candidate:
        """A candidate of a rank or size, from the weight in the coordinates of its HOSVD: for a search.

        `polished` goes on with a slow method. Raises as `at`.
        """
        budget = budget or Budget()
        if method_of(config).unwhiten is None:
            return self.at(config, rank, budget)
        return self._unwhitened(config, self.solved(config, rank, budget), self.ordered[0], budget)

    def solved(self, config: LayerConfig, rank: Rank, budget: Budget, sweeps: int = SWEEPS) -> Decomposition:
        """The decomposition of `ordered`, or of the plain weight for a method that takes no other; in floating point.

        A slow method makes at most so many sweeps over a weight that is not small.
        """
        method = method_of(config)
        if method.unwhiten is None:
            return self._solved(config, rank, budget)
        weight, _ = self.ordered
        if isinstance(rank, MaxSize):
            # the weight may be wider here than in the layer, and the fraction is of the layer's bytes
            if method.sketch is not None:
                rank = self._rank_within(method, rank, config.quantize)
            elif config.quantize is not None:
                rank = MaxSize(rank.fraction * self.layer.weight.element_size() / weight.element_size())
        if method.sketch is None:
            assert method.solve is not None
            known = {} if method.predict is None else {"ordered": True}
            return method.solve(weight, rank, config, budget, **known)
        near = self._near.get(method.name) if sweeps == SWEEPS else None
        if near is not None and max(rank, near.rank) <= _NEAR * min(rank, near.rank):
            return method.sketch(weight, rank, config, budget, _FROM_NEAR, begin=near)
        found = method.sketch(weight, rank, config, budget, sweeps)
        if sweeps == SWEEPS:
            self._near[method.name] = found
        return found

    def polished(self, found: Candidate, budget: Budget, more: bool = True) -> Candidate:
        """What `build` made, or a better one of its rank and format; with `more` sweeps of a slow method, if wanted."""
        return self._with_more_sweeps(found, budget) if more else found

    def within(self, config: LayerConfig, limit: float, budget: Budget | None = None) -> Candidate:
        """The smallest candidate of this method and format whose weight error, rounding included, is at most `limit`.

        Raises: InfeasibleError where rounding alone is more than `limit`, or no rank that is smaller meets it.
        """
        budget = budget or Budget()

        def attempt(target: float) -> tuple[Candidate, float]:
            found = self.at(config, MaxError(target), budget.child(0.5))
            return found, found.error

        # four bits cost so much that a first attempt tells more than what is expected of the format
        expected = 0.0 if config.quantize is None else min(_MOST_EXPECTED, FORMATS[config.quantize].error)
        found, error = tightened(attempt, limit, expected=expected)
        if error <= limit:
            return found
        stored = config.quantize or str(self.layer.weight.dtype).removeprefix("torch.")
        raise InfeasibleError(
            f"A relative error of {limit:g} is out of reach of {stored} factors: rounding alone keeps it at "
            f"{error:.3g}."
        )

    def dense(self, config: DenseConfig, budget: Budget | None = None, quick: bool = False) -> Candidate:
        """The weight itself in the config's format; `quick` takes the nearest values."""
        return self._stored(config, DenseBilinear.from_weight(self.weight, quantize=config.quantize))

    def _with_more_sweeps(self, found: Candidate, budget: Budget) -> Candidate:
        """The better of a candidate and of what more sweeps of a slow method make of it."""
        if found.config is None or found.unwhiten is None or (method := method_of(found.config)).sketch is None:
            return found
        weight, rank = self.ordered[0], found.fitted.rank
        part = budget.child(0.8)
        if self.is_cheap(rank):
            assert method.solve is not None
            more = method.solve(weight, rank, found.config, part)
        else:
            more = method.sketch(weight, rank, found.config, part, MORE_SWEEPS, begin=found.fitted)
        return best([found, self._unwhitened(found.config, more, weight, budget)])

    def is_cheap(self, rank: Rank) -> bool:
        """Whether a slow method is solved to its end in little time."""
        return not isinstance(rank, int) or self.weight.numel() * rank <= _CHEAP

    def _rank_within(self, method: Method, target: MaxSize, quantize: Quantize | None) -> int:
        """The largest rank that stores at most this fraction of the weight's bytes."""
        weight = self.weight
        allowed = target.fraction * weight.numel() * weight.element_size()
        rank = largest_rank(method, weight.shape, weight.element_size(), quantize, allowed)
        if rank == 0:
            least = method.nbytes(1, weight.shape, weight.element_size(), quantize)
            raise InfeasibleError(f"Rank 1 stores {least} bytes. A size of {int(allowed)} is allowed for the weight.")
        return rank

    def _solved(self, config: LayerConfig, rank: Rank, budget: Budget) -> Decomposition:
        """The decomposition of the plain weight in floating point."""
        method = method_of(config)
        assert method.solve is not None
        return method.solve(self.target, rank, config, budget)

    def _rounded(self, config: LayerConfig, found: Decomposition, correct_bias: bool = True) -> Candidate:
        """A decomposition of the weight in the config's format, its parts rounded to fit each other."""
        parts = method_of(config).round(found, self.target, config.quantize)
        return self._layer_of(config, parts, correct_bias=correct_bias, fitted=found)

    def _unwhitened(
        self,
        config: LayerConfig,
        found: Decomposition,
        target: Tensor | None,
        budget: Budget,
        fitted_to: Literal["whitened", "rows"] = "whitened",
    ) -> Candidate:
        """A decomposition in the coordinates of `ordered`, its parts rounded to fit each other.

        Args:
            target: what the rounded parts should be near to, in those coordinates (O, I, J); None takes `found`.
        """
        method, metric = method_of(config), self.ordered[1]
        assert method.unwhiten is not None
        unwhiten = partial(method.unwhiten, metric=metric, dtype=self.layer.weight.dtype)
        if config.quantize is not None and FORMATS[config.quantize].coarse:
            # the parts in floating point are held by nobody else
            parts = method.round(unwhiten(found), target, config.quantize, metric, budget, overwrite=True)
        else:
            parts = unwhiten(found)
        where = fitted_to if self.on_output else "weight"
        return self._layer_of(config, parts, fitted=found, unwhiten=unwhiten, fitted_to=where)

    def _layer_of(self, config: LayerConfig, parts: Decomposition, **known: Any) -> Candidate:
        make, known = cast(Any, method_of(config).layer).from_decomposition, {"notes": self.notes, **known}
        return self._stored(config, make(parts, quantize=config.quantize), **known)

    def _stored(
        self, config: LayerConfig, module: CompressedBilinear, correct_bias: bool = True, **known: Any
    ) -> Candidate:
        """The candidate of a module: with the layer's bias, measured."""
        corrected = False
        if self.layer.bias is not None:
            bias = self.layer.bias.detach().clone()
            if correct_bias:
                bias, corrected = self._corrected(bias, module)
            module.set_bias(nn.Parameter(bias))
        error = self._error(module)
        if not isinstance(config, DenseConfig):
            config = replace(config, rank=module.rank)  # type: ignore[arg-type]
        known = {"bias_corrected": corrected, "on_output": self.on_output, **known}
        return Candidate.of(config, module, error if math.isfinite(error) else math.inf, **known)

    def _corrected(self, bias: Tensor, module: CompressedBilinear) -> tuple[Tensor, bool]:
        """The bias of a replacement, and whether it is another than the layer's."""
        return bias, False

    def _error(self, module: CompressedBilinear) -> float:
        return weight_error(self.weight, module)


def check_not_zero(layer: nn.Bilinear) -> None:
    """Raise InfeasibleError where there is nothing to decompose."""
    if not bool(layer.weight.detach().any()):
        raise InfeasibleError("its weight is all zero: nothing to decompose, and zero factors would never train")


def best(candidates: list[Candidate]) -> Candidate:
    """The one of least error."""
    return min(candidates, key=lambda candidate: candidate.error)


def largest_rank(method: Method, shape: Sequence[int], itemsize: int, quantize: Quantize | None, allowed: float) -> int:
    """The largest rank of a method of one rank that stores at most so many bytes; 0 where there is none."""
    low, high = 0, min(math.prod(shape) // size for size in shape)
    while low < high:
        middle = (low + high + 1) // 2
        if method.nbytes(middle, shape, itemsize, quantize) <= allowed:
            low = middle
        else:
            high = middle - 1
    return low
