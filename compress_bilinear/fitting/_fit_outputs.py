"""Candidates fitted to a layer's outputs on its own inputs, without labels: whiten, decompose, refit, correct the bias.

Every step is kept only where the stored candidate's error falls on rows that no fit has seen.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import decomposition as decompose
from .. import ops
from ..config import DenseConfig, LayerConfig
from ..decomposition import Budget, Metric
from ..errors import CompressionError, ConfigError, InfeasibleError
from ..modules import CompressedBilinear, Decomposition, DenseBilinear, Method, Rank, method_of
from ..report import Note
from ._calibrate import LayerInputs
from ._candidate import Candidate
from ._fit_weight import WeightFitting, best
from ._measure import OutputError, weight_error

_FIT_FLOPS = 4e11  # of the exact outputs to fit to; a large layer is fitted to fewer rows
_AGREES = 0.1  # of the squared error, between what the moments predict and what fitted rows have: rows then add nothing
_SMALL = 2**14  # entries of a weight for which everything is tried in less than a second
_ROWS = 512  # of which that is found
_MISLEADS = 0.3  # the same of held-out rows: the plain weight may do better, by half where rows are as few as inputs


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
        if inputs.same:
            text = "both inputs were one tensor in every call, so the symmetric part of its weight is what is fitted"
            self.notes = (Note("symmetric", text),)

    @cached_property
    def target(self) -> Tensor:
        """The weight; where both inputs always are one tensor, its symmetric part, for the other gives nothing."""
        return (self.weight + self.weight.mT) / 2 if self.inputs.same else self.weight

    @cached_property
    def metric(self) -> Metric:
        """The metric of the inputs' second moments, and of the gradients where there are any."""
        first, second, _ = self.inputs.fit_moments
        return Metric.of_moments((self.inputs.gradient, first, second), len(self.inputs.input1))

    def at(self, config: LayerConfig, rank: Rank, budget: Budget | None = None) -> Candidate:
        budget = budget or Budget()
        return self.polished(self.build(config, rank, budget.child(0.4, (0.0, 0.4))), budget.child(1.0, (0.4, 1.0)))

    def build(self, config: LayerConfig, rank: Rank, budget: Budget | None = None) -> Candidate:
        budget = budget or Budget()
        if method_of(config).unwhiten is None:
            return best(self._fits_to_weight(config, rank, budget))
        try:
            return super().build(config, rank, budget)
        except (ConfigError, InfeasibleError):
            raise
        except CompressionError as error:  # half precision, or very large weights
            text = f"fitted to the weight, for factors fitted to the outputs leave the range: {error}"
            found = best(self._fits_to_weight(config, rank, budget))
            return found.noted(Note("fitted_to_weight", text))

    def polished(self, found: Candidate, budget: Budget, more: bool = True) -> Candidate:
        """What `build` made, or a better one of its rank and format.

        With `more`, further sweeps of a slow method. Then a refit to rows, where fitted rows do not have the error
        that the moments predict: inputs depend on each other. And a fit to the plain weight, where held-out rows have
        far more than that: moments of few rows say little of others.
        """
        config = found.config
        if config is None or isinstance(config, DenseConfig):
            return found if config is None else best([found, self.dense(config, budget)])
        if found.unwhiten is None or budget.left() <= 0:
            return found
        method = method_of(config)
        fits = [self._with_more_sweeps(found, budget.child(0.5, (0.0, 0.8))) if more else found]
        white, small = fits[0].fitted, self.weight.numel() <= _SMALL
        outputs = self._outputs_of(white, method)
        # on rows that were fitted to, so that the difference is not that to other rows, where no refit helps
        fitted, others = self._fitted.of(outputs) or 0.0, self.held_out.of(outputs) or 0.0
        del outputs  # and its memory
        differs = small or abs(fitted**2 - white.error**2) > _AGREES * fits[0].error ** 2
        if method.refit is not None and differs:
            refitted = method.refit(white, self._rows, budget.child(0.7, (0.8, 0.9)))
            # rounded to what the rows have found, which is not what is nearest to the weight
            fits.append(self._unwhitened(config, refitted, None, budget, "rows"))
        misleads = others**2 - white.error**2 > _MISLEADS * fits[0].error ** 2
        if small or (misleads and budget.left() > 0):
            self.__dict__.pop("_rows", None)  # its memory is for the solver
            fits += self._fits_to_weight(config, white.rank, budget.child(1.0, (0.9, 1.0)))
        return best([fit for fit in fits if fit.bytes <= found.bytes])

    def dense(self, config: DenseConfig, budget: Budget | None = None, quick: bool = False) -> Candidate:
        """The weight itself in the config's format: each value to the nearest, or the better of the ways to round."""

        def fit(weight: Tensor) -> Candidate:
            module = DenseBilinear.from_weight(weight, quantize=config.quantize)
            return self._stored(config, module, correct_bias=config.quantize is not None and not quick)

        found = [fit(self.weight)]
        if config.quantize is not None and not quick:
            fed_back = decompose.stored_weight(self.weight, config.quantize, self.metric, budget)
            found += [] if fed_back is None else [fit(fed_back)]
        return best(found)

    def _outputs_of(self, white: Decomposition, method: Method) -> Callable[[Tensor, Tensor], Tensor]:
        """What a decomposition in the coordinates of `ordered` computes of rows, before any rounding."""
        metric, bias = self.ordered[1], self.layer.bias
        module = cast(Any, method.layer).from_decomposition(white)

        def outputs(input1: Tensor, input2: Tensor) -> Tensor:
            first, second = (rows.to(module.weight_dtype) for rows in (input1, input2))
            found = module(metric.whitened_rows(1, first), metric.whitened_rows(2, second))
            found = found if metric.inverses[0] is None else found @ metric.inverses[0].to(found).T
            return cast(Tensor, found if bias is None else found + bias.to(found))

        return outputs

    @cached_property
    def _fitted(self) -> OutputError:
        """The error on some of the rows that are fitted to."""
        first, second = (rows[:_ROWS] for rows in self.inputs.fit)
        return OutputError(self.layer, self.inputs, (first, second))

    def _fits_to_weight(self, config: LayerConfig, rank: Rank, budget: Budget) -> list[Candidate]:
        """Of the plain weight, with the layer's bias and with a corrected one."""
        plain = self._solved(config, rank, budget)
        parts = method_of(config).round(plain, self.target, config.quantize)
        corrections = (True, False) if self._fix_bias else (True,)
        return [self._layer_of(config, parts, correct_bias=each, fitted=plain) for each in corrections]

    def _corrected(self, bias: Tensor, module: CompressedBilinear) -> tuple[Tensor, bool]:
        """With the mean of what the outputs lack."""
        if not self._fix_bias:
            return bias, False
        return (bias.double() + self._mean - self._mean_of(module)).to(bias.dtype), True

    def _error(self, module: CompressedBilinear) -> float:
        error = self.held_out.of(module)
        # rows on which the layer gives nothing say nothing: there, any replacement whose weight is right will do
        return weight_error(self.weight, module) if error is None else error

    @cached_property
    def _mean(self) -> Tensor:  # (O,)
        """⟨W_o, E[x1 x2ᵀ]⟩ of the weight, slab by slab."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        cross = self._cross.flatten().to(dtype)
        parts = [self.weight[slab].to(dtype).flatten(1) @ cross for slab in decompose.row_slices(self.weight.shape)]
        return torch.cat(parts).double()

    @property
    def _cross(self) -> Tensor:  # (I, J)
        return self.inputs.fit_moments[2].to(self.weight.device)

    @cached_property
    def _cross_rows(self) -> tuple[Tensor, Tensor]:
        """Rows (K, I) and (K, J) whose products sum up to E[x1 x2ᵀ]: its singular vectors."""
        left, values, right = torch.linalg.svd(self._cross, full_matrices=False)
        return (left * values).T, right

    def _mean_of(self, module: CompressedBilinear) -> Tensor:  # (O,)
        """The same of a module, by its forward: a low-rank one is not multiplied out."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        if module.weight_dtype != dtype and module.quantize is None:
            module = copy.deepcopy(module).to(dtype)
        first, second = (rows.to(dtype) for rows in self._cross_rows)
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            outputs = module(first, second).double()
        bias = module.bias
        return (outputs if not isinstance(bias, Tensor) else outputs - bias.detach().double()).sum(0)

    @cached_property
    def _rows(self) -> decompose.Rows:
        """Inputs in the coordinates of `ordered`, pairs and shuffled ones, their outputs and weights."""
        metric = self.ordered[1]
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        most = max(32, int(_FIT_FLOPS / (4 * self.weight.numel())))
        input1, input2 = (rows[:most].to(self.weight.device, dtype) for rows in self.inputs.fit)
        order = torch.randperm(len(input2), generator=torch.Generator().manual_seed(0), device="cpu")
        first = torch.cat([input1, input1])
        second = torch.cat([input2, input2[order.to(input2.device)]])
        weights = first.new_full((len(first),), decompose.SHUFFLED_WEIGHT)
        weights[: len(input1)] = 1.0
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            outputs = ops.bilinear_dense(first, second, self.weight.to(dtype))
            root = metric.roots[0]
            if root is not None:
                outputs = outputs @ root.to(outputs).T
            return metric.whitened_rows(1, first), metric.whitened_rows(2, second), outputs, weights
