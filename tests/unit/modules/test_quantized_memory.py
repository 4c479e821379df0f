"""What a quantized layer holds besides its inputs and outputs: one decoded slab, and for a backward none."""

import math

import pytest
import torch
from layers import for_all, made, peak_bytes, rows

from compress_bilinear.ops import Tuning, use_tuning
from compress_bilinear.quantization import QuantizedTensor


@for_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_holds_one_decoded_slab_besides_the_intermediates(method, quantize, dtype):
    part, shape, rank, count = 2**14, (130, 128, 128), {"dense": None, "cp": 1024, "tucker": 94}[method], 2
    layer, _ = made(method, quantize, shape, rank)
    layer = layer.to(dtype)
    values = rows(layer, count, dtype=dtype)
    with torch.no_grad(), use_tuning(Tuning(weight=part)):
        layer(*values)
        peak = peak_bytes(lambda: layer(*values))
    # a part in float32, beside it the same in the inputs' dtype; of NF4, its indices, eight bytes each
    held = part * (4 + (8 if quantize == "nf4" else 0 if dtype == torch.float32 else dtype.itemsize))
    # the projections, their product, and inputs and outputs; of a dense weight or core, T
    elements = {"dense": 130 * 128, "cp": 4 * 1024, "tucker": 94 * 94}[method] + 2 * sum(shape)
    packed = 2**17 if dtype == torch.bfloat16 else 0  # oneDNN's copy of a part, of which it has few outputs here
    between = 4 * count * elements + packed
    assert peak <= held + between
    whole = {"dense": math.prod(shape), "cp": 1024 * sum(shape), "tucker": 94**3}[method] * dtype.itemsize
    assert held + between < whole


def calls(layer, count=6):
    """Every way to call a layer, with inputs that require gradients."""
    input1, input2 = (value.requires_grad_() for value in rows(layer, count))
    blocks = input1.view(count // 2, 2, -1)[..., : layer.in1_features // 2]
    return {
        "forward": lambda: layer(input1, input2),
        "pairwise": lambda: layer.pairwise(input1, input2),
        "blockwise": lambda: layer.blockwise(blocks, input2.view(count // 2, 2, -1)),
        "indexed": lambda: layer.indexed(input1, torch.arange(count) % layer.in2_features),
    }


@for_all
@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize("way", ["forward", "pairwise", "blockwise", "indexed"])
def test_no_decoded_values_are_kept_for_a_backward(method, quantize, parts, way):
    layer, _ = made(method, quantize, (20, 30, 24), 18)
    least = min(part.shape.numel() for part in layer.modules() if isinstance(part, QuantizedTensor)) // parts
    sizes = Tuning(weight=2**20 if parts == 1 else least)
    for compute in layer.computes:
        layer.set_compute(compute)
        there = {tensor.untyped_storage().data_ptr() for tensor in (*layer.buffers(), *layer.parameters())}
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t)
        with use_tuning(sizes), hooks:
            output = calls(layer)[way]()
        own = [tensor.numel() for tensor in saved if tensor.untyped_storage().data_ptr() not in there]
        activations = max(6 * max(20 * 30, 18 * 18), 36 * 20 * 2, 6 * 30 * 24)  # T, pairs and products of inputs
        assert max(own, default=0) <= activations < 20 * 30 * 24
        assert output.requires_grad


@for_all
def test_a_backward_holds_one_decoded_slab_too(method, quantize):
    part, shape, rank, count = 2**14, (130, 128, 128), {"dense": None, "cp": 1024, "tucker": 94}[method], 2
    layer, _ = made(method, quantize, shape, rank)
    inputs = [value.requires_grad_() for value in rows(layer, count)]

    def step():
        torch.autograd.grad(layer(*inputs).sum(), inputs)

    whole = 4 * {"dense": math.prod(shape), "cp": 1024 * sum(shape), "tucker": 94**3}[method]
    elements = {"dense": 130 * 128, "cp": 4 * 1024, "tucker": 94 * 94}[method] + 2 * sum(shape)
    for compute in layer.computes:
        layer.set_compute(compute)
        with use_tuning(Tuning(weight=part)):
            step()
            peak = peak_bytes(step)
        # a part, what it is turned or copied to for a product, and of NF4 its indices; twice what lies between
        held = part * (8 + (8 if quantize == "nf4" else 0)) + 2 * 4 * count * elements
        assert peak <= held < whole


@for_all
def test_gradients_of_gradients_are_those_of_the_dense_weight(method, quantize):
    layer, _ = made(method, quantize, (5, 6, 7), 3)
    inputs = [value.double().requires_grad_() for value in rows(layer, 3)]
    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_a_weight_that_has_changed_since_the_forward_is_an_error_in_the_backward():
    layer, _ = made("cp", "int8")
    output = layer(*(value.requires_grad_() for value in rows(layer))).sum()
    layer.in1_proj.weight.qdata.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()
