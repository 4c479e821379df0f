"""The layers that take the place of `nn.Bilinear`."""

from ._base import CompressedBilinear, block_rows
from ._cp import CPBilinear
from ._dense import DenseBilinear
from ._linear import InterpolativeLinear, QuantizedLinear
from ._storage import stored_as
from ._tucker import TuckerBilinear

__all__ = [
    "CPBilinear",
    "CompressedBilinear",
    "DenseBilinear",
    "InterpolativeLinear",
    "QuantizedLinear",
    "TuckerBilinear",
    "block_rows",
    "stored_as",
]
