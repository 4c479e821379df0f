import copy

import pytest
import torch
from support import assert_matches_reference, assert_same_state, bilinear, low_rank, state_of
from torch import nn

import compress_bilinear as cb
from compress_bilinear.errors import ConfigError, MatchError
from compress_bilinear.quantization import QuantizedTensor

IN1, IN2, OUT = 12, 10, 8
WAYS = {
    "dense": lambda layer, quantize: cb.DenseBilinear.from_bilinear(layer, quantize=quantize),
    "cp": lambda layer, quantize: cb.CPBilinear.from_bilinear(layer, 3, quantize=quantize),
    "tucker": lambda layer, quantize: cb.TuckerBilinear.from_bilinear(layer, (3, 4, 4), quantize=quantize),
    "tucker interpolated": lambda layer, quantize: cb.TuckerBilinear.from_bilinear(
        layer, (7, 11, 9), quantize=quantize
    ),
    "tucker absorbed": lambda layer, quantize: cb.TuckerBilinear.from_bilinear(layer, (8, 12, 4), quantize=quantize),
}


def made(way, quantize="int8", *, bias=True, dtype=torch.float32, shape=(IN1, IN2, OUT)):
    layer = bilinear(*shape, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(low_rank(layer.weight.shape, 3, noise=0.05))
    return WAYS[way](layer, quantize)


def rows(dtype=torch.float32, sizes=(IN1, IN2)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, size, generator=generator).to(dtype) for size in sizes]


