"""One layer to candidates: calibrate, fit, round, measure."""

from ._calibrate import FEWEST_ROWS, LayerInputs, collect_inputs
from ._candidate import Option, point
from ._compute import (
    MODES,
    ComputeAsked,
    ComputeChoice,
    check_asked,
    check_compute,
    choose_compute,
    misses,
    random_rows,
    seen_rows,
)
from ._fit import Fitted, Fitting
from ._fit_weight import WeightFitting
from ._measure import (
    Latency,
    OutputError,
    Timing,
    environment,
    latencies,
    parameter_count,
    resident_bytes,
    stored_bytes,
    task_metric,
    time_adapted,
    time_replacement,
    weight_error,
)
from ._search import Chooser
from ._solve import Candidate, as_candidate, solve

__all__ = [
    "FEWEST_ROWS",
    "MODES",
    "Candidate",
    "Chooser",
    "ComputeAsked",
    "ComputeChoice",
    "Fitted",
    "Fitting",
    "Latency",
    "LayerInputs",
    "Option",
    "OutputError",
    "Timing",
    "WeightFitting",
    "as_candidate",
    "check_asked",
    "check_compute",
    "choose_compute",
    "collect_inputs",
    "environment",
    "latencies",
    "misses",
    "parameter_count",
    "point",
    "random_rows",
    "resident_bytes",
    "seen_rows",
    "solve",
    "stored_bytes",
    "task_metric",
    "time_adapted",
    "time_replacement",
    "weight_error",
]
