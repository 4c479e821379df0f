"""What is asked of a layer: which method, at which rank or target, stored in which format."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from ..errors import ConfigError

Quantize: TypeAlias = Literal["bf16", "int8", "nf4"]
"""The storage formats besides the layer's own dtype: 16, 8 and 4 bits."""

Compute: TypeAlias = Literal["on_the_fly", "bfloat16", "int8", "bitsandbytes"]
"""How a quantized layer computes: see `set_compute`."""


def check_one_of(value: object, allowed: Sequence[object], what: str) -> None:
    """Raise `ConfigError` unless `value` is allowed."""
    if value not in allowed:
        raise ConfigError(f"{what} should be one of {', '.join(map(repr, allowed))}. Found {value!r}.")


def check_quantize(quantize: object) -> None:
    """Raise `ConfigError` unless `quantize` is None or one of `Quantize`."""
    check_one_of(quantize, (None, *get_args(Quantize)), "`quantize`")


def check_rank(rank: object, what: str = "`rank`") -> None:
    """Raise `ConfigError` unless `rank` is a positive int."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"{what} should be a positive int. Found {rank!r}.")
    if rank >= 2**31:
        raise ConfigError(f"{what} should be below 2**31. Found an int of {rank.bit_length()} bits.")


def _check_seed(seed: object) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ConfigError(f"`seed` should be an int from 0 to 2**63 - 1. Found {seed!r}.")


def _check_fraction(value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ConfigError(f"{what} should be a number above 0 and below 1. Found {value!r}.")


Fit: TypeAlias = Literal["output", "weight"]
"""What factors are fitted to."""


@dataclass(frozen=True)
class MaxError:
    """The cheapest rank whose relative error is at most `error`, after everything that is stored has been rounded.

    Args:
        error: above 0 and below 1.
        on: "weight" counts the Frobenius error of the weight, ‖W − Ŵ‖/‖W‖; "output" the error of the layer's outputs,
            ‖y − ŷ‖/‖y − b‖, on calibration rows that no fit has seen.

    Raises: ConfigError for anything else.
    """

    error: float
    on: Literal["weight", "output"] = "weight"

    def __post_init__(self) -> None:
        _check_fraction(self.error, "`MaxError`'s error")
        check_one_of(self.on, ("weight", "output"), "`on` of a MaxError")


@dataclass(frozen=True)
class MaxSize:
    """The lowest error within `fraction` of the layer's original bytes; everything stored counts, bias included.

    Raises: ConfigError unless 0 < fraction < 1.
    """

    fraction: float

    def __post_init__(self) -> None:
        _check_fraction(self.fraction, "`MaxSize`'s fraction")


CPRank: TypeAlias = int | MaxError | MaxSize
TuckerRank: TypeAlias = tuple[int, int, int] | MaxError | MaxSize


@dataclass(frozen=True, kw_only=True)
class CPConfig:
    """Replace a layer by `CPBilinear`: W_oij ≈ Σ_r C_or A_ir B_jr, that is R(O + I + J) parameters.

    Args:
        rank: the number of components R, or a target (`MaxError`, `MaxSize`) that chooses it.
        quantize: None keeps the layer's dtype; "bf16", "int8" and "nf4" store the factors in 16, 8 or 4 bits.
        seed: of the solver's random starts.
        fit: "output" fits the layer's outputs where there are calibration rows; "weight" the weight in any case, as
            without rows, and as a `MaxError` on the weight does.

    Raises: ConfigError for anything else.
    """

    rank: CPRank
    quantize: Quantize | None = None
    seed: int = 0
    fit: Fit = "output"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, (MaxError, MaxSize)):
            check_rank(self.rank, "`rank` of a CPConfig, where it is not a MaxError or MaxSize,")
        check_quantize(self.quantize)
        _check_seed(self.seed)
        check_one_of(self.fit, get_args(Fit), "`fit`")


@dataclass(frozen=True, kw_only=True)
class TuckerConfig:
    """Replace a layer by `TuckerBilinear`: W ≈ G ×_O U ×_I A ×_J B with a core G of shape (R_o, R_i, R_j).

    Args:
        rank: the triple (R_o, R_i, R_j) in the order of the weight's axes, or a target that chooses it.
        quantize: None keeps the layer's dtype; "bf16", "int8" and "nf4" store core and factors in 16, 8 or 4 bits.
        fit: as in `CPConfig`.

    A mode whose rank is its size is absorbed into the core: it has no factor.

    Raises: ConfigError for anything else.
    """

    rank: TuckerRank
    quantize: Quantize | None = None
    fit: Fit = "output"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, (MaxError, MaxSize)):
            if not isinstance(self.rank, (tuple, list)) or len(self.rank) != 3:
                raise ConfigError(
                    "`rank` of a TuckerConfig should be a triple (out, in1, in2), a MaxError or a MaxSize. "
                    f"Found {self.rank!r}."
                )
            for axis, value in enumerate(self.rank):
                check_rank(value, f"`rank[{axis}]` of a TuckerConfig")
            object.__setattr__(self, "rank", tuple(self.rank))
        check_quantize(self.quantize)
        check_one_of(self.fit, get_args(Fit), "`fit`")


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Replace a layer by `DenseBilinear`: the weight itself, evaluated in the best order.

    Args:
        quantize: None keeps every bit of the weight, and the replacement is made where it is measured faster;
            "bf16", "int8" and "nf4" store it in 16, 8 or 4 bits, and the replacement is made where it is smaller.

    Raises: ConfigError for any other `quantize`.
    """

    quantize: Quantize | None = None

    def __post_init__(self) -> None:
        check_quantize(self.quantize)


