"""What follows from a method's row in the table without another line of code; `test_worked_examples.py` runs this file.

Not collected by itself: the method that it tests is in a copy of the package.
"""

import pytest
import torch
from torch import nn

import compress_bilinear as cb
from compress_bilinear.config import CONFIGS, parse_recipe
from compress_bilinear.fitting import stored_bytes
from compress_bilinear.modules import METHODS

ADDED = [name for name in METHODS if name not in ("dense", "tucker", "cp")]
OUT, IN1, IN2 = 6, 20, 18
TARGETS = [3, cb.MaxSize(0.3), cb.MaxError(0.6), cb.MaxError(0.6, on="output")]
for_each = pytest.mark.parametrize("method", ADDED)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rel = nn.Bilinear(IN1, IN2, OUT)

    def forward(self, x1, x2):
        return self.rel(x1, x2)


def batches():
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(64, size, generator=generator) for size in (IN1, IN2)) for _ in range(4)]


@for_each
@pytest.mark.parametrize("quantize", [None, "bf16", "int8", "nf4"])
@pytest.mark.parametrize("rank", TARGETS, ids=str)
def test_it_compresses_and_survives_a_file(method, quantize, rank, tmp_path):
    net, inputs = Net(), batches()[0]
    small, report = cb.compress(
        net, CONFIGS[method](rank=rank, quantize=quantize), calibration=batches(), measure_latency=False
    )
    (layer,) = report.layers
    assert (layer.decision, layer.method, layer.quantize) == ("replaced", method, quantize)
    assert layer.bytes_after == stored_bytes(small.rel) < layer.bytes_before
    if isinstance(rank, cb.MaxSize):
        assert layer.bytes_after <= rank.fraction * layer.bytes_before
    elif isinstance(rank, cb.MaxError):
        assert (layer.weight_error if rank.on == "weight" else layer.output_error) <= rank.error
    weight = small.rel.to_dense(torch.float64).detach()
    exact = net.rel.weight.detach().double()
    assert layer.weight_error == pytest.approx(float((exact - weight).norm() / exact.norm()), rel=1e-6)
    expected = torch.einsum("ni,oij,nj->no", inputs[0].double(), weight, inputs[1].double()) + small.rel.bias
    torch.testing.assert_close(small(*inputs).double(), expected, rtol=1e-4, atol=1e-4)
    pairs = small.rel.pairwise(inputs[0][:5], inputs[1][:7])
    torch.testing.assert_close(pairs[2, 3], small.rel(inputs[0][2], inputs[1][3]), rtol=1e-4, atol=1e-4)
    cb.save(small, tmp_path / "small.safetensors")
    assert torch.equal(cb.load(tmp_path / "small.safetensors", Net())(*inputs), small(*inputs))


@for_each
def test_its_layers_change_their_format(method):
    small, _ = cb.compress(Net(), CONFIGS[method](rank=3), measure_latency=False)
    quantized = cb.quantize(small, "int8")
    assert stored_bytes(quantized.rel) < stored_bytes(small.rel) / 2
    inputs = batches()[0]
    torch.testing.assert_close(cb.dequantize(quantized)(*inputs), quantized(*inputs), rtol=1e-4, atol=1e-4)


@for_each
def test_the_automatic_choice_considers_it(method):
    (front,) = cb.plan(Net(), cb.AutoConfig(size=0.5), measure_latency=False).fronts.values()
    assert {point.quantize for point in front if point.method == method} >= {"int8", "nf4"}


@for_each
def test_recipes_have_it(method):
    recipe = parse_recipe({"layers": {"rel": {"method": method, "max_size": 0.3, "quantize": "int8"}}})
    assert recipe.configs == {"rel": CONFIGS[method](rank=cb.MaxSize(0.3), quantize="int8")}
    config = cb.plan(Net(), recipe.configs["rel"], measure_latency=False).report.config
    assert config["layers"]["*"] == {"method": method, "max_size": 0.3, "quantize": "int8"}


def test_there_is_one():
    assert ADDED
