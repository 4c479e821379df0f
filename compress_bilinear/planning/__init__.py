"""A model and configs to a plan: find, calibrate, fit, choose, judge, distil."""

from ._allocate import allocate, best_within
from ._api import Plan, compress, plan
from ._batches import BatchSample
from ._convert import dequantize, quantize, set_compute
from ._distill import Distilled, distil
from ._offline import Candidate, candidates, choose, compare, compress_state, descriptions, matching, other_forms
from ._progress import ProgressBars
from ._verdict import compare_layers, judge, kept, reason_against, slowness

__all__ = [
    "BatchSample",
    "Candidate",
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
    "descriptions",
    "distil",
    "judge",
    "kept",
    "matching",
    "other_forms",
    "plan",
    "quantize",
    "reason_against",
    "set_compute",
    "slowness",
]
