"""How numbers are stored: a format is a class, and `FORMATS` the table of them."""

from ._decode_bnb import missing
from ._formats import FORMATS, Bf16, Int8, Nf4
from ._int8 import LEVELS, SCALE_DTYPE, UNIT, decode_int8, encode_int8, encode_unit, expand_scale, scale_grid
from ._int8 import decode_int8 as dequantize
from ._int8 import expand_scale as expanded
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
    "decode_int8",
    "decode_nf4",
    "dequantize",
    "encode_int8",
    "encode_nf4",
    "encode_unit",
    "expand_scale",
    "expanded",
    "missing",
    "restore_dtypes",
    "scale_grid",
]
