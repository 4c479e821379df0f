import pytest
import torch
from layers import KINDS, PROJECTED, QUANTIZED, for_kinds, make
from torch import nn

import compress_bilinear as cb
from compress_bilinear.errors import CompressionError

WRITES = {
    "zeros_": lambda layer: nn.init.zeros_(layer.weight),
    "xavier_uniform_": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(5, 7, 6)),
    "data.copy_": lambda layer: layer.weight.data.copy_(torch.zeros(5, 7, 6)),
    "data =": lambda layer: setattr(layer.weight, "data", torch.zeros(5, 7, 6)),
    "[0] =": lambda layer: layer.weight.__setitem__(0, 1.0),
    "+=": lambda layer: layer.weight.__iadd__(1.0),
    "out=": lambda layer: torch.add(torch.zeros(5, 7, 6), 1, out=layer.weight),
}


@for_kinds(PROJECTED)
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_computed_weight_is_not_written_to(method, quantize, write):
    layer = make(method, quantize)
    before = layer.weight.clone()
    with pytest.raises(AttributeError, match="should not be written to"):
        write(layer)
    assert torch.equal(layer.weight, before)


@for_kinds(PROJECTED)
def test_a_computed_weight_is_read_as_a_tensor(method, quantize):
    layer = make(method, quantize)
    assert torch.equal(layer.weight, layer.to_dense())
    for found in (layer.weight * 2, layer.weight.mT, layer.weight.clone(), layer.weight.detach(), -layer.weight):
        assert type(found) is torch.Tensor
    if quantize is None:
        layer.weight.square().sum().backward()
        assert all(p.grad is not None for name, p in layer.named_parameters() if "bias" not in name)


@for_kinds([kind for kind in QUANTIZED if kind[0] == "dense"])
def test_a_stored_weight_answers_what_it_is_and_says_what_it_is_not(method, quantize):
    layer = make(method, quantize)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((5, 7, 6), torch.float32, "cpu")
    assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert layer.double().weight.dtype == torch.float64
    assert layer.to("meta").weight.device.type == "meta"
    with pytest.raises(AttributeError, match=f"stored in {quantize}: `layer.to_dense\\(\\)`"):
        layer.weight.squeeze(0)
    assert not hasattr(layer.weight, "requires_grad")
    rows = torch.ones(2, 7)
    for use in (rows.type_as, torch.zeros_like, rows.__matmul__, lambda weight: torch.stack([weight])):
        with pytest.raises(CompressionError, match=f"stored in {quantize}: `layer.to_dense\\(\\)`"):
            use(layer.weight)


@pytest.mark.parametrize("quantize", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_stored_weight_has_the_dtype_of_its_network(quantize, bias, tmp_path):
    def net():
        return nn.ModuleDict({"rel": nn.Bilinear(7, 6, 5, bias=bias)}).to(torch.bfloat16)

    small, _ = cb.compress(net(), cb.DenseConfig(quantize=quantize), force=True, progress=False, measure_latency=False)
    assert small["rel"].weight.dtype == torch.bfloat16
    cb.save(small, tmp_path / "small.safetensors")
    assert cb.load(tmp_path / "small.safetensors", net())["rel"].weight.dtype == torch.bfloat16


@for_kinds(KINDS)
def test_only_a_floating_dense_layer_is_initialised_anew(method, quantize):
    layer = make(method, quantize)
    before = layer.to_dense().clone()
    if (method, quantize) == ("dense", None):
        layer.reset_parameters()
        assert not torch.equal(layer.to_dense(), before)
        return
    with pytest.raises(CompressionError, match="should keep its weights"):
        layer.reset_parameters()
    assert torch.equal(layer.to_dense(), before)
