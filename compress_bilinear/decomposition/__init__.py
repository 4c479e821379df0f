"""Weights to factors: tensors in, frozen results out.

`__all__` is for users; the other rooms use the other names too.
"""

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
from ._feedback import stored_columns, stored_weight, unit_columns
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
    "BlockEnergies",
    "Budget",
    "CPDecomposition",
    "Metric",
    "TuckerDecomposition",
    "cp",
    "cp_bytes",
    "rounded",
    "spectra",
    "tucker",
    "tucker_bytes",
    "tucker_flops",
    "tucker_parameters",
]
