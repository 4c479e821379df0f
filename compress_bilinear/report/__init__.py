"""What was done, as data and as pages."""

from ._comparison import DEFAULT_FIELDS, Comparison, Limit, Panel, better, compare, failures
from ._data import AS_CONFIGURED, ComputeMode, FrontPoint, LayerReport, Note, Spectrum, effective, numeric_fields
from ._report import SCHEMA_VERSION, Report
from ._text import COLUMNS, compact_table, error, figure, printable, render_text, size, size_change, speedup
