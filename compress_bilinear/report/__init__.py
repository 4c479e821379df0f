"""The report as data, and its renderers."""

from ._data import AS_CONFIGURED, SCHEMA_VERSION, FrontPoint, LayerReport, Report, Spectrum
from ._format import error, size, size_change, speedup
from ._terminal import compact_table, render_text

__all__ = [
    "AS_CONFIGURED",
    "SCHEMA_VERSION",
    "FrontPoint",
    "LayerReport",
    "Report",
    "Spectrum",
    "compact_table",
    "error",
    "render_text",
    "size",
    "size_change",
    "speedup",
]
