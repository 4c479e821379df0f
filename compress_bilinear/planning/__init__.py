"""A model and configs to a plan: find, calibrate, fit, choose, judge, distil."""

from ._allocate import allocate, best_within
from ._api import Plan, compress, plan
from ._batches import BatchSample
from ._convert import dequantize, quantize, set_compute
from ._distill import Distilled, distil
from ._offline import candidates, choose, compare, compress_state
from ._progress import ProgressBars
from ._verdict import compare_layers, judge, kept, reason_against, slowness

__all__ = [
    "BatchSample",
    "Distilled",
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
    "distil",
    "judge",
    "kept",
    "plan",
    "quantize",
    "reason_against",
    "set_compute",
    "slowness",
]
