"""Which path a call takes, and why: a small cost model of launches, memory traffic and products, in seconds.

The constants are those of an H100's data sheet, rounded; only their ratios matter for a choice. None has been fitted
to measurements: `python -m benchmarks.run --device cuda` compares each choice with the other path.
"""

import os
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch

from ..errors import InputError

Backend: TypeAlias = Literal["composed", "triton"]
Method: TypeAlias = Literal["dense", "cp", "tucker"]

BACKENDS: tuple[Backend, ...] = ("composed", "triton")
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_RANK = 128  # R_o and R_j that a fused Tucker kernel holds
# elements of a slice (R_o, R_j) of the core that its kernel holds, padded to powers of two; half in float32 or int8
MOST_CORE = 64 * 128
TRACED_ROWS = 1024  # rows for which a graph that has to hold for any number is chosen

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on a CPU, slowly, for tests

_LAUNCH = 4e-6  # seconds
_BANDWIDTH = 3e12  # bytes a second
_PEAK = {16: 6e14, 32: 2e14}  # FLOPs a second by bits, on tensor cores
_SHARE_FUSED = 0.5  # of that peak, reached in a fused kernel,
_SHARE_CUBLAS = 0.7  # and by cuBLAS in products of these sizes
_PROCESSORS = 128  # programs that fill the chip
_PROGRAM_ROWS = 64

_COMPOSED = {
    "dense": "matrix products in blocks",
    "cp": "three linear maps around a product",
    "tucker": "linear maps around a dense core",
}


@dataclass(frozen=True)
class Choice:
    """The path that a call takes: `backend`, what runs, and the reason."""

    backend: Backend
    runs: str
    reason: str

    def __str__(self) -> str:
        return f"{self.runs}: {self.reason}"


@dataclass(frozen=True)
class Problem:
    """What the choice depends on.

    Attributes:
        method: "dense", "cp" or "tucker".
        shape: (O, I, J).
        rank: (R,) of a CP, (R_o, R_i, R_j) of a Tucker decomposition, () of a dense weight.
        rows: N, or the number of pairs.
        weight_bits: of a stored entry.
        gradient: whether gradients are recorded.
    """

    method: Method
    shape: tuple[int, int, int]
    rank: tuple[int, ...]
    rows: int
    pairs: bool
    device: torch.device
    dtype: torch.dtype
    weight_bits: int
    gradient: bool = False

    @property
    def whole(self) -> bool:
        """Whether one kernel computes the layer; else CP and Tucker are a fused part and linear maps."""
        if self.pairs or self.method == "dense":
            return True
        if self.method == "cp":
            return not cp_splits(self.rows, self.rank[0], self.shape[0])
        return fits_one_kernel(self.rank, self.weight_bits == 8 or self.dtype == torch.float32)

    @property
    def kernels(self) -> str:
        """What the fused path runs."""
        if self.pairs:
            backward = ", and so is their backward" if self.gradient else ""
            return f"Triton, products of pairs fused with the output's projection{backward}"
        if self.method == "dense":
            return "Triton, fused dense"
        if self.whole:
            return "Triton, one fused kernel"
        part = "product and a linear map" if self.method == "cp" else "core between linear maps"
        return f"Triton, fused {part}"

    @property
    def reason_against_fused(self) -> str | None:
        """Why no kernel can run for this problem on its device; None where one can."""
        if reason := reason_against_triton(self.device, self.dtype):
            return reason
        if self.rows == 0:
            return "there are no rows"
        if self.pairs and self.method == "dense":
            return "all pairs of a dense weight are two plain matrix products"
        if self.pairs and self.method == "tucker" and self.rank[0] > MOST_RANK:
            return f"the kernel for pairs holds R_o up to {MOST_RANK}, and it is {self.rank[0]}"
        return None


def reason_against_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run here; None where they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the Triton kernels run on CUDA, and the inputs are on {device.type}"
    if dtype not in FUSED_DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, and the inputs are {dtype}"
    if device.type == "cuda" and not torch.compiler.is_compiling():
        if torch.version.hip is not None:
            return "the Triton kernels have been checked for NVIDIA's processors only"
        capability = _capability(device.index)
        if capability is None:
            return "torch finds no GPU here"
        if capability < (8, 0):
            return f"the Triton kernels need compute capability 8.0, and the device has {capability[0]}.{capability[1]}"
    return None


@cache
def _capability(index: int | None) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


def choose(problem: Problem, backend: Backend | None = None, reason_against: str | None = None) -> Choice:
    """The path for a call.

    Args:
        backend: "composed" or "triton" insists on it; None takes the one with the lower estimate.
        reason_against: why the operands rule the fused kernels out, where they do.

    Raises: InputError for another `backend`, or for "triton" where it cannot run.
    """
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"`backend` should be None or one of {BACKENDS}. Found {backend!r}.")
    composed = _COMPOSED[problem.method]
    if backend == "composed":
        return Choice("composed", composed, "as requested")
    reason = reason_against or problem.reason_against_fused
    if backend == "triton":
        if reason is not None:
            raise InputError(f"`backend` should be None or 'composed' here, for {reason}. Found 'triton'.")
        return Choice("triton", problem.kernels, "as requested")
    if reason is not None:
        return Choice("composed", composed, reason)
    if problem.device.type == "cpu":
        return Choice("composed", composed, "Triton's interpreter is for tests, and runs only on request")
    seconds_composed, seconds_fused = seconds(problem, "composed"), seconds(problem, "triton")
    estimate = f"estimated {seconds_composed * 1e6:.3g} µs composed, {seconds_fused * 1e6:.3g} µs fused"
    if seconds_fused < seconds_composed:
        return Choice("triton", problem.kernels, estimate)
    return Choice("composed", composed, estimate)


