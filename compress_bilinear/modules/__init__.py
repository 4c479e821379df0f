"""The layers that take the place of `nn.Bilinear`, and layers in a model."""

from ._base import CompressedBilinear, block_rows
from ._cp import CPBilinear
from ._dense import DenseBilinear
from ._in_model import (
    FoundLayer,
    find,
    find_compressed,
    fingerprint,
    is_lazy,
    module_names,
    parameter_owners,
    reason_against,
    reason_against_hooks,
    select,
)
from ._linear import InterpolativeLinear, QuantizedLinear
from ._methods import METHODS, Decomposition, Method, Rank, method_name, method_of
from ._references import reference
from ._run import Call, WeightReads, call, is_writable, noting, place, undisturbed
from ._saving import guard_saving, has_other_state
from ._storage import stored_as
from ._swap import check_inplace, replacements, swap, take_flags
from ._tucker import TuckerBilinear
from .adapters import (
    COMPRESSED,
    AdaptedBilinear,
    AdaptedModule,
    Adapter,
    adapted_module,
    observing,
    recognise,
    register_adapter,
    split_name,
)
