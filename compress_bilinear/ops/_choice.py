"""Which path a call takes, and why.

There are two Triton kernels: a dense layer on rows, and the product of the projections of a CP layer on rows. Neither
has been timed on a GPU. So a call takes the composed path, except for the one kind of call for which a model of an
H100 predicts a clear gain: a large dense weight in bfloat16 that the kernel reads once or twice, while the composed
path also writes and reads a large intermediate. `python -m benchmarks.run --device cuda` compares both paths.
"""

import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal, TypeAlias

import torch

from ..errors import InputError

Backend: TypeAlias = Literal["composed", "triton"]
Method: TypeAlias = Literal["dense", "cp", "tucker"]

BACKENDS: tuple[Backend, ...] = ("composed", "triton")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on a CPU, slowly, for tests

# The dense calls for which the kernel is predicted to be faster: 207 against 285 µs for 256 rows of 512 x 512 -> 512,
# 681 against 911 µs for 64 rows of 1024 x 1024 -> 1024.
_LEAST_ROWS, _MOST_ROWS = 64, 256
_LEAST_WEIGHT = 2**27  # entries
_ALIGNED = 16  # entries; loads of rows that begin elsewhere are several times slower

_COMPOSED = {
    "dense": "matrix products in blocks",
    "cp": "three linear maps around a product",
    "tucker": "linear maps around a dense core",
}
_KERNELS = {"dense": "Triton, fused dense", "cp": "Triton, fused product and a linear map"}
_BACKWARDS = {"dense": ", fused in the backward too", "cp": ", composed in the backward"}


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
        rows: N, or the number of pairs.
        weight_bits: of a stored entry.
        gradient: whether gradients are recorded.
    """

    method: Method
    shape: tuple[int, int, int]
    rows: int
    pairs: bool
    device: torch.device
    dtype: torch.dtype
    weight_bits: int
    gradient: bool = False

    @property
    def kernel(self) -> str:
        """What the fused path runs."""
        return _KERNELS[self.method] + (_BACKWARDS[self.method] if self.gradient else "")

    @property
    def kernel_is_faster(self) -> bool:
        """Whether the kernel is predicted to be clearly faster than the composed path."""
        (out, in1, in2), aligned = self.shape, all(size % _ALIGNED == 0 for size in self.shape[1:])
        if self.method != "dense" or self.pairs or self.dtype != torch.bfloat16 or self.weight_bits != 16:
            return False
        # the kernel reads the weight along its last axis only where that is the wider one
        return aligned and in1 <= in2 and _LEAST_ROWS <= self.rows <= _MOST_ROWS and out * in1 * in2 >= _LEAST_WEIGHT

    @property
    def reason_against_kernel(self) -> str | None:
        """Why no kernel can run; None where one can."""
        if self.pairs or self.method == "tucker":
            return f"the composed path is the only one for {'pairs' if self.pairs else 'a Tucker layer'}"
        if reason := reason_against_triton(self.device, self.dtype):
            return reason
        if self.method == "dense" and self.dtype == torch.float16:
            return "the dense kernel multiplies inputs with each other, and such products overflow in float16"
        return "there are no rows" if self.rows == 0 else None


def reason_against_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run here; None where they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the Triton kernels run on CUDA, and the inputs are on {device.type}"
    if dtype not in KERNEL_DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, and the inputs are {dtype}"
    if device.type == "cuda" and not torch.compiler.is_compiling():  # of a graph, each launch asks
        return reason_against_gpu(device.index)
    return None


def reason_against_gpu(index: int | None) -> str | None:
    """Why the Triton kernels cannot run on this GPU; None where they can."""
    if torch.version.hip is not None:
        return "the Triton kernels have been checked for NVIDIA's processors only"
    capability = _capability(index)
    if capability is None:
        return "torch finds no GPU here"
    if capability < (8, 0):
        return f"the Triton kernels need compute capability 8.0, and the device has {capability[0]}.{capability[1]}"
    if capability[0] == 9 and _triton_version() < (3, 9):  # registers are overwritten that a product still reads
        return f"Triton before 3.9 compiles the kernels wrongly for compute capability 9.{capability[1]}"
    return None


@cache
def _capability(index: int | None) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@cache
def _triton_version() -> tuple[int, int]:
    """Major and minor number; (0, 0) where the installed package does not say."""
    try:
        major, minor = version("triton").split(".")[:2]
    except PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


def choose(problem: Problem, backend: Backend | None = None, reason_against: str | None = None) -> Choice:
    """The path for a call.

    Args:
        backend: "composed" or "triton" insists on it; None takes the one that is predicted to be faster.
        reason_against: why the operands rule the fused kernels out, where they do.

    Raises: InputError for another `backend`, or for "triton" where it cannot run.
    """
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"`backend` should be None or one of {BACKENDS}. Found {backend!r}.")
    composed = _COMPOSED[problem.method]
    if backend == "composed":
        return Choice("composed", composed, "as requested")
    reason = "; ".join(filter(None, (reason_against, problem.reason_against_kernel)))
    if backend == "triton":
        if reason:
            raise InputError(f"`backend` should be None or 'composed' here, for {reason}. Found 'triton'.")
        return Choice("triton", problem.kernel, "as requested")
    if reason:
        return Choice("composed", composed, reason)
    if problem.device.type == "cpu":
        return Choice("composed", composed, "Triton's interpreter is for tests, and runs only on request")
    if problem.kernel_is_faster:
        return Choice("triton", problem.kernel, "predicted to be faster for so large a weight and so few rows")
    return Choice("composed", composed, "the kernel is not predicted to be clearly faster, and has not been measured")


def explain(
    method: str,
    shape: tuple[int, int, int],
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    weight_bits: int,
    *,
    pairs: bool = False,
    gradient: bool = False,
    reason_against: str | None = None,
) -> Choice:
    """The choice for operands of these sizes.

    Args:
        method: "dense", "cp" or "tucker".
        shape: (O, I, J).
        weight_bits: 8 for int8.
        reason_against: what the caller knows to rule the fused kernels out.
    """
    problem = Problem(method, shape, rows, pairs, device, dtype, weight_bits, gradient)  # type: ignore[arg-type]
    return choose(problem, None, reason_against)
