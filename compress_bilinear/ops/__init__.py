"""Factors and inputs to outputs: tensors in, tensors out. `reference` is the definition.

`__all__` is for users; the layers use the other names too.
"""

from . import reference
from ._api import (
    bilinear_cp,
    bilinear_dense,
    bilinear_tucker,
    check_inputs,
    pairwise_cp,
    pairwise_dense,
    pairwise_tucker,
)
from ._blocks import Tuning, block_runner, plus, tuning, use_tuning
from ._choice import BACKENDS, Backend, explain
from ._context import autocast_dtype, has_rows, without_autocast
from ._cp import over_pairs
from ._dense import ORDERS, Order, best_order, dense_flops
from ._gemm import linear
from ._integers import int8_bilinear, int8_linear
from ._stored import Weight, project, slabs

__all__ = [
    "BACKENDS",
    "ORDERS",
    "Backend",
    "Order",
    "Tuning",
    "Weight",
    "best_order",
    "bilinear_cp",
    "bilinear_dense",
    "bilinear_tucker",
    "dense_flops",
    "explain",
    "pairwise_cp",
    "pairwise_dense",
    "pairwise_tucker",
    "reference",
    "tuning",
    "use_tuning",
]
