"""Modules that carry a bilinear weight in another form than `nn.Bilinear`'s: read, verified, and rebuilt around it."""

from ._adapter import COMPRESSED, AdaptedBilinear, Adapter
from ._carried import AdaptedLayer, observing
from ._recognition import recognise
from ._registry import adapted_layer, register_adapter, unknown_forms

__all__ = [
    "COMPRESSED",
    "AdaptedBilinear",
    "AdaptedLayer",
    "Adapter",
    "adapted_layer",
    "observing",
    "recognise",
    "register_adapter",
    "unknown_forms",
]
