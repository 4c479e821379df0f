"""How numbers are stored: a format is a class, and `FORMATS` the table of them."""

from ._decode_bnb import missing
from ._formats import FORMATS, Int8
from ._int8 import LEVELS, UNIT, decode_int8, encode_int8, expand_scale, scale_grid
from ._tensor import Buffer, FixedBuffers, Format, Layout, QuantizedTensor
