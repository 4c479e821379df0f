"""What is measured of the contestants of a case: first whether they are right, then time and memory.

A contestant that is wrong or fails is reported and left out; the others are measured all the same.
"""

import gc
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import Case, Contestant, contestants
from benchmarks.gate import wrong
from benchmarks.memory import with_peak
from compress_bilinear import ops

ROUNDS = (5, 40)
BLOCK_SECONDS = 2e-3  # about how long a call is repeated for one sample
WARM_SECONDS = 2e-2  # and before it
SLOW = 10.0  # seconds above which a call is timed once

Row = dict[str, object]
Call = Callable[[], object]


class DeviceLost(RuntimeError):
    """A kernel has left the GPU unusable for this process; `rows` tell which."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(str(rows[-1]["status"]))
        self.rows = rows


def measured(
    case: Case,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    training: bool,
    compiling: bool,
    limits: tuple[float, float],
    seconds: float,
    excluded: frozenset[str] = frozenset(),
) -> list[Row]:
    """One row for each contestant, `status` "ok" or why it was not measured.

    Args:
        compiling: whether those that torch.compile makes take part.
        limits: FLOP/s and bytes/s that are reached here.
        seconds: about how long to time them all.
        excluded: whom to leave out.

    Raises: DeviceLost.
    """
    about: Row = {"case": case.name, "in1": case.in1, "in2": case.in2, "out": case.out}
    about["rows"] = f"{count}x{case.pairs}^2" if case.pairs else count
    failures: list[Row] = []

    def attempt(name: str, family: str, step: Callable[[], object]) -> object:
        """What a step gives; None where it fails, which is noted."""
        try:
            return step()
        except Exception as error:  # whatever a contestant dies of
            reason = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            failures.append(about | {"contestant": name, "family": family, "status": reason})
            del error
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                raise DeviceLost(failures) from None
        return None

    calls: dict[str, Call] = {}
    found = contestants(case, count, dtype, device)
    for name, contestant in list(found.items()):
        out = (training and not contestant.trains) or (contestant.compiled and not compiling) or name in excluded
        checks = partial(wrong, contestant, bool(case.pairs), training)
        error = None if out else attempt(name, contestant.family, checks)
        if error == "":
            calls[name] = trained(contestant, dtype) if training else forward(contestant)
            continue
        if error is not None:
            reason = f"wrong: {error}"
            failures.append(about | {"contestant": name, "family": contestant.family, "status": reason})
        del found[name]
    with torch.set_grad_enabled(training):
        samples = latencies(calls, device, seconds, lambda name, call: attempt(name, found[name].family, call))
        gc.collect()
        peaks = {}
        for name in samples:
            step = partial(peak, calls[name], device)
            peaks[name] = attempt(name, found[name].family, step)
    baseline = statistics.median(samples["nn.Bilinear"]) if samples.get("nn.Bilinear") else None
    result: list[Row] = []
    for name, values in samples.items():
        contestant, memory = found[name], peaks[name]
        if not isinstance(memory, float):
            continue
        size = sum(tensor.numel() * tensor.element_size() for tensor in contestant.stored)
        outputs = count * max(1, case.pairs**2) * case.out * dtype.itemsize
        ideal = (3 if training else 1) * max(contestant.flops / limits[0], (size + outputs) / limits[1])
        lower, median, upper = _quartiles(values)
        result.append(
            about
            | {
                "contestant": name,
                "family": contestant.family,
                "status": "ok",
                "median_ms": f"{median:.5g}",
                "lower_quartile_ms": f"{lower:.5g}",
                "upper_quartile_ms": f"{upper:.5g}",
                "samples": len(values),
                "speedup_vs_bilinear": "" if baseline is None else f"{baseline / median:.3f}",
                "of_roofline": f"{ideal * 1e3 / median:.3f}",
                "peak_extra_mb": f"{memory / 1e6:.4g}",
                "output_mb": f"{outputs / 1e6:.4g}",
            }
        )
    return result + failures


def forward(contestant: Contestant) -> Call:
    """A forward, without gradients where `measured` calls it."""
    function, tensors = contestant.call, contestant.tensors
    return lambda: function(*tensors)


def trained(contestant: Contestant, dtype: torch.dtype) -> Call:
    """A forward, and a backward to all that is stored and to the inputs."""
    tensors = [tensor.detach().requires_grad_() for tensor in contestant.tensors]
    directions: list[Tensor] = []

    def call() -> object:
        output = contestant.call(*tensors)
        if not directions:
            directions.append(torch.ones_like(output))
        return torch.autograd.grad(output, tensors, directions[0])

    return call


def latencies(
    calls: Mapping[str, Call], device: torch.device, seconds: float, attempt: Callable[[str, Call], object]
) -> dict[str, list[float]]:
    """Samples in milliseconds; in every round each call is timed once, so that drift meets all alike.

    Others go before each sample, for what ran before has filled the caches with its own weights. That shows for many
    milliseconds after the largest weights (of two spellings of one layer, the first to run took twice as long), so each
    round has an order of its own too.

    Args:
        attempt: runs a step for the call of a name, and gives None where that fails; it is left out then.
    """
    single: dict[str, float] = {}
    for name, call in calls.items():
        first = attempt(name, partial(timed, call, device, 1))
        if isinstance(first, float) and first < SLOW:  # which came to cold caches
            first = attempt(name, partial(timed, call, device, 1))
        if isinstance(first, float):
            single[name] = first
    repeats = {name: max(1, min(200, round(BLOCK_SECONDS / duration))) for name, duration in single.items()}
    samples = {name: [1e3 * duration] if duration >= SLOW else [] for name, duration in single.items()}
    quick = [name for name in single if single[name] < SLOW]
    warming = 0.0 if device.type == "cuda" else WARM_SECONDS  # where minutes are few, and caches small
    warm = {name: max(2, round(warming / single[name])) for name in quick}
    share = sum(single[name] * (repeats[name] + warm[name]) for name in quick)
    orders = random.Random(0)
    for _ in range(round(min(max(seconds / max(share, 1e-9), ROUNDS[0]), ROUNDS[1]))):
        for name in orders.sample(quick, len(quick)):
            if name in samples:
                sample = attempt(name, partial(timed, calls[name], device, warm[name]))
                if sample is not None:
                    sample = attempt(name, partial(timed, calls[name], device, repeats[name]))
                if isinstance(sample, float):
                    samples[name].append(1e3 * sample)
                else:
                    del samples[name]
    return samples


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def timed(call: Call, device: torch.device, repeats: int) -> float:
    """Seconds for one call of several."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def peak(call: Call, device: torch.device) -> float:
    """Bytes beyond what was there before the call, the output included: resident ones, on a GPU allocated ones."""
    if device.type != "cuda":
        return float(with_peak(call)[1])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return float(torch.cuda.max_memory_allocated() - before)


def roofline(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy, measured here and now."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def multiply() -> Tensor:
        return ops.linear(left, right)

    def copied() -> Tensor:
        return target.copy_(source)

    for _ in range(3):
        multiply(), copied()
    product = min(timed(multiply, device, 3) for _ in range(5))
    copy = min(timed(copied, device, 3) for _ in range(5))
    return 2 * size**3 / product, 2 * source.numel() / copy


def environment(device: torch.device, dtype: str, limits: tuple[float, float]) -> Row:
    """What the figures were measured on."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "not installed"
    processor = platform.processor() or platform.machine()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "device": device.type,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "product_tflops": f"{limits[0] / 1e12:.4g}",
        "copy_gb_per_s": f"{limits[1] / 1e9:.4g}",
        "torch": torch.__version__,
        "triton": version,
        "cuda": torch.version.cuda or "",
    }
