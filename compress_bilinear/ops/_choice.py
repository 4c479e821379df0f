"""The fused kernels, which run on request alone, and what can be against them.

There are two Triton kernels: a dense layer on rows, and the product of the projections of a CP layer on rows. Neither
has been timed on a GPU, so a call takes the composed path unless it asks for a kernel by `backend="triton"`.
`python -m benchmarks.run --device cuda` compares both paths.
"""

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal, TypeAlias

import torch

Backend: TypeAlias = Literal["composed", "triton"]

BACKENDS: tuple[Backend, ...] = ("composed", "triton")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on a CPU, slowly, for tests

_COMPOSED = {
    "dense": "matrix products in blocks",
    "cp": "three linear maps around a product",
    "tucker": "linear maps around a dense core",
}


def explain(
    method: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: int = 1,
    pairs: bool = False,
    reason_against: str | None = None,
) -> str:
    """What a call runs without a `backend`, and why no fused kernel does.

    Args:
        method: "dense", "cp" or "tucker".
        device, dtype: of the inputs.
        rows: N, or the number of pairs.
        reason_against: what the caller knows to rule the fused kernels out.
    """
    found = filter(None, (reason_against, reason_against_kernel(method, device, dtype, rows=rows, pairs=pairs)))
    return f"{_COMPOSED[method]}: {'; '.join(found) or 'the kernel has not been measured, and runs only on request'}"


def reason_against_kernel(
    method: str, device: torch.device, dtype: torch.dtype, *, rows: int = 1, pairs: bool = False
) -> str | None:
    """Why no kernel can run; None where one can."""
    if pairs or method == "tucker":
        return f"the composed path is the only one for {'pairs' if pairs else 'a Tucker layer'}"
    if reason := reason_against_triton(device, dtype):
        return reason
    if method == "dense" and dtype == torch.float16:
        return "the dense kernel multiplies inputs with each other, and such products overflow in float16"
    return "there are no rows" if rows == 0 else None


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
