"""Factors and inputs to outputs: tensors in, tensors out. `reference` is the definition."""

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
from ._blocks import Tuning, block_runner, tuning, use_tuning
from ._choice import BACKENDS, Backend, explain
from ._context import autocast_dtype, autocast_enabled, traced, transformed, without_autocast
from ._cp import over_pairs
from ._dense import ORDERS, Order, best_order, dense_flops
from ._gemm import linear, stored_linear
from ._stored import Weight, project, slabs

__all__ = [
    "BACKENDS",
    "ORDERS",
    "Backend",
    "Order",
    "Tuning",
    "Weight",
    "autocast_dtype",
    "autocast_enabled",
    "best_order",
    "bilinear_cp",
    "bilinear_dense",
    "bilinear_tucker",
    "block_runner",
    "check_inputs",
    "dense_flops",
    "explain",
    "linear",
    "over_pairs",
    "pairwise_cp",
    "pairwise_dense",
    "pairwise_tucker",
    "project",
    "reference",
    "slabs",
    "stored_linear",
    "traced",
    "transformed",
    "tuning",
    "use_tuning",
    "without_autocast",
]
