"""Layers in the hands of torch.jit, accelerate and peft."""

import copy
import importlib.util

import pytest
import torch
from layers import PROJECTED, QUANTIZED, for_kinds, inputs, make
from support import assert_matches_reference
from torch import nn

import compress_bilinear as cb
from compress_bilinear.errors import CompressionError, InputError
from compress_bilinear.modules import QuantizedLinear

SHAPE = (32, 24, 20)

needs_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="needs accelerate")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@for_kinds()
def test_scripting_refuses_with_words(method, quantize):
    model = nn.Sequential(make(method, quantize))
    with pytest.raises(CompressionError, match=r"Found a \w+Bilinear, .*: use torch.export or torch.jit.trace"):
        torch.jit.script(model)


def offloaded(layer):
    from accelerate import cpu_offload

    model = cpu_offload(copy.deepcopy(layer), torch.device("cpu"), offload_buffers=True)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    return model


@needs_accelerate
@for_kinds()
def test_a_layer_whose_weights_are_offloaded_brings_them_in(method, quantize):
    layer = make(method, quantize)
    away = offloaded(layer)
    expected, found = (inputs(layer, 9, requires_grad=True) for _ in range(2))
    for model, rows in ((layer, expected), (away, found)):
        output = model(*rows)
        output.square().sum().backward()
        assert_matches_reference(output, layer(*rows).detach())
    for one, other in zip(found, expected, strict=True):
        assert_matches_reference(one.grad, other.grad)
    assert all(tensor.is_meta for tensor in away.buffers())


@needs_accelerate
@for_kinds(tuple(kind for kind in PROJECTED if kind in QUANTIZED))
def test_a_weight_is_not_computed_of_what_is_offloaded(method, quantize):
    layer = make(method, quantize)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        offloaded(layer).to_dense()


@needs_accelerate
@pytest.mark.parametrize("method", ["cp", "dense"])
def test_integers_that_are_offloaded_are_not_multiplied(method):
    layer = make(method, "int8")
    layer.set_compute("int8")
    with pytest.raises(InputError, match=r"Stored integers should be on cpu, .* Found meta"):
        offloaded(layer)(*inputs(layer, 9))


@needs_accelerate
@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_with_a_hook_of_accelerate_is_kept_until_it_is_removed(inplace):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules

    model = nn.Sequential(nn.Bilinear(6, 5, 4))
    add_hook_to_module(model[0], AlignDevicesHook("cpu"))
    batch = (torch.randn(8, 6), torch.randn(8, 5))
    options = {"calibration": [batch], "forward_fn": lambda model, rows: model[0](*rows), "progress": False}
    _, report = cb.compress(model, cb.CPConfig(rank=3), inplace=inplace, **options)
    assert report.layers[0].decision == "kept"
    assert "undo that first (what accelerate did by accelerate.hooks.remove_hook_from_submodules)" in (
        report.layers[0].reason
    )
    remove_hook_from_submodules(model)
    assert "forward" in vars(model[0])  # its class's own, which is no reason against it
    small, report = cb.compress(model, cb.CPConfig(rank=3), inplace=inplace, force=True, **options)
    assert type(small[0]) is cb.CPBilinear


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.fusion = layer

    def forward(self, *rows):
        return self.fusion(*rows)


@needs_peft
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # peft's, of a class that was registered with it
@pytest.mark.parametrize("method", ["cp", "tucker"])
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.slow
def test_lora_on_stored_factors_is_trained_and_merged_into_floating_ones(method, quantize, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import Linear

    net = Net(make(method, quantize, SHAPE, dtype=torch.float32))
    rows = inputs(net.fusion, 16, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["in1_proj", "in2_proj", "out_proj"], init_lora_weights=False)
    config._register_custom_module({QuantizedLinear: Linear})
    adapted = get_peft_model(copy.deepcopy(net), config)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected = adapted(*rows)
    expected.sum().backward()
    trained = {name for name, value in adapted.named_parameters() if value.grad is not None}
    assert len(trained) == 6
    assert all("lora" in name for name in trained)
    assert not torch.allclose(expected, net(*rows), rtol=0.01)

    with pytest.raises(AttributeError, match=r"`compress_bilinear.dequantize` stores it as one"):
        adapted.merge_adapter()
    assert_matches_reference(adapted(*rows), expected.detach())  # nothing was half merged
    adapted.save_pretrained(tmp_path)
    plain = adapted.unload()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    floating = PeftModel.from_pretrained(cb.dequantize(plain), tmp_path)
    floating.merge_adapter()
    assert_matches_reference(floating(*rows), expected.detach(), 10)
    floating.unmerge_adapter()
    assert_matches_reference(floating(*rows), expected.detach(), 10)
    merged = floating.merge_and_unload()
    assert type(merged.fusion) is type(net.fusion)
    assert_matches_reference(merged(*rows), expected.detach(), 10)
    stored = cb.quantize(merged, quantize)(*rows)
    assert (stored - expected).norm() < 0.5 * (net(*rows) - expected).norm()
