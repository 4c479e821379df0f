"""The table of methods: what fits, searches, stores and loads goes by it, so that a new method is one more row."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from .. import decomposition as decompose
from ..config import AutoConfig, Config, CPConfig, DenseConfig, LayerConfig, MaxError, MaxSize, Quantize, TuckerConfig
from ..decomposition import Budget, CPDecomposition, TuckerDecomposition
from ..errors import AmplificationWarning
from ._base import CompressedBilinear
from ._cp import CPBilinear
from ._dense import DenseBilinear
from ._tucker import TuckerBilinear

Decomposition: TypeAlias = Any  # what a row's `solve` returns; it has rank, factors and to_tensor()
Rank: TypeAlias = Any  # what a row's config takes: an int, a triple, a MaxSize or a MaxError


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to write a weight (O, I, J) with fewer numbers.

    Attributes:
        name: as `LayerReport.method` and the layer's `method` have it.
        config: the class that asks for it.
        layer: the class that computes with it; `layer.from_decomposition` makes one.
        solve: (weight, rank, config, budget) -> decomposition, with its `error`. None where the weight itself is
            stored. A row with `predict` also takes `ordered`: whether the weight is in the coordinates of its HOSVD,
            see `decomposition.ordered`.
        sketch: of an ordered weight, the same in a limited time: (weight, rank, config, budget, sweeps, begin) ->
            decomposition, going on from `begin` where that is not None. None where `solve` is quick.
        nbytes: (rank, shape, bytes of an entry of the weight, format) -> bytes that the layer stores, without bias.
        predict: of an ordered weight, a function (bytes of an entry, format, a size in bytes) -> a list of (rank, its
            bytes, relative squared error) over all sizes, this one included. None where the error of a rank is only
            known from a solution.
        refit: (decomposition, rows, budget) -> decomposition with factors fitted to rows; see `decomposition.Rows`.
            None leaves them as they are.
        round: as `decomposition.rounded`, of the arguments there.
        unwhiten: (decomposition of a whitened weight, metric, dtype) -> decomposition of the weight. None where the
            method is only ever fitted to the weight.
        check: raises ConfigError where (rank, shape, name of the layer) do not fit.
        configure: (rank, format, seed) -> config.
    """

    name: str
    config: type[LayerConfig]
    layer: type[CompressedBilinear]
    solve: Callable[..., Decomposition] | None = None
    sketch: Callable[..., Decomposition] | None = None
    nbytes: Callable[..., int] = lambda rank, shape, itemsize, quantize: 0
    predict: Callable[[Tensor], Callable[..., list[tuple[Rank, float, float]]]] | None = None
    refit: Callable[[Decomposition, decompose.Rows, Budget], Decomposition] | None = None
    round: Callable[..., Decomposition] = lambda found, weight, quantize, *_, **__: found
    unwhiten: Callable[..., Decomposition] | None = None
    check: Callable[[Rank, Sequence[int], str], None] = lambda rank, shape, where: None
    configure: Callable[[Rank, Quantize | None, int], LayerConfig]


def _solve_tucker(
    weight: Tensor, rank: Rank, config: TuckerConfig, budget: Budget, ordered: bool = False
) -> TuckerDecomposition:
    return decompose.tucker(weight, rank, quantize=config.quantize, ordered=ordered, **_limits(budget))


def _predict_tucker(weight: Tensor) -> Callable[..., list[tuple[Rank, float, float]]]:
    energies = decompose.BlockEnergies(weight)

    def points(itemsize: int, quantize: Quantize | None, anchor: float) -> list[tuple[Rank, float, float]]:
        prices = partial(decompose.tucker_bytes, shape=weight.shape, itemsize=itemsize, quantize=quantize)
        return [*energies.front(prices, anchor)]

    return points


def _solve_cp(weight: Tensor, rank: Rank, config: CPConfig, budget: Budget, ordered: bool = False) -> CPDecomposition:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AmplificationWarning)  # the report says it, of what is stored
        return decompose.cp(weight, rank, seed=config.seed, quantize=config.quantize, **_limits(budget))


def _sketch_cp(
    weight: Tensor, rank: Rank, config: CPConfig, budget: Budget, sweeps: int, begin: CPDecomposition | None = None
) -> CPDecomposition:
    known: dict[str, Any] = {"seed": config.seed, "quantize": config.quantize, "budget": budget}
    return decompose.cp_sketch(weight, rank, sweeps=sweeps, begin=begin, **known)


def _limits(budget: Budget) -> dict[str, Any]:
    return {"max_seconds": budget.max_seconds if budget.limited else None, "progress": budget.report}


def _check_tucker(rank: Rank, shape: Sequence[int], where: str) -> None:
    if not isinstance(rank, (MaxError, MaxSize)):
        decompose.check_tucker_rank(rank, shape, where)


METHODS: dict[str, Method] = {
    "dense": Method(
        name="dense",
        config=DenseConfig,
        layer=DenseBilinear,
        configure=lambda rank, quantize, seed: DenseConfig(quantize=quantize),
    ),
    "tucker": Method(
        name="tucker",
        config=TuckerConfig,
        layer=TuckerBilinear,
        solve=_solve_tucker,
        nbytes=decompose.tucker_bytes,
        predict=_predict_tucker,
        refit=decompose.refit_tucker,
        round=decompose.rounded,
        unwhiten=decompose.unwhitened_tucker,
        check=_check_tucker,
        configure=lambda rank, quantize, seed: TuckerConfig(rank=rank or (1, 1, 1), quantize=quantize),
    ),
    "cp": Method(
        name="cp",
        config=CPConfig,
        layer=CPBilinear,
        solve=_solve_cp,
        sketch=_sketch_cp,
        nbytes=decompose.cp_bytes,
        refit=decompose.refit_cp,
        round=decompose.rounded,
        unwhiten=decompose.unwhitened_cp,
        configure=lambda rank, quantize, seed: CPConfig(rank=rank or 1, quantize=quantize, seed=seed),
    ),
}
"""By name. What is predicted without a solution stands first: a search tries methods in this order."""


def method_of(config: Config) -> Method:
    """The row of a config; an `AutoConfig` has none. Raises: KeyError."""
    return next(row for row in METHODS.values() if type(config) is row.config)


def method_name(config: Config) -> str:
    """What `LayerReport.method` says before anything is chosen."""
    return "auto" if isinstance(config, AutoConfig) else method_of(config).name