@lru_cache(maxsize=2**12)
def prefers_triton(*problem: Any) -> bool:
    """Whether the fused path has the lower estimate for a `Problem` of these values; cached, for calls are short."""
    return choose(Problem(*problem)).backend == "triton"


def fits_one_kernel(rank: tuple[int, ...], wide: bool) -> bool:
    """Whether a Tucker layer of rank (R_o, R_i, R_j) fits one kernel; else its core alone is fused.

    Args:
        wide: whether inputs are float32 or factors int8, which take more registers.
    """
    padded = [max(16, 1 << (size - 1).bit_length()) for size in (rank[0], rank[2])]
    return max(padded) <= MOST_RANK and padded[0] * padded[1] <= MOST_CORE // (1 + wide)


def cp_splits(rows: int, rank: int, outputs: int) -> bool:
    """Whether CP runs as a fused product and a linear map: many outputs, or few rows and many components."""
    return outputs > 256 or (rows <= 8 * _PROGRAM_ROWS and rank > 256)


def seconds(problem: Problem, backend: Backend) -> float:
    """An estimate of a forward's time on a GPU; of pairs whose gradients are recorded, of the backward's too."""
    rows, fused, method = problem.rows, backend == "triton", problem.method
    size, stored = problem.dtype.itemsize, problem.weight_bits / 8
    weights = _weights(problem)
    if problem.pairs and method != "dense":
        flops, intermediate, ends, backward_launches = _pairs_work(problem, fused)
    else:
        flops, backward_launches = 2.0 * rows * weights, 0
        intermediate, ends = rows * _intermediate(problem), rows * sum(problem.shape)
    peak = _PEAK.get(8 * size, _PEAK[32])
    if not fused:
        launches = {"dense": 3, "cp": 4, "tucker": 6}[method] + backward_launches
        traffic = size * (ends + intermediate) + stored * weights
        if stored < size:  # int8 is first written out in the inputs' dtype
            launches, traffic = launches + 3, traffic + (2 * size + stored) * weights
        return launches * _LAUNCH + max(flops / peak / _SHARE_CUBLAS, traffic / _BANDWIDTH)
    split = method == "cp" and not problem.whole
    out = problem.shape[0]
    waste = 1.0
    if method == "dense":  # tiles are at least 16 outputs wide
        waste = -(-out // 16) * 16 / out
    elif split:
        ends += 2 * rows * problem.rank[0]
    else:
        waste = max(1.0, min(_PROCESSORS / max(1, rows // _PROGRAM_ROWS), 16.0))  # processors without a program
    launches = 1 + split + backward_launches
    products = flops * waste / peak / _SHARE_FUSED
    return launches * _LAUNCH + max(products, (size * ends + stored * weights) / _BANDWIDTH)


def _weights(problem: Problem) -> int:
    """Entries of all that is stored."""
    (out, in1, in2), rank = problem.shape, problem.rank
    match problem.method:
        case "dense":
            return out * in1 * in2
        case "cp":
            return rank[0] * (out + in1 + in2)
        case "tucker":
            return out * rank[0] + in1 * rank[1] + in2 * rank[2] + rank[0] * rank[1] * rank[2]


def _intermediate(problem: Problem) -> int:
    """Elements of the composed path's intermediates for one row, counted each time that they are written or read."""
    (out, in1, in2), rank = problem.shape, problem.rank
    match problem.method:
        case "dense":
            return 4 * out * min(in1, in2)
        case "cp":
            return 6 * rank[0]
        case "tucker":
            return 4 * rank[0] * min(rank[1:]) + 2 * sum(rank)


def _pairs_work(problem: Problem, fused: bool) -> tuple[float, int, int, int]:
    """FLOPs, elements written or read of the intermediate and of the outputs, and launches of the backward.

    The inputs' projections are the same on both paths, and left out. Backward traffic: the composed path writes the
    intermediate's gradient once; for CP it also recomputes the product, and writes gradient x input twice. The fused
    path recomputes the intermediate's gradient for each input: fewer bytes and more FLOPs.
    """
    out, rows, rank, cp = problem.shape[0], problem.rows, problem.rank, problem.method == "cp"
    terms = out + (0 if cp else rank[-1])  # of Tucker, an element of the intermediate is itself a sum over R_j
    if not problem.gradient:
        return 2.0 * rows * rank[0] * terms, (3 if cp else 2) * rows * rank[0], rows * out, 0
    products = (4 if fused else 3) * terms
    return 2.0 * rows * rank[0] * products, (12 if cp else 6) * rows * rank[0], (5 if fused else 4) * rows * out, 6
