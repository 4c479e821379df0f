"""From a config to a replacement for one layer."""

import math
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_never

from .. import decomposition as decompose
from ..config import CPConfig, DenseConfig, LayerConfig, MaxError, MaxSize, TuckerConfig
from ..decomposition import CPDecomposition
from ..errors import AmplificationWarning, InfeasibleError
from ..modules import CompressedBilinear, CPBilinear, DenseBilinear, TuckerBilinear
from ..report import ComputeMode, FrontPoint
from ._calibrate import FEWEST_ROWS
from ._candidate import point
from ._fit import Fitted, Fitting
from ._fit_weight import within_after_rounding
from ._measure import resident_bytes, stored_bytes, weight_error
from ._search import Chooser, without_bias

_CLOSING = 0.1  # of a time budget, to compare what has been found with what the weight alone gives


@dataclass(frozen=True, eq=False)
class Candidate:
    """A replacement that has been solved for: the module, its error as stored, and CP's amplification.

    Of a quantized one also the parts of that error: of the decomposition in floating point, and how far what is stored
    is from it, both relative to the weight's norm.

    Attributes:
        output_error: on held-out rows, where it was fitted to others.
        own_bias: whether its bias was corrected, and is no longer the layer's.
        note: what else is to be said of it.
        tried: what else a search for the rank found, itself perhaps among it.
        compute_modes: what its compute mode was chosen by.
    """

    module: CompressedBilinear
    weight_error: float
    amplification: float | None
    truncation_error: float | None = None
    quantization_error: float | None = None
    output_error: float | None = None
    own_bias: bool = False
    note: str | None = None
    tried: tuple[FrontPoint, ...] = ()
    compute_modes: tuple[ComputeMode, ...] = ()

    @property
    def storage(self) -> dict[str, Any]:
        """The fields of a `LayerReport` about a quantized layer; none for another."""
        if self.module.quantize is None:
            return {}
        truncation = 0.0 if self.module.method == "dense" else self.truncation_error
        return {
            "truncation_error": truncation,
            "quantization_error": self.weight_error if self.module.method == "dense" else self.quantization_error,
            "resident_bytes": resident_bytes(self.module),
            "compute": self.module.compute,
            "compute_modes": self.compute_modes,
        }


def solve(
    layer: nn.Bilinear,
    config: LayerConfig,
    max_seconds: float | None = None,
    progress: decompose.Progress | None = None,
    fitting: Fitting | None = None,
) -> Candidate:
    """Build the replacement that `config` asks for; `layer` is left as it is.

    Under a `MaxError`, rounding to the stored format counts: where it makes the target missed, the decomposition is
    solved again to a tighter one, until both fit.

    Args:
        max_seconds, progress: as in `decomposition.cp`.
        fitting: of the layer's outputs, where there are rows to fit to.

    Raises:
        ConfigError: the rank does not fit the layer.
        InfeasibleError: no rank meets the target, or the weight is all zero.
    """
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(config, DenseConfig):
        if fitting is not None and config.quantize is not None:
            return as_candidate(layer, fitting.dense(config, seconds=max_seconds, progress=progress))
        module = DenseBilinear.from_bilinear(layer, quantize=config.quantize)
        return Candidate(module, weight_error(weight, module), None)
    if not bool(weight.any()):
        raise InfeasibleError("its weight is all zero: nothing to decompose, and zero factors would never train")
    on_output = isinstance(config.rank, MaxError) and config.rank.on == "output"
    if on_output and fitting is None:
        raise InfeasibleError(
            f"{config.rank} needs calibration rows of the layer, at least {FEWEST_ROWS}. Found too few or none."
        )
    if fitting is not None and (on_output or (config.fit == "output" and not isinstance(config.rank, MaxError))):
        return _fitted(layer, config, max_seconds, progress, fitting)
    rank = without_bias(config.rank, layer) if isinstance(config.rank, MaxSize) else config.rank
    begun, shown = time.perf_counter(), 0.0

    def report(done: float, error: float) -> None:
        nonlocal shown
        shown = max(shown, done)  # an attempt begins anew, a bar does not
        if progress is not None:
            progress(shown, error)

    def attempt(rank: object) -> Candidate:
        left = None if max_seconds is None else max(max_seconds - (time.perf_counter() - begun), 1e-3)
        if left is not None and isinstance(rank, MaxError):
            left /= 2  # and the rest for another attempt
        return _decompose(weight, bias, config, rank, left, report)

    if not isinstance(rank, MaxError):
        try:
            return attempt(rank)
        except InfeasibleError as error:
            raise InfeasibleError(f"{config.rank} of the layer is too small beside its bias: {error}") from error

    tried = []

    def measured(target: MaxError) -> tuple[Candidate, float]:
        found = attempt(target)
        tried.append(point(found.module, found.weight_error, None))
        return found, found.weight_error

    met = within_after_rounding(measured, rank.error, config.quantize, weight.dtype)
    return replace(met, tried=tuple(tried))


