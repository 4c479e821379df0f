"""Replacements fitted to the weight alone, where there are no inputs to fit to; and targets that count the rounding."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from .. import decomposition as decompose
from ..config import CPConfig, DenseConfig, MaxError, Quantize, TuckerConfig
from ..decomposition import Budget
from ..errors import InfeasibleError
from ..modules import CompressedBilinear
from ..quantization import FORMATS
from ._calibrate import LayerInputs
from ._fit import Fitted, Fitting, Rank
from ._measure import weight_error

_ATTEMPTS = 4  # at a target that rounding made miss
_MOST_ROUNDING = 0.011  # that the first attempt allows for: four bits cost so much that it tells more
_Found = TypeVar("_Found")


def within_after_rounding(
    attempt: Callable[[MaxError], tuple[_Found, float]], limit: float, quantize: Quantize | None, dtype: torch.dtype
) -> _Found:
    """What `attempt` finds for a target so tight that its error, with the rounding that the target knows not, fits.

    Raises: InfeasibleError where rounding alone is more than `limit`, or where `attempt` does.
    """
    target = limit
    if quantize is not None:
        target = math.sqrt(max(target**2 - min(_MOST_ROUNDING, FORMATS[quantize].error) ** 2, 0.7 * target**2))
    for _ in range(_ATTEMPTS):
        found, error = attempt(MaxError(target))
        if error <= limit:
            return found
        # truncation and rounding errors add in quadrature
        rounding = max(error**2 - target**2, 0.0)
        remaining = limit**2 - 1.1 * rounding
        target = min(math.sqrt(remaining), 0.98 * target) if remaining > 0 else 0.7 * target
    stored = quantize or str(dtype).removeprefix("torch.")
    raise InfeasibleError(
        f"A relative error of {limit:g} is out of reach of {stored} factors: rounding alone keeps it at {error:.3g}."
    )


class WeightFitting(Fitting):
    """The same without calibration rows: all is fitted to the weight, whose relative error is what counts."""

    _calibrated = False

    def __init__(self, layer: nn.Bilinear) -> None:
        nothing = layer.weight.detach()[0, :0].new_empty(0, 0)
        super().__init__(layer, LayerInputs(nothing, nothing, 0, 1), fix_bias=False)

    def _best(self, config: CPConfig | TuckerConfig, rank: Rank, budget: Budget, thorough: bool) -> Fitted:
        found = self._decomposed(self.layer.weight.detach(), config, rank, budget)
        return replace(self._rounded(config, found), on_output=False)

    def within(
        self,
        config: CPConfig | TuckerConfig,
        limit: float,
        *,
        seconds: float | None = None,
        progress: decompose.Progress | None = None,
    ) -> Fitted:
        """The smallest replacement of this kind whose error is at most `limit`. Raises: InfeasibleError without one."""

        def attempt(target: MaxError) -> tuple[Fitted, float]:
            share = None if seconds is None else seconds / 2
            found = self.at(config, target, seconds=share, progress=progress)
            return found, found.error

        return within_after_rounding(attempt, limit, config.quantize, self.layer.weight.dtype)

    def assured(self, config: CPConfig | TuckerConfig, found: Fitted, **_: object) -> Fitted:
        return found

    def dense(
        self, config: DenseConfig, *, seconds: float | None = None, progress: decompose.Progress | None = None
    ) -> Fitted:
        return replace(super().dense(config, seconds=seconds, progress=progress), on_output=False)

    def _error(self, module: CompressedBilinear) -> float:
        return weight_error(self.layer.weight.detach(), module)
