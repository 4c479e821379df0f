"""A layer's record as the model holds it: what was turned down is left out of a kept layer's."""

from dataclasses import fields, replace
from typing import Any

from ._data import LayerReport


def held(layer: LayerReport) -> LayerReport:
    """The record with the figures of what stands in the model: a kept layer is exact, and as fast as it was."""
    if layer.decision == "replaced":
        return layer
    before, dense = layer.latency_before_ms, layer.latency_dense_ms
    exact: dict[str, Any] = {field.name: 0.0 for field in fields(layer) if field.name.endswith("_error")}
    return replace(
        layer,
        **exact,
        rank=None,
        quantize=None,
        resident_bytes=None,
        compute=None,
        latency_after_ms=before,
        latency_after_quartiles_ms=layer.latency_before_quartiles_ms,
        speedup=1.0,
        speedup_vs_dense=dense / before if dense is not None and before else None,
        amplification=None,
    )
