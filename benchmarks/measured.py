"""What a process of its own measures of one contestant on one weight: seconds, peak memory, and the error found anew.

Nothing that a solver says about its own result is believed: error, amplification and the error after rounding to
8 bits are computed here from the factors, in float64, slice by slice.

Peak memory is what the process grew by; beside a small weight, where pools and code outweigh the work, it is what the
allocators of PyTorch and NumPy held.
"""

import math
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants import Contestant, Parts, solver
from benchmarks.memory import with_peak
from benchmarks.weights import Weight
from compress_bilinear import TuckerBilinear
from compress_bilinear.decomposition import TuckerDecomposition

_SLICE = 2**22  # elements of a float64 slice
_ONCE = 5.0  # seconds above which a call is not repeated
_WARM_UP = ((6, 5, 4), (32, 32, 32))
_SMALL = 2**21  # elements of a weight that the resident memory of a process is too coarse for


def measure(case: Weight, contestant: Contestant, folder: Path) -> dict[str, Any]:
    """Solve once for the memory, repeat where that was quick, check the result."""
    weight = case.read(folder)
    for shape in _WARM_UP:  # first calls load code, start threads and grow the libraries' pools
        solver(*_noise(contestant, shape))()
    call = solver(contestant, weight, case.cp_rank if contestant.method == "cp" else case.tucker_rank)
    small = weight.numel() <= _SMALL
    (found, seconds), memory = (timed(call), 0) if small else with_peak(lambda: timed(call))
    if seconds <= _ONCE:  # then the first call's cost is in its firsts, such as threads that start; repeat it warm
        runs = sorted((timed(call) for _ in range(5 if seconds < 1 else 2)), key=lambda run: run[1])
        lower, seconds, upper = statistics.quantiles([run[1] for run in runs], n=4, method="inclusive")
        # under a time limit every run ends elsewhere: the one of median error stands for them
        found = sorted((run[0] for run in runs), key=lambda found: relative_error(weight, found))[len(runs) // 2]
    else:
        lower = upper = seconds
    if small:  # now, for a profiler slows what comes after it
        memory = with_allocated(call)
    head = found[0]
    return {
        "rank": "x".join(map(str, head.shape)),
        "parameters": _parameters(contestant, found),
        "error": relative_error(weight, found),
        "seconds": seconds,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "peak_memory_x": memory / (weight.numel() * weight.element_size()),
        "amplification": amplification(found) if head.dim() == 1 else "",
        "error_after_int8": relative_error(weight, rounded(found)),
    }


def _parameters(contestant: Contestant, found: Parts) -> int:
    """All numbers of core and factors; of ours, those that its layer stores, which has the rest in an identity."""
    head, factors = found
    if head.dim() == 1:
        return sum(factor.numel() for factor in factors)
    if contestant.name == "ours":
        layer = TuckerBilinear.from_decomposition(TuckerDecomposition(head, factors))
        return sum(parameter.numel() for parameter in layer.parameters())
    return head.numel() + sum(factor.numel() for factor in factors)


def succeed(case: Weight, contestant: Contestant, folder: Path, seeds: int) -> dict[str, Any]:
    """Solve from many seeds: how often the exact answer is found, and how near the others come."""
    weight = case.read(folder)
    solver(contestant, weight, case.cp_rank)()
    errors, amplified, samples, failures = [], [], [], 0
    for seed in range(seeds):
        start = time.perf_counter()
        try:
            found = solver(replace(contestant, seed=seed), weight, case.cp_rank)()
        except Exception:  # a singular solve is one way to fail; it counts
            failures += 1
            continue
        finally:
            samples.append(time.perf_counter() - start)
        errors.append(relative_error(weight, found))
        amplified.append(amplification(found))
    errors = [error if math.isfinite(error) else math.inf for error in errors] + [math.inf] * failures
    return {
        "rank": case.cp_rank,
        "tolerance": "" if case.tolerance is None else case.tolerance,
        "seeds": seeds,
        "found": "" if case.tolerance is None else sum(error <= case.tolerance for error in errors),
        "raised": failures,
        "best_error": min(errors),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "median_amplification": statistics.median(amplified) if amplified else "",
        "median_seconds": statistics.median(samples),
    }


def timed(call: Callable[[], Parts]) -> tuple[Parts, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def with_allocated(call: Callable[[], object]) -> int:
    """The most bytes that PyTorch's allocator held at once for a call, and NumPy's arrays; workspaces of LAPACK are
    seen where PyTorch asks for them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        tracemalloc.start()  # which sees NumPy's arrays
        call()
        arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    recorded = profile.profiler.kineto_results.events()  # `profile.events()` has only what no operator asked for
    changes = sorted((event for event in recorded if event.name() == "[memory]"), key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0)) + arrays


def _noise(contestant: Contestant, shape: tuple[int, int, int]) -> tuple[Contestant, Tensor, Any]:
    budget = None if contestant.max_seconds is None else min(0.1, contestant.max_seconds)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    rank = {"cp": min(shape) // 2, "tucker": tuple(size // 2 for size in shape), "max_error": None}
    return replace(contestant, sweeps=3, max_seconds=budget), weight, rank[contestant.method]


def relative_error(weight: Tensor, found: Parts) -> float:
    """‖W − Ŵ‖ / ‖W‖ (Frobenius), in float64."""
    head, (out, in1, in2) = (found[0].double(), tuple(factor.double() for factor in found[1]))
    rows = max(1, _SLICE // weight[0].numel())
    residual = total = 0.0
    for start in range(0, weight.shape[0], rows):
        part, exact = out[start : start + rows], weight[start : start + rows].double()
        if head.dim() == 1:
            slices = in1 @ ((part * head)[:, :, None] * in2.T)
        else:
            slices = in1 @ torch.tensordot(part, head, 1) @ in2.T
        residual += float((exact - slices).square().sum())
        total += float(exact.square().sum())
    return math.sqrt(residual / total)


def amplification(found: Parts) -> float:
    """sqrt(Σ_r ‖component r‖²) / ‖their sum‖ of a CP: how much the components cancel."""
    head, factors = found
    inner = torch.outer(head.double(), head.double())
    for factor in factors:
        inner = inner * (factor.double().T @ factor.double())
    total = float(inner.sum())
    return math.sqrt(float(inner.diagonal().sum()) / total) if total > 0 else math.inf


def rounded(found: Parts) -> Parts:
    """Rounded to int8 and back: a scale for each factor's column, and for each (R_o, R_i) fibre of a core."""
    head, (out, in1, in2) = found
    head = _int8(head, 2) if head.dim() == 3 else head  # a CP's weights go into the scales
    return head, (_int8(out, 0), _int8(in1, 0), _int8(in2, 0))


def _int8(values: Tensor, axis: int) -> Tensor:
    scale = values.double().abs().amax(axis, keepdim=True) / 127
    scale = scale.where(scale > 0, torch.ones_like(scale))
    return (values.double() / scale).round() * scale
