"""The report as data, and its renderers."""

from ._comparison import DEFAULT_FIELDS, Comparison, Limit, Panel, better, compare, failures
from ._data import (
    AS_CONFIGURED,
    SCHEMA_VERSION,
    ComputeMode,
    FrontPoint,
    LayerReport,
    Note,
    Report,
    Spectrum,
    numeric_fields,
)
from ._format import error, printable, size, size_change, speedup
from ._terminal import compact_table, render_text

__all__ = [
    "AS_CONFIGURED",
    "DEFAULT_FIELDS",
    "SCHEMA_VERSION",
    "Comparison",
    "ComputeMode",
    "FrontPoint",
    "LayerReport",
    "Limit",
    "Note",
    "Panel",
    "Report",
    "Spectrum",
    "better",
    "compact_table",
    "compare",
    "error",
    "failures",
    "numeric_fields",
    "printable",
    "render_text",
    "size",
    "size_change",
    "speedup",
]
