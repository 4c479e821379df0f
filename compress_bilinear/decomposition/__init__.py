"""Weights to factors: tensors in, frozen results out."""

from ._clock import Progress, check_max_seconds
from ._cp import cp
from ._cp_solve import AMPLIFICATION_LIMIT
from ._interpolation import interpolation, is_interpolated
from ._rank import check_tucker_rank, check_weight, cp_bytes, tucker_bytes, tucker_flops, tucker_parameters
from ._rounding import distance, rounded, unit_columns
from ._tucker import tucker
from ._types import CPDecomposition, TuckerDecomposition, relative, relative_error

__all__ = [
    "AMPLIFICATION_LIMIT",
    "CPDecomposition",
    "Progress",
    "TuckerDecomposition",
    "check_max_seconds",
    "check_tucker_rank",
    "check_weight",
    "cp",
    "cp_bytes",
    "distance",
    "interpolation",
    "is_interpolated",
    "relative",
    "relative_error",
    "rounded",
    "tucker",
    "tucker_bytes",
    "tucker_flops",
    "tucker_parameters",
    "unit_columns",
]
