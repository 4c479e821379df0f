"""Candidates fitted to a layer's outputs on its own inputs, without labels: whiten, decompose, refit, correct the bias.

Every step is kept only where the stored candidate's error falls on rows that no fit has seen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from .. import decomposition as decompose
from .. import ops
from ..config import DenseConfig, LayerConfig, MaxSize, Quantize
from ..decomposition import Budget, Metric
from ..errors import CompressionError, ConfigError, InfeasibleError
from ..modules import CompressedBilinear, Decomposition, DenseBilinear, Rank, method_of
from ..quantization import FORMATS
from ..report import Note
from ._calibrate import LayerInputs
from ._candidate import Candidate
from ._fit_weight import WeightFitting, best
from ._measure import OutputError, stored_bytes, weight_error

_FIT_FLOPS = 4e11  # of the exact outputs to fit to; a large layer is fitted to fewer rows


class OutputFitting(WeightFitting):
    """Makes candidates for one layer. Their `error` is that of the outputs on held-out rows."""

    on_output = True

    def __init__(
        self, layer: nn.Bilinear, inputs: LayerInputs, fix_bias: bool = True, held_out: OutputError | None = None
    ) -> None:
        """For inputs of at least `FEWEST_ROWS` rows. `fix_bias`: a replacement's bias may differ from the layer's."""
        super().__init__(layer)
        self.inputs = inputs
        self.held_out = held_out or OutputError(layer, inputs)
        self._fix_bias = fix_bias and layer.bias is not None
        self._rows_help: dict[tuple[type, Quantize | None], bool] = {}
        self._weight_helps = True  # as far as is known

    @cached_property
    def metric(self) -> Metric:
        """The metric of the inputs' second moments, and of the gradients where there are any."""
        first, second, _ = self.inputs.fit_moments
        return Metric.of_moments((self.inputs.gradient, first, second), self.inputs.rows_seen)

    @cached_property
    def whitened(self) -> Tensor:
        """The weight in that metric (O, I, J), in float32 at least."""
        return self.metric.whiten(self.weight)

    @contextmanager
    def probing(self) -> Iterator[None]:
        known = dict(self._rows_help), self._weight_helps
        try:
            yield
        finally:
            self._rows_help, self._weight_helps = known

    def at(self, config: LayerConfig, rank: Rank, budget: Budget | None = None, thorough: bool = True) -> Candidate:
        budget = budget or Budget()
        fits: list[Candidate] = []
        notes: tuple[Note, ...] = ()
        try:
            for fit in self._fits_to_outputs(config, rank, budget, thorough):
                fits.append(fit)
        except (ConfigError, InfeasibleError):
            raise
        except CompressionError as error:  # half precision, or very large weights
            text = f"fitted to the weight, for factors fitted to the outputs leave the range: {error}"
            notes = (Note("fitted_to_weight", text),)
        if thorough or not fits or self._weight_helps:
            for name in ("whitened", "_rows"):  # their memory is for the solver
                self.__dict__.pop(name, None)
            fits += self._fits_to_weight(config, rank, budget.child(1.0, (0.6, 1.0)))
            self._weight_helps = best(fits).fitted_to == "weight"
        found = best(fits)
        return replace(found, notes=notes) if found.fitted_to == "weight" else found

    def improved(self, config: LayerConfig, found: Candidate, budget: Budget, same_rank: bool = False) -> Candidate:
        """What `at(thorough=False)` found, or the fit to the plain weight where it is as small and better.

        `same_rank` leaves out other ranks of that size.
        """
        if found.fitted_to == "weight" or found.module is None:
            return found
        ranks: list[Rank] = [found.module.rank]
        if not isinstance(found.module.rank, int) and not same_rank:
            whole, weight = stored_bytes(self.layer), self.weight.numel() * self.weight.element_size()
            ranks.append(MaxSize(min((found.bytes + 0.5 - (whole - weight)) / weight, 1 - 1e-9)))  # the bias stays
        fits = [found]
        for k, rank in enumerate(ranks):
            part = budget.child(1 / (len(ranks) - k), (k / len(ranks), (k + 1) / len(ranks)))
            with suppress(CompressionError):  # out of the range of the layer's dtype
                fits += [fit for fit in self._fits_to_weight(config, rank, part) if fit.bytes <= found.bytes]
        return best(fits)

    def dense(self, config: DenseConfig, budget: Budget) -> Candidate:
        """The weight itself in the config's format: each value to the nearest, or the better of the ways to round."""

        def fit(weight: Tensor) -> Candidate:
            module = DenseBilinear.from_weight(weight, quantize=config.quantize)
            return self._stored(config, module, correct_bias=config.quantize is not None)

        found = [fit(self.weight)]
        if config.quantize is not None:
            fed_back = decompose.stored_weight(self.weight, config.quantize, self.metric, budget)
            found += [] if fed_back is None else [fit(fed_back)]
        return best(found)

    def _fits_to_weight(self, config: LayerConfig, rank: Rank, budget: Budget) -> list[Candidate]:
        """Of the plain weight, with the layer's bias and with a corrected one."""
        plain = self._solved(self.weight, config, rank, budget)
        return [self._rounded(config, plain, each) for each in ((True, False) if self._fix_bias else (True,))]

    def _fits_to_outputs(self, config: LayerConfig, rank: Rank, budget: Budget, thorough: bool) -> Iterator[Candidate]:
        """Of the whitened weight, and of that refitted to rows."""
        if method_of(config).unwhiten is None:
            return
        found = self._solved(self.whitened, config, rank, budget.child(0.4, (0.0, 0.4)))
        whitened = self._best_rounded(config, found, self.whitened, "whitened")
        yield whitened
        kind, refit = (type(config), config.quantize), method_of(config).refit
        if refit is None or not (thorough or self._rows_help.get(kind, True)):
            return
        found = refit(found, self._rows, budget.child(0.5, (0.4, 0.6)))
        # rounded to what the rows have found, which is not what is nearest to the weight
        refitted = self._best_rounded(config, found, None, "rows")
        yield refitted
        self._rows_help[kind] = refitted.error < whitened.error

    def _best_rounded(
        self, config: LayerConfig, found: Decomposition, target: Tensor | None, fitted_to: str
    ) -> Candidate:
        """A decomposition of the whitened weight: rounded value by value, or its parts to fit each other.

        Args:
            target: what the rounded parts should be near to, in the metric (O, I, J); None takes what is decomposed.
        """
        method = method_of(config)
        assert method.unwhiten is not None
        parts = method.unwhiten(found, self.metric, self.layer.weight.dtype)
        plain = self._layer_of(config, parts, fitted_to=fitted_to)
        if config.quantize is None or not FORMATS[config.quantize].coarse:
            return plain
        rounded = method.round(parts, found.to_tensor() if target is None else target, config.quantize, self.metric)
        return best([plain, replace(self._layer_of(config, rounded, fitted_to=fitted_to), decomposition=parts)])

    def _corrected(self, bias: Tensor, module: CompressedBilinear) -> tuple[Tensor, bool]:
        """With the mean of what the outputs lack."""
        if not self._fix_bias:
            return bias, False
        lost = self._mean - self._mean_of(lambda slab: module.dense_rows(slab, torch.float64))
        return (bias.double() + lost).to(bias.dtype), True

    def _error(self, module: CompressedBilinear) -> float:
        error = self.held_out.of(module)
        # rows on which the layer gives nothing say nothing: there, any replacement whose weight is right will do
        return weight_error(self.weight, module) if error is None else error

    @cached_property
    def _mean(self) -> Tensor:  # (O,)
        return self._mean_of(lambda slab: self.weight[slab].double())

    def _mean_of(self, read: Callable[[slice], Tensor]) -> Tensor:  # slab -> (·, I, J); (O,)
        """⟨W_o, E[x1 x2ᵀ]⟩ of a weight that is read slab by slab."""
        cross = self.inputs.fit_moments[2].to(self.layer.weight.device).flatten()
        found = cross.new_empty(self.layer.out_features)
        with torch.no_grad():
            for slab in decompose.row_slices(self.layer.weight.shape):
                found[slab] = read(slab).flatten(1) @ cross
        return found

    @cached_property
    def _rows(self) -> decompose.Rows:
        """Whitened inputs, calibration pairs and shuffled ones, the layer's outputs for them, and their weights."""
        dtype = self.whitened.dtype
        most = max(32, int(_FIT_FLOPS / (4 * self.weight.numel())))
        input1, input2 = (rows[:most].to(self.weight.device, dtype) for rows in self.inputs.fit)
        order = torch.randperm(len(input2), generator=torch.Generator().manual_seed(0))
        first = torch.cat([input1, input1])
        second = torch.cat([input2, input2[order.to(input2.device)]])
        weights = first.new_full((len(first),), decompose.SHUFFLED_WEIGHT)
        weights[: len(input1)] = 1.0
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            outputs = ops.bilinear_dense(first, second, self.weight.to(dtype))
            root = self.metric.roots[0]
            if root is not None:
                outputs = outputs @ root.T.to(outputs)
            return self.metric.whitened_rows(1, first), self.metric.whitened_rows(2, second), outputs, weights
