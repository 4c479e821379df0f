"""A model and configs to a plan: find, calibrate, fit, choose, judge, distil."""

from ._allocate import allocate, best_within, just_above
from ._api import Plan, compress, plan
from ._convert import dequantize, quantize, set_compute
from ._distill import BatchSample, Distilled, distil
from ._offline import (
    choose_weights,
    compare_files,
    compress_state,
    maybe_convolution,
    stored_weights,
    unknown_weights,
)
from ._progress import ProgressBars
from ._verdict import compare_layers, judge, kept, reason_against, slowness
