"""One layer to candidates: calibrate, fit, round, measure."""

from ._calibrate import LayerInputs, collect_inputs
from ._candidate import Candidate
from ._compute import ComputeChoice, choose_compute, reason_against_rounded_inputs
from ._fit import aim, fit, smallest_within, solve
from ._fit_outputs import OutputFitting
from ._fit_weight import WeightFitting
from ._held_out import FEWEST_GROUPS, FEWEST_ROWS
from ._job import Job
from ._latency import (
    Latency,
    Timing,
    expected_error_seconds,
    expected_seconds,
    latencies,
    time_adapted,
    time_replacement,
    timing_inputs,
)
from ._measure import OutputError, environment, parameter_count, stored_bytes, task_metric, weight_error
from ._search import Search, settle
from ._work import FIRST_SIZE, judging_works, making_is_all, making_work, solving_work
