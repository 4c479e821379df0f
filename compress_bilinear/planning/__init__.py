"""A model and configs to a plan: find, calibrate, fit, allocate, judge, distil."""

from ._allocate import allocate, best_within
from ._api import Plan, compress, plan
from ._convert import dequantize, quantize, set_compute
from ._distill import BatchSample, refine
from ._offline import candidates, choose, compare, compress_state
from ._progress import ProgressBars
from ._verdict import compare_layers, judge, keep, objection, slowness

__all__ = [
    "BatchSample",
    "Plan",
    "ProgressBars",
    "allocate",
    "best_within",
    "candidates",
    "choose",
    "compare",
    "compare_layers",
    "compress",
    "compress_state",
    "dequantize",
    "judge",
    "keep",
    "objection",
    "plan",
    "quantize",
    "refine",
    "set_compute",
    "slowness",
]
