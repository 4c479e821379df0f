"""Layers of every method and storage format with random contents, their inputs, and what they should compute."""

import itertools
from itertools import accumulate

import pytest
import torch
from support import normal

from compress_bilinear.decomposition import CPDecomposition, TuckerDecomposition
from compress_bilinear.modules import METHODS
from compress_bilinear.ops import Tuning, reference
from compress_bilinear.quantization import FORMATS, encode_int8

LAYERS = {name: method.layer for name, method in METHODS.items()}
KINDS = tuple(itertools.product(LAYERS, (None, *FORMATS)))
EXACT = tuple(kind for kind in KINDS if kind[1] is None)
QUANTIZED = tuple(kind for kind in KINDS if kind[1] is not None)
PROJECTED = tuple(kind for kind in KINDS if kind[0] != "dense")
FEW = tuple(kind for kind in KINDS if kind[1] in (None, "int8"))  # of a test that takes long; the others are slow
SMALL_BLOCKS = Tuning(block=12, block_grad=12, pairs=12, outer=12, cp=12, cp_grad=12, weight=12)
CP_RANK = 8
BOUND = {name: 3.3 * form.error for name, form in FORMATS.items()}  # of a small layer's weight, far above what is usual


def for_kinds(kinds=KINDS, fast=KINDS):
    """Parametrize `method` and `quantize`; kinds that are not in `fast` are slow tests."""
    marked = [pytest.param(*kind, marks=() if kind in fast else pytest.mark.slow) for kind in kinds]
    return pytest.mark.parametrize(("method", "quantize"), marked, ids=["-".join(map(str, kind)) for kind in kinds])


def rank_of(method, shape):
    """A rank for a layer of `shape` (I, J, O): of a Tucker layer, modes in part, near their size, and whole."""
    in1, in2, out = shape
    return {"dense": None, "cp": CP_RANK, "tucker": (min(out, 4), min(in1, 6), min(in2, 5))}[method]


def make(method, quantize, shape=(7, 6, 5), *, bias=True, dtype=torch.float64):
    """A layer of `shape` (I, J, O) with random contents."""
    in1, in2, out = shape
    added, rank = normal(out, dtype=dtype, seed=9) if bias else None, rank_of(method, shape)
    layer = LAYERS[method]
    if method == "dense":
        return layer.from_weight(normal(out, in1, in2, dtype=dtype), added, quantize=quantize)
    if method == "cp":
        factors = tuple(normal(size, rank, dtype=dtype, seed=size) for size in (out, in1, in2))
        decomposition = CPDecomposition(normal(rank, dtype=dtype), factors)
    else:
        factors = tuple(normal(size, r, dtype=dtype) for size, r in zip((out, in1, in2), rank, strict=True))
        decomposition = TuckerDecomposition(normal(*rank, dtype=dtype), factors)
    return layer.from_decomposition(decomposition, added, quantize=quantize)


def blank(method, quantize, shape=(7, 6, 5), rank=None, **options):
    """A layer by its constructor."""
    rank = rank or rank_of(method, shape)
    return LAYERS[method](*shape, *(() if rank is None else (rank,)), quantize=quantize, **options)


def inputs(layer, *leading, dtype=torch.float64, requires_grad=False):
    sizes = (layer.in1_features, layer.in2_features)
    return tuple(
        normal(*leading, size, dtype=dtype, seed=seed).requires_grad_(requires_grad)
        for seed, size in enumerate(sizes, 1)
    )


def expected(layer, input1, input2, define=reference.bilinear_dense):
    """By definition, from the weight that the layer stands for, in float64."""
    bias = None if layer.bias is None else layer.bias.detach().double()
    return define(input1.double(), input2.double(), layer.to_dense(torch.float64).detach(), bias)


def exact_parts(method, shape, rank, *, scale=1.0):
    """A decomposition of random Gaussian factors."""
    ranks = (rank,) * 3 if method == "cp" else tuple(min(rank, size) for size in shape)
    sizes = enumerate(zip(shape, ranks, strict=True))
    factors = tuple(normal(*size, dtype=torch.float32, seed=seed) for seed, size in sizes)
    if method == "cp":
        return CPDecomposition(scale * normal(rank, dtype=torch.float32, seed=9).abs(), factors)
    return TuckerDecomposition(scale * normal(*ranks, dtype=torch.float32, seed=9), factors)


def made(method, quantize, shape=(19, 30, 23), rank=7, *, scale=1.0, bias=True):
    """A quantized layer for a weight of shape (O, I, J), and that weight in float64."""
    added = normal(shape[0], dtype=torch.float32, seed=5) if bias else None
    if method == "dense":
        weight = scale * normal(*shape, dtype=torch.float32)
        return LAYERS[method].from_weight(weight, added, quantize=quantize), weight.double()
    decomposition = exact_parts(method, shape, rank, scale=scale)
    wide = type(decomposition)(  # at 1e30, float32 holds the weight but not what is summed on the way
        *(
            part.double() if isinstance(part, torch.Tensor) else tuple(factor.double() for factor in part)
            for part in vars(decomposition).values()
            if part is not None
        )
    )
    return LAYERS[method].from_decomposition(decomposition, added, quantize=quantize), wide.to_tensor()


def rows(layer, count=5, dtype=torch.float32):
    sizes = (layer.in1_features, layer.in2_features)
    return tuple(normal(count, size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes, 20))


def relative(found, exact):
    scale = float(exact.abs().max()) or 1.0
    return float((found.double() / scale - exact / scale).norm() / (exact / scale).norm())


for_all = for_kinds(QUANTIZED)
for_factors = pytest.mark.parametrize("method", ["cp", "tucker"])


def peak_bytes(call):
    """The most bytes that PyTorch's allocator held at once for a call."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate((event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())), initial=0))


def int8_slices(tensor, dim):
    """int8 values of a tensor, with a float32 scale for each slice along `dim`."""
    grid = [1 if axis == dim % tensor.dim() else size for axis, size in enumerate(tensor.shape)]
    return encode_int8(tensor.float().contiguous(), grid, torch.float32)
