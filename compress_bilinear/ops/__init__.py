"""Factors and inputs to outputs: tensors in, tensors out. `reference` is the definition."""

from . import reference
from ._dense import ORDERS, Order, best_order, bilinear_dense, block_runner, dense_flops, is_tracing, pairwise_dense

__all__ = [
    "ORDERS",
    "Order",
    "best_order",
    "bilinear_dense",
    "block_runner",
    "dense_flops",
    "is_tracing",
    "pairwise_dense",
    "reference",
]
