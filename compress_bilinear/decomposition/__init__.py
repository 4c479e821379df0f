"""Weights to factors: tensors in, frozen results out."""

from ._cp import cp
from ._rank import check_tucker_rank, check_weight, cp_bytes, tucker_bytes
from ._tucker import tucker
from ._types import CPDecomposition, TuckerDecomposition, relative, relative_error

__all__ = [
    "CPDecomposition",
    "TuckerDecomposition",
    "check_tucker_rank",
    "check_weight",
    "cp",
    "cp_bytes",
    "relative",
    "relative_error",
    "tucker",
    "tucker_bytes",
]
