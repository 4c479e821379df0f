"""What the Triton kernels share: masked tiles, and products of each dtype.

Loads outside a tensor give zero and stores outside are masked, so any size works. Offsets of rows and outputs are
64-bit. Sums are in float32. An int8 entry is exact in each dtype in which it is multiplied.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._blocks import tuning

OPTIONS = {
    "enable_fp_fusion": True,  # the default until now; Triton 3.9 warns that it will change
    "maxnreg": 255,  # all registers: ptxas may otherwise spill a few of 130 to use 128, for more programs at once
}

# the interpreter reads the bits of bfloat16 as integers, so there both products below are taken in float32
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 in TF32 only where torch's own matrix products on CUDA may."""
    if dtype != torch.float32:
        return "ieee"  # of no effect: the products of 16-bit values are exact in float32
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # torch 2.9 and later
    if setting is None:
        return "tf32" if matmul.allow_tf32 else "ieee"
    if setting == "none":
        setting = torch.backends.fp32_precision  # type: ignore[attr-defined, unused-ignore]
    return "tf32" if setting == "tf32" else "ieee"


def exact(x: Tensor) -> bool:
    """Whether the products of these values are taken without tensor cores."""
    return x.dtype == torch.float32 and precision(x.dtype) == "ieee"


def tile(size: int, most: int) -> int:
    """The power of two from 16, the least that `tl.dot` takes, to `most` that covers `size` if any does."""
    return max(16, min(most, triton.next_power_of_2(size)))


def shares(length: int, programs: int) -> tuple[int, int]:
    """How many terms of a sum of `length` each program takes, and how many programs share it, to fill a GPU."""
    if length == 0 or programs == 0:  # no rows, which a graph compiled for any number may meet
        return 1, 1
    splits = max(1, min(length, triton.cdiv(tuning().programs, programs)))
    part = triton.cdiv(length, splits)
    return part, triton.cdiv(length, part)


@triton.jit
def times(left, right):
    """left * right, rounded once to `left`'s dtype."""
    if _INTERPRETED:  # noqa: SIM108 - decided when compiled
        product = (left.to(tl.float32) * right.to(tl.float32)).to(left.dtype)
    else:
        product = left * right
    return product


@triton.jit
def multiply(left, right, accumulator, PRECISION: tl.constexpr):
    """accumulator + left @ right, in float32."""
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, accumulator, input_precision=PRECISION)


@triton.jit
def load_tile(pointer, row, rows, row_stride, column, columns, column_stride):
    """The tile pointer[row, column]; zero where an index is out of range."""
    offset = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    return tl.load(pointer + offset, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def store_tile(pointer, value, row, rows, row_stride, column, columns, column_stride):
    """Write the part of a tile that is in range, in the pointer's dtype."""
    offset = row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)
