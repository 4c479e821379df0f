"""Layers of every method and storage format where calls are recorded, transformed or cast."""

import os
import shutil
import warnings
from itertools import product

import pytest
import torch
from layers import FEW, KINDS, SMALL_BLOCKS, expected, for_kinds, inputs, make
from support import assert_matches_reference, bilinear
from torch import nn

from compress_bilinear.ops import Tuning, reference, use_tuning


@for_kinds()
@pytest.mark.parametrize("sizes", [Tuning(), SMALL_BLOCKS], ids=["whole", "blocks"])
def test_functional_gradients_are_those_of_autograd(method, quantize, sizes):
    layer = make(method, quantize)
    for call in (layer, layer.pairwise):
        input1, input2 = inputs(layer, 6)
        with use_tuning(sizes):
            found = torch.func.grad(lambda values, call=call, other=input2: call(values, other).sum())(input1)
            input1.requires_grad_()
            assert_matches_reference(found, torch.autograd.grad(call(input1, input2).sum(), input1)[0])


@for_kinds()
def test_vmap_is_a_loop(method, quantize):
    layer = make(method, quantize)
    values = inputs(layer, 3, 4)
    for call in (layer, layer.pairwise):
        looped = torch.stack([call(*pair) for pair in zip(*values, strict=True)])
        assert_matches_reference(torch.func.vmap(call)(*values).detach(), looped.detach())


@for_kinds()
def test_shapes_are_inferred_on_the_meta_device(method, quantize):
    layer = make(method, quantize)
    values = [value.to("meta") for value in inputs(layer, 4)]
    layer = layer.to("meta")
    assert layer(*values).shape == (4, 5)
    assert layer.pairwise(*values).shape == (4, 4, 5)
    assert layer(*values).device.type == "meta"


@for_kinds(fast=FEW)
@pytest.mark.parametrize("call", ["forward", pytest.param("pairwise", marks=pytest.mark.slow)])
def test_compiling_needs_one_graph(method, quantize, call):
    layer = make(method, quantize)
    torch.compiler.reset()
    compiled = torch.compile(getattr(layer, call), fullgraph=True, backend="aot_eager")
    for rows in (3, 5, 8):
        values = inputs(layer, rows, requires_grad=True)
        found, exact = compiled(*values), getattr(layer, call)(*values)
        assert_matches_reference(found.detach(), exact.detach())
        for gradient, own in zip(
            torch.autograd.grad(found.sum(), values), torch.autograd.grad(exact.sum(), values), strict=True
        ):
            assert_matches_reference(gradient, own)


class Integers(nn.Module):
    """A linear layer of another library, whose `weight` is of integers."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter((linear.weight.detach() * 24).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, value):
        return nn.functional.linear(value, self.weight.to(value) / 24, self.bias)


@pytest.mark.parametrize("method", ["cp", "tucker"])
def test_inner_layers_of_integers_compute_in_the_dtype_of_the_inputs(method):
    layer = make(method, None, (63, 37, 17), dtype=torch.float32)
    for name, part in list(layer.named_children()):
        if isinstance(part, nn.Linear):
            setattr(layer, name, Integers(part))
    values = inputs(layer, 4, dtype=torch.float32)
    change = layer(*values).detach() - expected(make(method, None, (63, 37, 17), dtype=torch.float32), *values)
    assert layer(*values).dtype == torch.float32
    assert float(change.norm()) < 0.1 * float(layer(*values).detach().norm())


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None, reason="no C++ compiler"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it imports the compiler
def test_compiling_to_code():
    layer = make("dense", "int8", dtype=torch.float32)
    values = inputs(layer, 5, dtype=torch.float32)
    torch.compiler.reset()
    with torch.no_grad():
        assert_matches_reference(torch.compile(layer, fullgraph=True)(*values), expected(layer, *values))


class Pairs(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, input1, input2):
        return self.layer.pairwise(input1, input2)


def exports():
    """Each kind that is fast once, its shape and call in turn; all others are slow."""
    shapes, number = [(7, 6, 5), (3, 4, 80), (63, 37, 150)], {kind: index for index, kind in enumerate(FEW)}
    for kind, (at, shape), pairs in product(KINDS, enumerate(shapes), (False, True)):
        fast = kind in number and at == number[kind] % 3 and pairs == (number[kind] % 2 == 1)
        yield pytest.param(*kind, shape, pairs, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("method", "quantize", "shape", "pairs"), list(exports()))
def test_an_exported_graph_takes_other_batch_sizes(method, quantize, shape, pairs):
    layer = make(method, quantize, shape, dtype=torch.float32).eval()
    count1 = count2 = torch.export.Dim("batch", min=1, max=4096)
    if pairs:
        count1, count2 = torch.export.Dim("count1", min=1, max=4096), torch.export.Dim("count2", min=1, max=4096)
    module = Pairs(layer) if pairs else layer
    program = torch.export.export(
        module, inputs(layer, 3, dtype=torch.float32), dynamic_shapes=({0: count1}, {0: count2})
    )
    for rows in (3, 1, 17):
        values = inputs(layer, rows, dtype=torch.float32)
        define = reference.pairwise_dense if pairs else reference.bilinear_dense
        assert_matches_reference(program.module()(*values).detach(), expected(layer, *values, define))


@for_kinds()
def test_a_trace_takes_other_batch_sizes(method, quantize):
    layer = make(method, quantize, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated, and that it records the checks of shapes
        traced = torch.jit.trace(layer, inputs(layer, 2, dtype=torch.float32))
    values = inputs(layer, 9, dtype=torch.float32)
    assert_matches_reference(traced(*values).detach(), expected(layer, *values))


@for_kinds()
def test_autocast_takes_mixed_inputs_where_nn_bilinear_does_not(method, quantize):
    for dtype1, dtype2 in product((torch.float32, torch.bfloat16), repeat=2):
        layer = make(method, quantize, dtype=torch.float32)
        input1, input2 = inputs(layer, 4)
        values = input1.to(dtype1), input2.to(dtype2)
        with torch.autocast("cpu", torch.bfloat16):
            if dtype1 != dtype2:
                with pytest.raises(RuntimeError, match="dtype"):
                    bilinear(7, 6, 5)(*values)
            output, pairs = layer(*values), layer.pairwise(*values)
            output.sum().backward()
        assert output.dtype == pairs.dtype == torch.bfloat16
        assert_matches_reference(output.detach(), expected(layer, *values))
        assert_matches_reference(pairs.detach(), expected(layer, *values, reference.pairwise_dense))
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@for_kinds()
def test_autocast_leaves_float64_alone(method, quantize):
    layer = make(method, quantize)
    values = inputs(layer, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(*values)
    assert_matches_reference(output.detach(), expected(layer, *values))
    assert output.dtype == torch.float64
