"""Foreign modules: bilinear weights in other classes than `nn.Bilinear`, read and replaced through adapters."""

from ._adapter import COMPRESSED, AdaptedBilinear, Adapter
from ._layer import AdaptedLayer, observing
from ._recognition import recognise
from ._registry import adapted_layer, register_adapter, unknown_forms