@dataclass(frozen=True, kw_only=True)
class AutoConfig:
    """Choose method, rank and storage format for each layer, by what they are measured to lose and to cost.

    The error of CP and Tucker is predicted at every rank and in every format, with the layer's own dtype. What is
    picked is made and measured, until nothing better is predicted; then it is polished. A dense layer in every format
    is always made. What counts is the output error on calibration rows that no fit has seen; without calibration, the
    weight error.

    Args:
        error: every layer's error is at most this, and what it costs is least. A number, or a `MaxError`; a number
            counts on the outputs where there are calibration rows.
        size: all layers of this config together take at most this fraction of their bytes, and the sum of their
            squared errors is least. A number, or a `MaxSize`.
        metric_drop: the network's own metric, that of the option `evaluate`, of which more is better, falls by at most
            this, and all layers of this config together are small. A number above 0 in the metric's units. Some
            compressed copies of the network are measured, about eight.
        prefer: "size" makes the bytes small; "speed" the measured time of a call: under an `error`, of all that meet it
            the fastest is taken; under a `size`, what is slower than the layer itself is left out wherever something
            faster fits.
        seed: of the solvers' random starts.

    Raises: ConfigError for anything else, or unless exactly one of `error`, `size` and `metric_drop` is given.
    """

    error: MaxError | float | None = None
    size: MaxSize | float | None = None
    metric_drop: float | None = None
    prefer: Literal["size", "speed"] = "size"
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("error", "size", "metric_drop") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ConfigError(f"An AutoConfig should have one of `error`, `size` and `metric_drop`. Found {found}.")
        drop = self.metric_drop
        if drop is not None and (isinstance(drop, bool) or not isinstance(drop, (int, float)) or not drop > 0):
            raise ConfigError(f"`metric_drop` should be a number above 0. Found {drop!r}.")
        if self.error is not None and not isinstance(self.error, MaxError):
            _check_fraction(self.error, "`error` of an AutoConfig, where it is not a MaxError,")
        if self.size is not None and not isinstance(self.size, MaxSize):
            _check_fraction(self.size, "`size` of an AutoConfig, where it is not a MaxSize,")
        check_one_of(self.prefer, ("size", "speed"), "`prefer`")
        _check_seed(self.seed)

    @property
    def fraction(self) -> float | None:
        """The `size` as a number."""
        return self.size.fraction if isinstance(self.size, MaxSize) else self.size

    def limit(self, calibrated: bool) -> MaxError | None:
        """The `error` as a `MaxError`; a plain number's meaning depends on whether there are calibration rows."""
        if self.error is None or isinstance(self.error, MaxError):
            return self.error
        return MaxError(self.error, on="output" if calibrated else "weight")


LayerConfig: TypeAlias = CPConfig | TuckerConfig | DenseConfig
"""What one layer is replaced by."""

Config: TypeAlias = LayerConfig | AutoConfig

CONFIGS: dict[str, Any] = {"cp": CPConfig, "tucker": TuckerConfig, "dense": DenseConfig, "auto": AutoConfig}
"""The configs by the name of their method, as recipes and the command line have it."""