class Net(nn.Module):
    """An int8 layer under two names, a plain compressed one, and a bias that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = made("cp")
        self.plain = made("tucker", None)
        self.tied = nn.Linear(4, OUT)
        self.tied.bias = self.one.out_proj.bias

    def forward(self, x1, x2):
        return self.one(x1, x2) + self.plain(x1, x2)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
class TestEachForm:
    def test_floating_point_has_the_same_function(self, way, dtype, bias):
        layer = made(way, bias=bias, dtype=dtype)
        floating = cb.dequantize(layer, dtype=dtype)
        assert type(floating) is type(layer)
        assert floating.quantize is None
        assert floating.rank == layer.rank
        assert not any(isinstance(part, QuantizedTensor) for part in floating.modules())
        assert all(parameter.dtype == dtype for parameter in floating.parameters())
        assert_matches_reference(floating(*rows(dtype)), layer(*rows(dtype)).detach().double())
        assert_matches_reference(floating.to_dense().detach(), layer.to_dense(torch.float64))

    def test_there_and_back_gives_the_same_integers(self, way, dtype, bias):
        layer = made(way, bias=bias, dtype=dtype)
        again = cb.quantize(cb.dequantize(layer, dtype=torch.float64))
        assert list(again.state_dict()) == list(layer.state_dict())
        for name, value in layer.state_dict().items():
            if value.dtype == torch.int8:
                assert torch.equal(again.state_dict()[name], value)

    def test_floating_factors_learn(self, way, dtype, bias):
        floating = cb.dequantize(made(way, bias=bias, dtype=dtype), dtype=dtype)
        floating(*rows(dtype)).float().square().sum().backward()
        assert all(parameter.grad is not None for parameter in floating.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_four_bits_there_and_back_are_the_same(way):
    layer = made(way, "nf4")
    again = cb.quantize(cb.dequantize(layer, dtype=torch.float64), "nf4")
    assert again.quantize == "nf4"
    before = layer.state_dict()
    assert list(again.state_dict()) == list(before)
    for name, value in again.state_dict().items():
        if value.dtype in (torch.uint8, torch.int32):
            assert torch.equal(value, before[name])
    assert_matches_reference(again.to_dense(), layer.to_dense().double())


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 3), (9, 1, 3), (5, 6, 1)], ids=str)
@pytest.mark.parametrize("quantize", ["int8", None], ids=str)
def test_dimensions_of_size_1(shape, quantize):
    layer = cb.CPBilinear.from_bilinear(bilinear(*shape), 1, quantize=quantize)
    new = cb.dequantize(layer) if quantize else cb.quantize(layer)
    assert_matches_reference(new(*rows(sizes=shape[:2])), layer(*rows(sizes=shape[:2])).detach().double(), 1e-2 / 1e-5)


class TestModels:
    def test_a_copy_is_converted_and_what_is_shared_stays_shared(self):
        net = Net()
        before = state_of(net)
        new = cb.dequantize(net)
        assert_same_state(net, before)
        assert new.one is new.other
        assert new.one.quantize is None
        assert new.tied.bias is new.one.out_proj.bias
        assert new.tied.bias is not net.tied.bias
        assert_matches_reference(new(*rows()), net(*rows()).detach().double())

    def test_in_place(self):
        net = Net()
        expected, plain, bias = net(*rows()), net.plain, net.tied.bias
        assert cb.dequantize(net, inplace=True) is net
        assert net.plain is plain
        assert net.one is net.other
        assert net.one.out_proj.bias is bias
        assert_matches_reference(net(*rows()), expected.detach().double())
        assert cb.quantize(net, inplace=True).plain.quantize == "int8"

    @pytest.mark.parametrize("inplace", [False, True])
    def test_what_is_converted_in_inference_mode_can_be_trained(self, inplace):
        net = Net()
        with torch.inference_mode():
            net = cb.dequantize(net, inplace=inplace)
        net(*rows()).sum().backward()
        with torch.inference_mode():
            cb.quantize(net, inplace=inplace)(*rows())

    def test_modes_and_frozen_biases_stay(self):
        layer = made("cp").eval()
        layer.out_proj.bias.requires_grad_(False)
        new = cb.dequantize(layer)
        assert not new.training
        assert not new.out_proj.bias.requires_grad
        assert new.in1_proj.weight.requires_grad

    def test_the_dtype_is_the_bias_s_or_the_model_s(self):
        assert cb.dequantize(made("cp", dtype=torch.bfloat16)).in1_proj.weight.dtype == torch.bfloat16
        net = nn.ModuleList([nn.Linear(3, 2, dtype=torch.float16), made("cp", bias=False)])
        assert cb.dequantize(net)[1].in1_proj.weight.dtype == torch.float16
        assert cb.dequantize(made("cp", bias=False)).in1_proj.weight.dtype == torch.float32

    def test_fine_tuned_layers_save_and_load_in_8_bits(self, tmp_path):
        net = cb.dequantize(nn.Sequential(made("cp")))
        with torch.no_grad():
            net[0].in1_proj.weight.mul_(2)
        small = cb.quantize(net)
        cb.save(small, tmp_path / "small.safetensors")
        again = cb.load(tmp_path / "small.safetensors", nn.Sequential(nn.Bilinear(IN1, IN2, OUT)))
        assert torch.equal(again[0](*rows()), small[0](*rows()))


class TestRefusals:
    def test_nothing_to_convert(self):
        with pytest.raises(MatchError, match=r"that is quantized\. Found no compressed layer"):
            cb.dequantize(nn.Sequential(nn.Bilinear(2, 3, 4)))
        with pytest.raises(MatchError, match=r"that is quantized. Found 0 \(tucker, None\)"):
            cb.dequantize(nn.Sequential(made("tucker", None)))
        with pytest.raises(MatchError, match=r"in floating point. Found \(root\) \(cp, int8\)"):
            cb.quantize(made("cp"))

    def test_a_layer_cannot_replace_itself(self):
        with pytest.raises(cb.CompressionError, match="itself the CPBilinear"):
            cb.dequantize(made("cp"), inplace=True)

    def test_hooks_would_be_lost(self):
        net = nn.Sequential(made("cp"))
        net[0].register_forward_hook(lambda *args: None)
        with pytest.raises(cb.CompressionError, match="Layer '0' cannot be stored otherwise: it has forward hooks"):
            cb.dequantize(net)
        net = nn.Sequential(made("tucker"))
        net[0].core.register_forward_hook(lambda *args: None)
        with pytest.raises(cb.CompressionError, match=r"`core` should be a plain .* it has hooks"):
            cb.dequantize(net)

    def test_wrapped_inner_layers_leave_the_model_as_it_was(self):
        net = nn.Sequential(made("cp", None), made("cp", None))
        net[1].in1_proj = nn.Sequential(net[1].in1_proj)
        modules = list(net.modules())
        with pytest.raises(cb.CompressionError, match=r"`in1_proj` should be a plain .* it is a Sequential"):
            cb.quantize(net, inplace=True)
        assert list(net.modules()) == modules

    @pytest.mark.parametrize("dtype", [torch.int8, "float32", 3], ids=str)
    def test_dtypes(self, dtype):
        with pytest.raises(ConfigError, match=r"floating torch\.dtype"):
            cb.dequantize(made("cp"), dtype=dtype)

    @pytest.mark.parametrize("name", [None, "int4", 8], ids=str)
    def test_formats(self, name):
        with pytest.raises(ConfigError, match="`quantize` should"):
            cb.quantize(made("cp", None), name)

    def test_the_original_is_not_shared(self):
        layer = made("dense", None)
        new = cb.quantize(layer)
        kept = copy.deepcopy(new.state_dict())
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.zero_()
        for name, value in new.state_dict().items():
            assert torch.equal(value, kept[name])


class TestComputeModes:
    def test_every_quantized_layer_that_has_the_mode_gets_it(self):
        net = nn.ModuleDict({"cp": made("cp"), "dense": made("dense", "nf4"), "plain": made("cp", None)})
        chosen = cb.set_compute(net, "int8")
        assert {name: choice.compute for name, choice in chosen.items()} == {"cp": "int8", "dense": "on_the_fly"}
        assert (net["cp"].compute, net["dense"].compute, net["plain"].compute) == ("int8", "on_the_fly", "on_the_fly")
        assert all(choice.latencies == {} for choice in chosen.values())

    def test_the_choice_says_what_is_stored(self):
        net = nn.Sequential(made("dense"))
        choice = cb.set_compute(net, "int8")["0"]
        assert choice.stored_bytes == sum(value.nbytes for value in net.state_dict().values())
        assert str(choice) == f"int8 (stores {choice.stored_bytes} bytes)"

    def test_the_fastest_is_chosen_by_measurement(self):
        layer = made("tucker")
        choice = cb.set_compute(layer, rows=3)[""]
        assert choice.latencies.keys() >= {"on_the_fly", "int8"}
        assert layer.compute == choice.compute
        if choice.compute != "on_the_fly":
            assert choice.latencies[choice.compute] < choice.latencies["on_the_fly"]
        assert all(f"{mode} {latency:.3g} ms" in str(choice) for mode, latency in choice.latencies.items())

    def test_the_dtype_is_the_bias_s_unless_it_is_given(self):
        layer, seen = made("dense", dtype=torch.bfloat16), []
        layer.forward = lambda input1, input2: seen.append(input1.dtype) or type(layer).forward(layer, input1, input2)
        for dtype in (None, torch.float64):
            cb.set_compute(layer, rows=3, dtype=dtype)
        assert list(dict.fromkeys(seen)) == [torch.bfloat16, torch.float64]

    def test_weights_that_are_kept_decoded_are_those_of_dequantize(self):
        with pytest.raises(ConfigError, match=r"cb\.dequantize"):
            cb.set_compute(nn.Sequential(made("dense")), "resident")
        with pytest.raises(ConfigError, match=r"compress_bilinear\.dequantize"):
            made("dense").set_compute("resident")

    @pytest.mark.parametrize(
        ("model", "asked", "error", "message"),
        [
            (nn.Linear(2, 2), {}, MatchError, "Found no compressed layer"),
            (made("cp", None), {}, MatchError, r"Found \(root\) \(cp, None\)"),
            (made("cp"), {"compute": "fast"}, ConfigError, "`compute` should be one of"),
            (made("cp"), {"compute": "resident"}, ConfigError, "cb.dequantize"),
            (made("cp"), {"rows": 0}, ConfigError, "`rows` should be a positive int. Found 0"),
            (made("dense", "nf4"), {"compute": "int8"}, ConfigError, "Found none: its values have"),
            (made("cp", "nf4"), {"compute": "int8"}, ConfigError, "Found none: its values have"),
        ],
    )
    def test_mistakes(self, model, asked, error, message):
        with pytest.raises(error, match=message):
            cb.set_compute(model, **asked)