def _decompose(
    weight: Tensor,
    bias: Tensor | None,
    config: CPConfig | TuckerConfig,
    rank: object,
    max_seconds: float | None,
    progress: decompose.Progress | None,
) -> Candidate:
    module: CompressedBilinear
    asked: dict[str, Any] = {"quantize": config.quantize, "max_seconds": max_seconds, "progress": progress}
    match config:
        case CPConfig():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AmplificationWarning)  # the report says it, of what is really used
                cp = decompose.cp(weight, rank, seed=config.seed, **asked)  # type: ignore[arg-type]
            found = decompose.rounded(cp, weight, config.quantize)
            module = CPBilinear.from_decomposition(found, bias, quantize=config.quantize)
            return Candidate(module, *_errors(weight, cp, module, cp.amplification))
        case TuckerConfig():
            tucker = decompose.tucker(weight, rank, **asked)  # type: ignore[arg-type]
            core = decompose.rounded(tucker, weight, config.quantize)
            module = TuckerBilinear.from_decomposition(core, bias, quantize=config.quantize)
            return Candidate(module, *_errors(weight, tucker, module, None))
        case _:
            assert_never(config)


def _errors(
    weight: Tensor,
    floating: decompose.CPDecomposition | decompose.TuckerDecomposition,
    module: CompressedBilinear,
    amplification: float | None,
) -> tuple[float, float | None, float | None, float | None]:
    """The fields of a `Candidate` after its module."""
    total = weight_error(weight, module)
    if module.quantize is None:
        return total, amplification, None, None
    apart = decompose.distance(weight, floating, lambda rows: module.dense_rows(rows, torch.float64))
    truncation = floating.relative_error(weight) if floating.error is None else floating.error
    return total, amplification, truncation, apart


def _fitted(
    layer: nn.Bilinear,
    config: CPConfig | TuckerConfig,
    max_seconds: float | None,
    progress: decompose.Progress | None,
    fitting: Fitting,
) -> Candidate:
    """The replacement that loses least of the layer's outputs, on rows that it was not fitted to."""
    if not isinstance(config.rank, MaxError):
        rank = without_bias(config.rank, layer) if isinstance(config.rank, MaxSize) else config.rank
        try:
            return as_candidate(layer, fitting.at(config, rank, seconds=max_seconds, progress=progress))
        except InfeasibleError as error:
            raise InfeasibleError(f"{config.rank} of the layer is too small beside its bias: {error}") from error
    begun = time.perf_counter()
    searching = None if max_seconds is None else (1 - _CLOSING) * max_seconds
    fits = Chooser(layer, fitting, searching, progress).smallest(config, config.rank.error)
    met = [fit for fit in fits if fit.error <= config.rank.error]
    if not met:
        kind = "cp" if isinstance(config, CPConfig) else "tucker"
        lowest = min((fit.error for fit in fits), default=math.inf)
        raise InfeasibleError(
            f"An output error of {config.rank.error:g} is out of reach of a {kind} that is smaller than the "
            f"layer, or was not met in time: the lowest that was found is {lowest:.3g}."
        )
    left = None if max_seconds is None else max(max_seconds - (time.perf_counter() - begun), 1e-3)
    best = fitting.assured(config, min(met, key=lambda fit: stored_bytes(fit.module)), seconds=left)
    candidate = as_candidate(layer, best)
    return replace(candidate, tried=tuple(point(fit.module, None, fit.error) for fit in fits))


def as_candidate(layer: nn.Bilinear, found: Fitted) -> Candidate:
    """With the errors of its weight."""
    weight, module, floating = layer.weight.detach(), found.module, found.decomposition
    fitted: dict[str, Any] = {"output_error": found.error if found.on_output else None, "own_bias": found.own_bias}
    fitted["note"] = found.note
    if floating is None:
        return Candidate(module, weight_error(weight, module), None, **fitted)
    amplification = floating.amplification if isinstance(floating, CPDecomposition) else None
    return Candidate(module, *_errors(weight, floating, module, amplification), **fitted)
