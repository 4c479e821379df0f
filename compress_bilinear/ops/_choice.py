"""Which path a call takes, and why: a small cost model of launches, traffic and products, in seconds.

The constants are those of an H100's data sheet, rounded; only their ratios matter for a choice. None has been fitted
to measurements: `python -m benchmarks.run --device cuda` compares every choice with what it refused.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..errors import InputError

Backend: TypeAlias = Literal["composed", "triton"]

BACKENDS: tuple[Backend, ...] = ("composed", "triton")
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_RANK = 128  # R_o and R_j that a fused Tucker holds
# elements of a slice (R_o, R_j) of the core that its one kernel holds, padded to powers of two; half in float32 or int8
MOST_CORE = 64 * 128

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on a CPU, slowly, to be checked

_LAUNCH = 4e-6
_BANDWIDTH = 3e12
_PEAK = {16: 6e14, 32: 2e14}  # FLOP/s by bits, tensor cores
_FUSED = 0.5  # of that peak, in a fused kernel; a cuBLAS product of these sizes has 0.7
_CUBLAS = 0.7
_PROCESSORS = 128  # programs that fill the chip
_ROWS = 64  # of a program
TRACED_ROWS = 1024  # for which the choice is made in a graph that has to hold for any number


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
        form: "dense", "cp" or "tucker".
        shape: (O, I, J).
        rank: (R,) of a CP, (R_o, R_i, R_j) of a Tucker decomposition, () of a dense weight.
        rows: N, or the number of pairs.
        weight_bits: of a stored value.
    """

    form: Literal["dense", "cp", "tucker"]
    shape: tuple[int, int, int]
    rank: tuple[int, ...]
    rows: int
    pairs: bool
    device: torch.device
    dtype: torch.dtype
    weight_bits: int
    gradient: bool = False


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run here, None where they can."""
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


def transformed(tensors: Sequence[Tensor | None]) -> str | None:
    """Why these tensors, or what surrounds the call, want operators that torch knows; None where nothing does."""
    kinds = {tensor.device.type for tensor in tensors if tensor is not None}
    if any(kind != "meta" and torch.is_autocast_enabled(kind) for kind in kinds):
        return "autocast is on, and leaves operands in float64 alone"
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    for tensor in tensors:
        if tensor is not None and type(tensor) not in (Tensor, torch.nn.Parameter):
            return f"an operand is a {type(tensor).__name__}"
    return None


def choose(problem: Problem, backend: Backend | None = None, obstacle: str | None = None) -> Choice:
    """The path for a call.

    Args:
        backend: "composed" or "triton" insists on it; None takes the one that should be faster.
        obstacle: why the operands rule the fused kernels out, where they do.

    Raises: InputError for another `backend`, or for "triton" where it cannot run.
    """
    check_backend(backend)
    name = {"dense": "matrix products in blocks", "cp": "three linear maps around a product"}.get(
        problem.form, "linear maps around a dense core"
    )
    if backend == "composed":
        return Choice("composed", name, "asked for")
    obstacle = obstacle or refusal(problem.device, problem.dtype) or _unfit(problem)
    if backend == "triton":
        if obstacle is not None:
            raise InputError(f"`backend` should be None or 'composed' here, for {obstacle}. Found 'triton'.")
        return Choice("triton", _fused_name(problem), "asked for")
    if obstacle is not None:
        return Choice("composed", name, obstacle)
    if problem.device.type == "cpu":
        return Choice("composed", name, "Triton's interpreter is for checks: it runs where asked for")
    composed, fused = seconds(problem, "composed"), seconds(problem, "triton")
    estimate = f"estimated {composed * 1e6:.3g} µs composed, {fused * 1e6:.3g} µs fused"
    if fused < composed:
        return Choice("triton", _fused_name(problem), estimate)
    return Choice("composed", name, estimate)


@lru_cache(maxsize=2**12)
def chosen(*problem: Any) -> bool:
    """Whether the fused path is the faster one for a `Problem` of these values; kept, for calls may be short."""
    return choose(Problem(*problem)).backend == "triton"


def check_backend(backend: Backend | None) -> None:
    """Raise InputError for a backend that there is not."""
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"`backend` should be None or one of {BACKENDS}. Found {backend!r}.")


def _unfit(problem: Problem) -> str | None:
    if problem.rows == 0:
        return "there are no rows"
    if problem.pairs and problem.form == "dense":
        return "all pairs of a dense weight are two plain matrix products"
    if problem.pairs and problem.form == "tucker" and problem.rank[0] > MOST_RANK:
        return f"the kernel for pairs holds R_o up to {MOST_RANK}, and it is {problem.rank[0]}"
    return None


def fits_one_kernel(rank: tuple[int, ...], wide: bool) -> bool:
    """Whether a Tucker layer's (R_o, R_i, R_j) fit the fused kernel whole; else its core alone is fused.

    Args:
        wide: whether inputs are in float32 or factors in int8, which take more registers.
    """
    padded = [max(16, 1 << (size - 1).bit_length()) for size in (rank[0], rank[2])]
    return max(padded) <= MOST_RANK and padded[0] * padded[1] <= MOST_CORE // (1 + wide)


def cp_splits(rows: int, rank: int, outputs: int) -> bool:
    """Whether CP runs as a fused product and a plain one: many outputs, or few rows and many components."""
    return outputs > 256 or (rows <= 8 * _ROWS and rank > 256)


def _fused_name(problem: Problem) -> str:
    if problem.pairs:
        backward = ", and so is their backward" if problem.gradient else ""
        return f"Triton, products of pairs fused with the output's projection{backward}"
    match problem.form:
        case "dense":
            return "Triton, fused dense"
        case "cp":
            split = cp_splits(problem.rows, problem.rank[0], problem.shape[0])
            return "Triton, fused product and a linear map" if split else "Triton, one fused kernel"
        case "tucker":
            whole = fits_one_kernel(problem.rank, problem.weight_bits == 8 or problem.dtype == torch.float32)
            return "Triton, one fused kernel" if whole else "Triton, fused core between linear maps"


def seconds(problem: Problem, backend: Backend) -> float:
    """An estimate of a forward's time on a GPU; of pairs that want a gradient, of the backward's too."""
    (out, in1, in2), rows, rank = problem.shape, problem.rows, problem.rank
    size = problem.dtype.itemsize
    stored = problem.weight_bits / 8
    int8 = stored < size
    match problem.form:
        case "dense":
            weights, width = out * in1 * in2, min(out * in1, out * in2)
            flops = 2.0 * rows * weights
            between, launches = 4 * rows * width, 3
        case "cp":
            weights, flops = rank[0] * sum(problem.shape), 2.0 * rows * rank[0] * sum(problem.shape)
            between, launches = 6 * rows * rank[0], 4
        case "tucker":
            core = rank[0] * rank[1] * rank[2]
            weights = out * rank[0] + in1 * rank[1] + in2 * rank[2] + core
            flops, launches = 2.0 * rows * weights, 6
            between = rows * (4 * rank[0] * min(rank[1:]) + 2 * sum(rank))
    extra_launches = 0
    if problem.pairs:
        flops, between, ends, extra_launches = _pairs_work(problem, backend)
        launches += extra_launches
    else:
        ends = rows * (in1 + in2 + out)
    peak = _PEAK[8 * size if 8 * size in _PEAK else 32]
    if backend == "composed":
        extra = (2 * size + stored) * weights if int8 else 0  # int8 is written out in the inputs' dtype first
        traffic = size * (ends + between) + stored * weights + extra
        return (launches + 3 * int8) * _LAUNCH + max(flops / peak / _CUBLAS, traffic / _BANDWIDTH)
    padding = 1.0
    if problem.form == "dense":  # tiles are at least 16 outputs wide
        padding = -(-out // 16) * 16 / out
    programs = max(1, rows // _ROWS) * (-(-out // 128) if problem.form == "dense" else 1)
    idle = max(1.0, min(_PROCESSORS / programs, 16.0)) if problem.form != "dense" else 1.0
    split = problem.form == "cp" and not problem.pairs and cp_splits(rows, rank[0], out)
    launches = 1 + split + extra_launches
    if split:
        ends, idle = ends + 2 * rows * rank[0], 1.0
    products = flops * padding * idle / peak / _FUSED
    return launches * _LAUNCH + max(products, (size * ends + stored * weights) / _BANDWIDTH)


def _pairs_work(problem: Problem, backend: Backend) -> tuple[float, int, int, int]:
    """FLOPs, elements that lie between inputs and outputs, those of the outputs, and launches of a backward.

    Each as often as it is written or read. The inputs' projections, and a dense weight, are the same on both paths. In
    a backward the composed path writes the gradient of what lies between; that of a CP the product again, and twice its
    gradient times an input, to be summed. The fused one reads the outputs' gradient for each of its three gradients,
    and takes that of what lies between once for each input: fewer bytes and more FLOPs, so it pays up to some width.
    """
    out, rows, rank = problem.shape[0], problem.rows, problem.rank
    fused, cp = backend == "triton", problem.form == "cp"
    core = 0 if cp else rank[-1]  # of Tucker, R_j: what an element between the inputs and the outputs is a sum over
    if not problem.gradient:
        return 2.0 * rows * rank[0] * (out + core), (3 if cp else 2) * rows * rank[0], rows * out, 0
    products = 4 * (out + core) if fused else 3 * (out + core)
    return 2.0 * rows * rank[0] * products, (12 if cp else 6) * rows * rank[0], (5 if fused else 4) * rows * out, 6
