"""How numbers are stored: a format is a class, and `FORMATS` the table of them."""

from ._decode_bnb import missing
from ._formats import FORMATS, Bf16, Int8, Nf4
from ._int8 import (
    LEVELS,
    SCALE_DTYPE,
    UNIT,
    dequantize,
    expanded,
    quantize_blocks,
    quantize_int8,
    quantize_unit,
    scale_grid,
)
from ._nf4 import BLOCK, NF4_CODE, decode_nf4, encode_nf4
from ._tensor import Buffer, Format, Layout, QuantizedTensor, restore_dtypes

__all__ = [
    "BLOCK",
    "FORMATS",
    "LEVELS",
    "NF4_CODE",
    "SCALE_DTYPE",
    "UNIT",
    "Bf16",
    "Buffer",
    "Format",
    "Int8",
    "Layout",
    "Nf4",
    "QuantizedTensor",
    "decode_nf4",
    "dequantize",
    "encode_nf4",
    "expanded",
    "missing",
    "quantize_blocks",
    "quantize_int8",
    "quantize_unit",
    "restore_dtypes",
    "scale_grid",
]
