"""Layers of every method and storage format with random contents, their inputs, and what they should compute."""

import itertools

import pytest
import torch

from compress_bilinear.decomposition import CPDecomposition, TuckerDecomposition
from compress_bilinear.modules import LAYERS
from compress_bilinear.ops import Tuning, reference
from compress_bilinear.quantization import FORMATS

KINDS = tuple(itertools.product(LAYERS, (None, *FORMATS)))
EXACT = tuple(kind for kind in KINDS if kind[1] is None)
QUANTIZED = tuple(kind for kind in KINDS if kind[1] is not None)
PROJECTED = tuple(kind for kind in KINDS if kind[0] != "dense")
FEW = tuple(kind for kind in KINDS if kind[1] in (None, "int8"))  # of a test that takes long; the others are slow
SMALL_BLOCKS = Tuning(block=12, block_grad=12, pairs=12, outer=12, cp=12, cp_grad=12, weight=12)
CP_RANK = 8


def for_kinds(kinds=KINDS, fast=KINDS):
    """Parametrize `method` and `quantize`; kinds that are not in `fast` are slow tests."""
    marked = [pytest.param(*kind, marks=() if kind in fast else pytest.mark.slow) for kind in kinds]
    return pytest.mark.parametrize(("method", "quantize"), marked, ids=["-".join(map(str, kind)) for kind in kinds])


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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
