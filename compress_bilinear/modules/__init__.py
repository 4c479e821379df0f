"""The layers that take the place of `nn.Bilinear`, and layers in a model."""

from ._base import CompressedBilinear, block_rows
from ._cp import CPBilinear
from ._dense import DenseBilinear
from ._in_model import (
    FoundLayer,
    find,
    find_compressed,
    fingerprint,
    hooked,
    is_lazy,
    parameter_owners,
    plain_reference,
    reason_against,
    select,
    swap,
)
from ._linear import InterpolativeLinear, QuantizedLinear
from ._run import Call, call, undisturbed
from ._storage import stored_as
from ._tucker import TuckerBilinear
from .adapters import (
    COMPRESSED,
    AdaptedBilinear,
    AdaptedLayer,
    Adapter,
    adapted_layer,
    observing,
    recognise,
    register_adapter,
    unknown_forms,
)

__all__ = [
    "COMPRESSED",
    "AdaptedBilinear",
    "AdaptedLayer",
    "Adapter",
    "CPBilinear",
    "Call",
    "CompressedBilinear",
    "DenseBilinear",
    "FoundLayer",
    "InterpolativeLinear",
    "QuantizedLinear",
    "TuckerBilinear",
    "adapted_layer",
    "block_rows",
    "call",
    "find",
    "find_compressed",
    "fingerprint",
    "hooked",
    "is_lazy",
    "observing",
    "parameter_owners",
    "plain_reference",
    "reason_against",
    "recognise",
    "register_adapter",
    "select",
    "stored_as",
    "swap",
    "undisturbed",
    "unknown_forms",
]
