"""Weights to factors: tensors in, frozen results out."""

from ._cp import cp
from ._rank import check_tucker_rank, check_weight, cp_bytes, tucker_bytes
from ._tucker import tucker
from ._types import CPDecomposition, TuckerDecomposition, relative, row_slices

__all__ = [
    "CPDecomposition",
    "TuckerDecomposition",
    "check_tucker_rank",
    "check_weight",
    "cp",
    "cp_bytes",
    "relative",
    "row_slices",
    "tucker",
    "tucker_bytes",
]
