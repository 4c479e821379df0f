import pytest
import torch
from support import SHAPES, assert_matches_reference, assert_same_state, bilinear, state_of
from torch import nn

from compress_bilinear import DenseBilinear, ops
from compress_bilinear.modules import CompressedBilinear
from compress_bilinear.quantization import QuantizedTensor, expand_scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_dict_is_nn_bilinears_both_ways(dtype, bias):
    original, other = bilinear(7, 6, 5, bias=bias, dtype=dtype), bilinear(7, 6, 5, bias=bias, dtype=dtype, seed=1)
    layer = DenseBilinear(7, 6, 5, bias=bias, dtype=dtype)
    layer.load_state_dict(original.state_dict())
    assert_same_state(layer, state_of(original))
    other.load_state_dict(layer.state_dict())
    assert_same_state(other, state_of(original))


@pytest.mark.parametrize("bias", [True, False])
def test_a_seed_initialises_it_as_it_does_nn_bilinear(bias):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = DenseBilinear(7, 6, 5, bias)
    assert_same_state(layer, state_of(bilinear(7, 6, 5, bias=bias)))


@pytest.mark.parametrize("shape", SHAPES)
def test_from_bilinear_is_the_same_function_in_memory_of_its_own(shape):
    original = bilinear(*shape, dtype=torch.float64)
    layer = DenseBilinear.from_bilinear(original)
    assert_same_state(layer, state_of(original))
    input1, input2 = torch.randn(4, shape[0]).double(), torch.randn(4, shape[1]).double()
    assert_matches_reference(layer(input1, input2).detach(), original(input1, input2).detach())
    before = state_of(original)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert_same_state(original, before)


def test_from_weight_makes_a_strided_weight_contiguous():
    weight = torch.randn(6, 7, 5).permute(2, 0, 1)
    layer = DenseBilinear.from_weight(weight)
    assert layer.weight.is_contiguous()
    assert torch.equal(layer.weight, weight)
    assert layer.bias is None


def test_weight_and_bias_are_parameters_that_may_be_set():
    layer = DenseBilinear(7, 6, 5)
    weight, bias = nn.Parameter(torch.zeros(5, 7, 6)), nn.Parameter(torch.arange(5.0))
    layer.weight, layer.bias = weight, bias
    assert dict(layer.named_parameters()) == {"weight": weight, "bias": bias}
    assert torch.equal(layer(torch.ones(2, 7), torch.ones(2, 6)), bias.expand(2, 5))


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((7, 40, 5), (5, 7, 1)),
        ((40, 7, 5), (5, 1, 7)),
        ((33, 33, 5), (5, 33, 1)),
        ((7, 200, 5), (5, 7, 2)),
        ((200, 7, 5), (5, 2, 7)),
        ((9, 8, 5), (5, 1, 2)),
    ],
)
def test_int8_has_a_scale_for_each_output_and_part_of_a_row_along_the_longer_input(shape, grid):
    original = bilinear(*shape)
    layer = DenseBilinear.from_bilinear(original, quantize="int8")
    assert isinstance(layer.weight, QuantizedTensor)
    assert (tuple(layer.weight.scale.shape), layer.weight.scale.dtype) == (grid, torch.bfloat16)
    step = expand_scale(layer.weight.scale.float(), layer.weight.shape)
    assert bool(((layer.to_dense() - original.weight).abs() <= 0.501 * step).all())
    assert torch.equal(layer.bias, original.bias)


def test_flops_are_those_of_the_dense_operation():
    assert DenseBilinear(7, 6, 5).flops_per_row == ops.dense_flops((5, 7, 6))


def test_it_is_a_compressed_bilinear_of_the_dense_method():
    layer = DenseBilinear(7, 6, 5)
    assert isinstance(layer, CompressedBilinear)
    assert (layer.method, layer.rank) == ("dense", None)


@pytest.mark.parametrize("out", [1, 3, 4, 9])
@pytest.mark.parametrize("count", [1, 5, 400])
def test_the_output_has_the_weights_dtype_also_with_a_wider_bias(out, count):
    layer = DenseBilinear.from_bilinear(bilinear(16, 12, out)).bfloat16()
    layer.bias = nn.Parameter(layer.bias.detach().float())
    output = layer(torch.ones(count, 16, dtype=torch.bfloat16), torch.ones(count, 12, dtype=torch.bfloat16))
    assert (output.dtype, output.shape) == (torch.bfloat16, (count, out))
