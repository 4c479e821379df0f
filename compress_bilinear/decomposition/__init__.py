"""Weights to factors: tensors in, frozen results out."""

from ..config import check_max_seconds
from ._als import AMPLIFICATION_LIMIT
from ._budget import Budget, Progress
from ._cp import cp, cp_sketch
from ._factors import (
    CPDecomposition,
    TuckerDecomposition,
    relative,
    relative_errors,
    row_slices,
    tucker_rows,
    working_dtype,
)
from ._feedback import stored_columns, stored_core, stored_weight, unit_columns
from ._hosvd import ordered
from ._interpolation import interpolation, is_interpolated
from ._metric import PLAIN, Metric, unwhitened_cp, unwhitened_tucker
from ._refit import SHUFFLED_WEIGHT, Rows, refit_cp, refit_tucker
from ._rounding import rounded
from ._search import tightened
from ._sizes import check_tucker_rank, check_weight, cp_bytes, tucker_bytes, tucker_flops, tucker_parameters
from ._source import mode_product
from ._spectra import spectra
from ._tucker import tucker
from ._tucker_ranks import BlockEnergies

__all__ = [
    "AMPLIFICATION_LIMIT",
    "PLAIN",
    "SHUFFLED_WEIGHT",
    "BlockEnergies",
    "Budget",
    "CPDecomposition",
    "Metric",
    "Progress",
    "Rows",
    "TuckerDecomposition",
    "check_max_seconds",
    "check_tucker_rank",
    "check_weight",
    "cp",
    "cp_bytes",
    "cp_sketch",
    "interpolation",
    "is_interpolated",
    "mode_product",
    "ordered",
    "refit_cp",
    "refit_tucker",
    "relative",
    "relative_errors",
    "rounded",
    "row_slices",
    "spectra",
    "stored_columns",
    "stored_core",
    "stored_weight",
    "tightened",
    "tucker",
    "tucker_bytes",
    "tucker_flops",
    "tucker_parameters",
    "tucker_rows",
    "unit_columns",
    "unwhitened_cp",
    "unwhitened_tucker",
    "working_dtype",
]
