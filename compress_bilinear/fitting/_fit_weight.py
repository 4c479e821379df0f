"""Candidates fitted to a layer's weight: what is done where there are no inputs to fit to."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from ..config import DenseConfig, LayerConfig, MaxError, MaxSize
from ..decomposition import Budget, tightened
from ..errors import InfeasibleError
from ..modules import CompressedBilinear, Decomposition, DenseBilinear, Rank, method_of
from ..quantization import FORMATS
from ._candidate import Candidate
from ._measure import weight_error

_MOST_EXPECTED = 0.011  # error of rounding that a first attempt allows for


class WeightFitting:
    """Makes candidates for one layer. Their `error` is that of the weight."""

    on_output = False

    def __init__(self, layer: nn.Bilinear) -> None:
        """`layer` is left as it is."""
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        """The layer's weight (O, I, J), without its graph."""
        return self.layer.weight.detach()

    def at(self, config: LayerConfig, rank: Rank, budget: Budget | None = None, thorough: bool = True) -> Candidate:
        """The best candidate of a rank or size that was found.

        Args:
            rank: instead of the config's own.
            budget: time for all of it.
            thorough: False leaves out the ways that did not help at other sizes of the same method and format.

        Raises:
            ConfigError: the rank does not fit the layer.
            InfeasibleError: no rank meets the target.
            CompressionError: no factors are within the range of the layer's dtype.
        """
        return self._rounded(config, self._solved(self.weight, config, rank, budget or Budget()))

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

    def dense(self, config: DenseConfig, budget: Budget) -> Candidate:
        """The weight itself in the config's format."""
        return self._stored(config, DenseBilinear.from_weight(self.weight, quantize=config.quantize))

    def improved(self, config: LayerConfig, found: Candidate, budget: Budget, same_rank: bool = False) -> Candidate:
        """What `at(thorough=False)` found, or a fit that it left out and that is as small and better."""
        return found

    @contextmanager
    def probing(self) -> Iterator[None]:
        """What is found inside says nothing of what helps at other sizes."""
        yield

    def _solved(self, weight: Tensor, config: LayerConfig, rank: Rank, budget: Budget) -> Decomposition:
        """The decomposition of the weight, or of what stands for it in another metric, in floating point."""
        method = method_of(config)
        assert method.solve is not None
        if isinstance(rank, MaxSize) and config.quantize is not None:
            # a whitened weight may be wider than the layer's, and the fraction is of the layer's bytes
            rank = MaxSize(rank.fraction * self.layer.weight.element_size() / weight.element_size())
        return method.solve(weight, rank, config, budget)

    def _rounded(self, config: LayerConfig, found: Decomposition, correct_bias: bool = True) -> Candidate:
        """A decomposition of the weight in the config's format, its parts rounded to fit each other."""
        parts = method_of(config).round(found, self.weight, config.quantize)
        return replace(self._layer_of(config, parts, correct_bias=correct_bias), decomposition=found)

    def _layer_of(self, config: LayerConfig, parts: Decomposition, **known: Any) -> Candidate:
        make = cast(Any, method_of(config).layer).from_decomposition
        return self._stored(config, make(parts, quantize=config.quantize), decomposition=parts, **known)

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
