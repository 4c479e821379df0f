"""16-, 8- and 4-bit storage: plain buffers, integers with floating scales, and what they stand for."""

from ._bf16 import BF16Tensor
from ._decode_bnb import missing
from ._int8 import (
    LEVELS,
    SCALE_DTYPE,
    UNIT,
    dequantize,
    expanded,
    quantize_blocks,
    quantize_int8,
    quantize_unit,
    scale_count,
    scale_grid,
)
from ._nf4 import BLOCK, NF4_CODE, dequantize_nf4, nf4_bytes, quantize_nf4
from ._tensor import NF4Tensor, QuantizedTensor, restore_dtypes

__all__ = [
    "BLOCK",
    "LEVELS",
    "NF4_CODE",
    "SCALE_DTYPE",
    "UNIT",
    "BF16Tensor",
    "NF4Tensor",
    "QuantizedTensor",
    "dequantize",
    "dequantize_nf4",
    "expanded",
    "missing",
    "nf4_bytes",
    "quantize_blocks",
    "quantize_int8",
    "quantize_nf4",
    "quantize_unit",
    "restore_dtypes",
    "scale_count",
    "scale_grid",
]
