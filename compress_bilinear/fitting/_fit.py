"""Replacements fitted to what a layer does with its inputs, without labels: whiten, decompose, refit, correct the bias.

Every step is kept only where the stored replacement's error falls on rows that no fit has seen.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import assert_never

from .. import decomposition as decompose
from .. import ops
from ..config import CPConfig, CPRank, DenseConfig, LayerConfig, MaxError, MaxSize, Quantize, TuckerConfig, TuckerRank
from ..decomposition import Budget, CPDecomposition, Metric, TuckerDecomposition
from ..errors import AmplificationWarning, CompressionError, ConfigError, InfeasibleError
from ..modules import CompressedBilinear, CPBilinear, DenseBilinear, TuckerBilinear
from ..quantization import FORMATS
from ._calibrate import LayerInputs
from ._measure import OutputError, stored_bytes, weight_error

_FIT_FLOPS = 4e11  # of the exact outputs to fit to; a large layer is fitted to fewer rows
_SHUFFLES = 1  # pairs of inputs that did not come together, for each that did

Rank = int | tuple[int, int, int] | MaxSize | MaxError
Decomposition = CPDecomposition | TuckerDecomposition


@dataclass(frozen=True, eq=False)
class Fitted:
    """A replacement and how it does on held-out rows.

    Attributes:
        module: what would take the layer's place.
        error: relative error of its outputs on the held-out rows; infinite where it has none that is a number.
        way: "weight", "whitened" or "rows": what its factors were fitted to in the end.
        own_bias: whether its bias was corrected, and so is no longer the layer's.
        decomposition: what was stored; None for a dense layer.
        on_output: whether the error is of the outputs; without calibration rows it is the weight's.
        note: why it is of another `way` than was asked for; None where it is not.
    """

    module: CompressedBilinear
    error: float
    way: str
    own_bias: bool
    decomposition: Decomposition | None
    on_output: bool = True
    note: str | None = None


def _part(budget: Budget, share: float, span: tuple[float, float]) -> Budget:
    """A budget for this share of the time that another has left, which tells that one of its part of the work."""
    start, end = span
    seconds = max(share * budget.left(), 1e-3) if budget.limited else None
    return Budget(seconds, lambda done, error: budget.report(start + (end - start) * done, error))


def _rounded_to(
    weight: Tensor, found: Decomposition, quantize: Quantize | None, metric: Metric = decompose.PLAIN
) -> Decomposition:
    if isinstance(found, CPDecomposition):
        return decompose.rounded(found, weight, quantize, metric)
    return decompose.rounded(found, weight, quantize, metric)


class Fitting:
    """What is the same for all replacements of one layer: its metric, the rows to fit to, and those to measure on."""

    _calibrated = True

    def __init__(
        self,
        layer: nn.Bilinear,
        inputs: LayerInputs,
        fix_bias: bool = True,
        seed: int = 0,
        held_out: Callable[[], OutputError | None] | None = None,
    ) -> None:
        """Compute nothing yet.

        Args:
            layer: the original, which is left as it is.
            inputs: what it saw, at least `FEWEST_ROWS` rows.
            fix_bias: whether a replacement's bias may differ from the layer's.
            seed: of the pairs of inputs that did not come together.
            held_out: gives the error on held-out rows to those who have it already.
        """
        self.layer, self.inputs = layer, inputs
        self._made_held_out = held_out
        self._fix_bias = fix_bias and layer.bias is not None
        self._seed = seed
        self._held_out: OutputError | None = None
        self._metric: Metric | None = None
        self._white: Tensor | None = None
        self._rows: decompose.Rows | None = None
        self._mean: Tensor | None = None
        self._rows_help: dict[tuple[type, Quantize | None], bool] = {}
        self._weight_helps = True  # as far as is known

    @property
    def held_out(self) -> OutputError:
        """The error on held-out rows."""
        if self._held_out is None:
            made = None if self._made_held_out is None else self._made_held_out()
            self._held_out = made or OutputError(self.layer, self.inputs)
        return self._held_out

    @property
    def metric(self) -> Metric:
        """That of the inputs' second moments, and of the gradients where there are any."""
        if self._metric is None:
            first, second, _ = self.inputs.fit_moments
            rows = self.inputs.rows_seen
            self._metric = Metric.of_moments((self.inputs.gradient, first, second), rows)
        return self._metric

    @property
    def white(self) -> Tensor:
        """The weight in that metric (O, I, J), in float32 at least."""
        if self._white is None:
            self._white = self.metric.whiten(self.layer.weight.detach())
        return self._white

    @contextmanager
    def probing(self) -> Iterator[None]:
        """What is found meanwhile says nothing of what helps at other sizes."""
        known = dict(self._rows_help), self._weight_helps
        try:
            yield
        finally:
            self._rows_help, self._weight_helps = known

    def at(
        self,
        config: CPConfig | TuckerConfig,
        rank: Rank,
        *,
        seconds: float | None = None,
        progress: decompose.Progress | None = None,
        thorough: bool = True,
    ) -> Fitted:
        """The best replacement of a rank or size that was found: of the weight, whitened, or refitted to rows.

        Args:
            rank: instead of the config's own.
            seconds: for all of it; None is no limit.
            thorough: False leaves out what did not help before: the fit to the plain weight, so that no fit to rows
                does worse than it (see `assured`), and for the same method and format the refit to rows.

        Raises: ConfigError or InfeasibleError where the rank does not fit; CompressionError where no factors are within
            the layer's range.
        """
        return self._best(config, rank, Budget(seconds, progress), thorough)

    def _best(self, config: CPConfig | TuckerConfig, rank: Rank, budget: Budget, thorough: bool) -> Fitted:
        fits, note = [], None
        try:
            for fit in self._fits_to_outputs(config, rank, budget, thorough):
                fits.append(fit)
        except (ConfigError, InfeasibleError):
            raise
        except CompressionError as error:  # half precision, or very large weights
            note = f"fitted to the weight, for factors fitted to the outputs leave the range: {error}"
        if thorough or not fits or self._weight_helps:
            self._white = self._rows = None  # their memory is for the solver
            fits += self._to_weight(config, rank, _part(budget, 1.0, (0.6, 1.0)))
            self._weight_helps = min(fits, key=lambda fit: fit.error).way == "weight"
        best = min(fits, key=lambda fit: fit.error)
        return replace(best, note=note) if best.way == "weight" else best

    def assured(
        self,
        config: CPConfig | TuckerConfig,
        found: Fitted,
        *,
        seconds: float | None = None,
        progress: decompose.Progress | None = None,
        same_rank: bool = False,
    ) -> Fitted:
        """What `at(thorough=False)` found, or the fit to the plain weight where that does better and is as small.

        `same_rank` leaves out other Tucker ranks of that size; the rest is as in `at`.
        """
        if found.way == "weight":
            return found
        budget, most = Budget(seconds, progress), stored_bytes(found.module)
        ranks: list[Rank] = [cast(Rank, found.module.rank)]
        if isinstance(config, TuckerConfig) and not same_rank:
            whole, weight = stored_bytes(self.layer), self.layer.weight.numel() * self.layer.weight.element_size()
            ranks.append(MaxSize(min((most + 0.5 - (whole - weight)) / weight, 1 - 1e-9)))  # the bias stays
        fits = [found]
        for k, rank in enumerate(ranks):
            part = _part(budget, 1 / (len(ranks) - k), (k / len(ranks), (k + 1) / len(ranks)))
            with suppress(CompressionError):  # out of the range of the layer's dtype
                fits += [fit for fit in self._to_weight(config, rank, part) if stored_bytes(fit.module) <= most]
        return min(fits, key=lambda fit: fit.error)

    def _to_weight(self, config: CPConfig | TuckerConfig, rank: Rank, budget: Budget) -> list[Fitted]:
        """Fitted to the plain weight, with each bias."""
        plain = self._decomposed(self.layer.weight.detach(), config, rank, budget)
        fits = [self._rounded(config, plain)]
        if self._fix_bias:
            fits.append(self._rounded(config, plain, fix_bias=False))
        return fits

    def _fits_to_outputs(
        self, config: CPConfig | TuckerConfig, rank: Rank, budget: Budget, thorough: bool
    ) -> Iterator[Fitted]:
        """Of the whitened weight, and of that refitted to rows."""
        found = self._decomposed(self.white, config, rank, _part(budget, 0.4, (0.0, 0.4)))
        whitened = self._best_rounded(config, found, self.white, "whitened")
        yield whitened
        kind = (type(config), config.quantize)
        if not thorough and not self._rows_help.get(kind, True):
            return
        part = _part(budget, 0.5, (0.4, 0.6))
        if isinstance(found, CPDecomposition):
            found = decompose.refit_cp(found, self._fit_rows(), part)
        else:
            found = decompose.refit_tucker(found, self._fit_rows(), part)
        # rounded to what the rows have found, which is not what is nearest to the weight
        refitted = self._best_rounded(config, found, None, "rows")
        yield refitted
        self._rows_help[kind] = refitted.error < whitened.error

    def dense(
        self, config: DenseConfig, *, seconds: float | None = None, progress: decompose.Progress | None = None
    ) -> Fitted:
        """The weight itself, rounded where the config says so: what is best of ways to round, and of both biases."""
        budget, weight = Budget(seconds, progress), self.layer.weight.detach()

        def fits(weight: Tensor) -> list[Fitted]:
            biases = (False, True) if self._fix_bias and config.quantize is not None else (False,)
            modules = (DenseBilinear.from_weight(weight, quantize=config.quantize) for _ in biases)
            return [self._finished(module, "weight", None, fix) for module, fix in zip(modules, biases, strict=True)]

        found = fits(weight)
        if config.quantize is not None and self._calibrated:
            found += fits(decompose.stored_weight(weight, config.quantize, self.metric, budget))
        return min(found, key=lambda fit: fit.error)

    def _decomposed(self, weight: Tensor, config: CPConfig | TuckerConfig, rank: Rank, budget: Budget) -> Decomposition:
        size = self.layer.weight.element_size()
        if isinstance(rank, MaxSize) and config.quantize is not None:
            # the whitened weight may be wider than the layer's, and the fraction is of the layer's bytes
            rank = MaxSize(rank.fraction * size / weight.element_size())
        asked: dict[str, Any] = {"quantize": config.quantize, "progress": budget.report}
        asked["max_seconds"] = budget.max_seconds if budget.limited else None
        match config:
            case CPConfig():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", AmplificationWarning)  # the report says it
                    return decompose.cp(weight, cast(CPRank, rank), seed=config.seed, **asked)
            case TuckerConfig():
                return decompose.tucker(weight, cast(TuckerRank, rank), **asked)
            case _:
                assert_never(config)

    def _unwhitened(self, found: Decomposition) -> Decomposition:
        dtype = self.layer.weight.dtype
        if isinstance(found, CPDecomposition):
            return decompose.unwhitened_cp(found, self.metric, dtype)
        return decompose.unwhitened_tucker(found, self.metric, dtype)

    def _stored(self, config: LayerConfig, found: Decomposition, way: str, fix_bias: bool = True) -> Fitted:
        module: CompressedBilinear
        if isinstance(found, CPDecomposition):
            module = CPBilinear.from_decomposition(found, quantize=config.quantize)
        else:
            module = TuckerBilinear.from_decomposition(found, quantize=config.quantize)
        return self._finished(module, way, found, fix_bias)

    def _best_rounded(self, config: LayerConfig, found: Decomposition, target: Tensor | None, way: str) -> Fitted:
        """Of a decomposition of the whitened weight, rounded value by value, or its parts to each other.

        Args:
            target: in the metric (O, I, J); None takes what is decomposed.
        """
        parts = self._unwhitened(found)
        plain = self._stored(config, parts, way)
        if config.quantize is None or not FORMATS[config.quantize].coarse:
            return plain
        fitted = _rounded_to(found.to_tensor() if target is None else target, parts, config.quantize, self.metric)
        fits = (plain, replace(self._stored(config, fitted, way), decomposition=parts))
        return min(fits, key=lambda fit: fit.error)

    def _rounded(self, config: LayerConfig, found: Decomposition, fix_bias: bool = True) -> Fitted:
        """A decomposition of the plain weight, its parts rounded to each other as without calibration."""
        parts = _rounded_to(self.layer.weight.detach(), found, config.quantize)
        return replace(self._stored(config, parts, "weight", fix_bias), decomposition=found)

    def _finished(
        self, module: CompressedBilinear, way: str, found: Decomposition | None, fix_bias: bool = True
    ) -> Fitted:
        bias, corrected = self.layer.bias, fix_bias and self._fix_bias
        if bias is not None:
            value = bias.detach().clone()
            if corrected:
                value = (value.double() + self._lost_mean(module)).to(value.dtype)
            module.set_bias(nn.Parameter(value))
        error = self._error(module)
        return Fitted(module, error if math.isfinite(error) else math.inf, way, corrected, found)

    def _error(self, module: CompressedBilinear) -> float:
        error = self.held_out.of(module)
        # rows on which the layer gives nothing say nothing: there, any replacement whose weight is right will do
        return weight_error(self.layer.weight.detach(), module) if error is None else error

    def _lost_mean(self, module: CompressedBilinear) -> Tensor:  # (O,)
        """⟨W_o − Ŵ_o, E[x1 x2ᵀ]⟩, the mean of what the outputs lack; in float64."""
        if self._mean is None:
            weight = self.layer.weight.detach()
            self._mean = self._mean_of(lambda rows: weight[rows].double())
        return self._mean - self._mean_of(lambda rows: module.dense_rows(rows, torch.float64))

    def _mean_of(self, part: Callable[[slice], Tensor]) -> Tensor:  # rows -> (·, I, J); (O,)
        """⟨W_o, E[x1 x2ᵀ]⟩ of a weight that is read slice by slice: no two of them at once."""
        cross = self.inputs.fit_moments[2].to(self.layer.weight.device).flatten()
        found = cross.new_empty(self.layer.out_features)
        with torch.no_grad():
            for rows in decompose.row_slices(self.layer.weight.shape):
                found[rows] = part(rows).flatten(1) @ cross
        return found

    def _fit_rows(self) -> decompose.Rows:
        """Whitened inputs, those that came together and others, what the layer makes of them, and their weights."""
        if self._rows is None:
            weight = self.layer.weight.detach()
            dtype = self.white.dtype
            most = max(32, int(_FIT_FLOPS / (2 * weight.numel() * (1 + _SHUFFLES))))
            input1, input2 = (rows[:most].to(weight.device, dtype) for rows in self.inputs.fit)
            generator = torch.Generator().manual_seed(self._seed)
            order = torch.cat([torch.randperm(len(input2), generator=generator) for _ in range(_SHUFFLES)])
            first = torch.cat([input1] * (1 + _SHUFFLES))
            second = torch.cat([input2, input2[order.to(input2.device)]])
            weights = first.new_full((len(first),), decompose.SHUFFLED_WEIGHT / _SHUFFLES)
            weights[: len(input1)] = 1.0
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                wanted = ops.bilinear_dense(first, second, weight.to(dtype))
                root = self.metric.roots[0]
                if root is not None:
                    wanted = wanted @ root.to(wanted)
                white = (self.metric.whitened_rows(1, first), self.metric.whitened_rows(2, second))
            self._rows = (*white, wanted, weights)
        return self._rows
