"""Quantized layers for the tests, from random weights or factors, with what they stand for; and a call's memory."""

import itertools
from itertools import accumulate

import pytest
import torch

import compress_bilinear as cb
from compress_bilinear.decomposition import CPDecomposition, TuckerDecomposition
from compress_bilinear.quantization import encode_int8

FORMATS = ("bf16", "int8", "nf4")
METHODS = ("dense", "cp", "tucker")
BOUND = {"bf16": 0.01, "int8": 0.03, "nf4": 0.3}  # of a small layer's weight, far above what is usual


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact_parts(method, shape, rank, *, scale=1.0):
    """A decomposition of random Gaussian factors."""
    if method == "cp":
        factors = tuple(normal(size, rank, seed=seed) for seed, size in enumerate(shape))
        return CPDecomposition(scale * normal(rank, seed=9).abs(), factors)
    ranks = tuple(min(rank, size) for size in shape)
    factors = tuple(normal(size, r, seed=seed) for seed, (size, r) in enumerate(zip(shape, ranks, strict=True)))
    return TuckerDecomposition(scale * normal(*ranks, seed=9), factors)


def made(method, quantize, shape=(19, 30, 23), rank=7, *, scale=1.0, bias=True):
    """A quantized layer for a weight of shape (O, I, J), and that weight in float64."""
    added = normal(shape[0], seed=5) if bias else None
    if method == "dense":
        weight = scale * normal(*shape)
        return cb.DenseBilinear.from_weight(weight, added, quantize=quantize), weight.double()
    decomposition = exact_parts(method, shape, rank, scale=scale)
    wide = type(decomposition)(  # at 1e30, float32 holds the weight but not what is summed on the way
        *(
            part.double() if isinstance(part, torch.Tensor) else tuple(factor.double() for factor in part)
            for part in vars(decomposition).values()
            if part is not None
        )
    )
    kind = cb.CPBilinear if method == "cp" else cb.TuckerBilinear
    return kind.from_decomposition(decomposition, added, quantize=quantize), wide.to_tensor()


def rows(layer, count=5, dtype=torch.float32):
    sizes = (layer.in1_features, layer.in2_features)
    return tuple(normal(count, size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes, 20))


def relative(found, exact):
    scale = float(exact.abs().max()) or 1.0
    return float((found.double() / scale - exact / scale).norm() / (exact / scale).norm())


for_all = pytest.mark.parametrize(("method", "quantize"), list(itertools.product(METHODS, FORMATS)))
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
