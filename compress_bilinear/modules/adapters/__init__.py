"""Foreign modules: bilinear weights in other classes than `nn.Bilinear`, read and replaced through adapters."""

from ._adapter import COMPRESSED, AdaptedBilinear, Adapter, split_name
from ._module import AdaptedModule, observing
from ._recognition import recognise
from ._registry import adapted_module, register_adapter
from ._unknown import unknown_forms
