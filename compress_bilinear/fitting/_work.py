"""How much work a layer is, in FLOPs or in what takes as long: for limits without a clock, and for a time left."""

from collections.abc import Sequence

from torch import nn

from ..config import AutoConfig, Config
from ..modules import method_of
from ._candidate import Candidate
from ._fit_weight import MORE_SWEEPS, SWEEPS
from ._job import Job

FIRST_SIZE = 1 / 8  # where a search begins that has no size to meet
SKETCH_SWEEPS = 12
_MOST_FLOPS = 1e12  # that a slow method may take without a time limit, and more for each entry of a large weight
_MOST_FLOPS_PER_ENTRY = 4e4
# as measured: FLOPs for each entry of the weight and each index of its modes
_PREDICT, _MAKE, _JUDGE = 11, 25, 9
_PER_SECOND = 5e10  # FLOPs that take as long as a second of measuring latencies
_SOLVE_SWEEPS = 200  # of a CP of one rank, with all its starts


def most_rank(layer: nn.Bilinear, rank: int) -> int:
    """The largest rank of a slow method, up to this one, that a search may wait for."""
    most = _MOST_FLOPS + _MOST_FLOPS_PER_ENTRY * layer.weight.numel()
    while rank > 1 and SWEEPS * _sweep(layer, rank) > most:
        rank = int(0.95 * rank)
    return max(rank, 1)


def solving_work(layer: nn.Bilinear, config: Config) -> float:
    """Until a layer has its candidate, or the predictions of an `AutoConfig`."""
    # the rank that makes a float32 layer an eighth in four bits, if there is time for it
    slow = most_rank(layer, layer.weight.numel() // sum(layer.weight.shape))
    if isinstance(config, AutoConfig):
        return _PREDICT * _passes(layer) + SKETCH_SWEEPS * 0.75 * _sweep(layer, slow)
    if method_of(config).sketch is None:
        return _MAKE * _passes(layer)
    rank = getattr(config, "rank", slow)
    return _SOLVE_SWEEPS * _sweep(layer, rank if isinstance(rank, int) else slow)


def making_is_all(candidate: Candidate) -> bool:
    """Whether polishing a candidate takes next to no time, beside making it."""
    return candidate.config is None or method_of(candidate.config).sketch is None


def making_work(layer: nn.Bilinear, candidate: Candidate) -> float:
    """Until a predicted candidate is made and polished."""
    if making_is_all(candidate):
        return _MAKE * _passes(layer)
    return (SWEEPS + MORE_SWEEPS) * _sweep(layer, getattr(candidate.config, "rank", 1))


def judging_works(jobs: Sequence[Job], timed: bool) -> list[float]:
    """To judge each job; `timed` says that latencies are measured, which takes about a second."""
    return [_JUDGE * _passes(job.layer) + _PER_SECOND * timed if job.is_open else 0.0 for job in jobs]


def _passes(layer: nn.Bilinear) -> float:
    return float(layer.weight.numel() * sum(layer.weight.shape))


def _sweep(layer: nn.Bilinear, rank: int) -> float:
    return 6.0 * layer.weight.numel() * rank + 6.0 * rank**3
