"""Factors and inputs to outputs: tensors in, tensors out. `reference` is the definition."""

from . import reference
from ._api import bilinear_cp, bilinear_dense, bilinear_tucker, explain, pairwise_cp, pairwise_dense, pairwise_tucker
from ._choice import BACKENDS, Backend, Choice
from ._cp import over_pairs, pair_blocks, small_cp
from ._dense import ORDERS, Order, best_order, block_runner, dense_flops, is_tracing
from ._gemm import linear, linear_times, stored_linear
from ._small import small_dense

__all__ = [
    "BACKENDS",
    "ORDERS",
    "Backend",
    "Choice",
    "Order",
    "best_order",
    "bilinear_cp",
    "bilinear_dense",
    "bilinear_tucker",
    "block_runner",
    "dense_flops",
    "explain",
    "is_tracing",
    "linear",
    "linear_times",
    "over_pairs",
    "pair_blocks",
    "pairwise_cp",
    "pairwise_dense",
    "pairwise_tucker",
    "reference",
    "small_cp",
    "small_dense",
    "stored_linear",
]
