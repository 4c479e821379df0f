import pytest
import torch
from support import DTYPES, assert_matches_reference, bilinear
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.modules import QuantizedLinear
from compress_bilinear.modules._linear import fill_linear, linear_weight, make_linear
from compress_bilinear.quantization import FORMATS, decode_int8


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def example(dim=1, bias=True):
    weight = FORMATS["int8"].encode(normal(5, 9), ("columns", "rows")[dim])
    return QuantizedLinear(weight, nn.Parameter(normal(5)) if bias else None)


@pytest.mark.parametrize("leading", [(), (0,), (4,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_linear_layer_of_the_weight_it_stores(dtype, dim, bias, leading):
    layer, input = example(dim, bias), normal(*leading, 9, dtype=dtype)
    weight = decode_int8(layer.weight.qdata, layer.weight.scale, torch.float64)
    expected = nn.functional.linear(input.double(), weight, layer.bias.detach().double() if bias else None)
    output = layer(input).detach()
    assert output.dtype == dtype
    assert_matches_reference(output, expected)


def test_gradients_reach_the_input_and_the_bias():
    layer = example().double()
    assert torch.autograd.gradcheck(
        lambda input, bias: torch.func.functional_call(layer, {"bias": bias}, input),
        (normal(3, 9, dtype=torch.float64).requires_grad_(), layer.bias.detach().clone().requires_grad_()),
    )


def test_it_has_the_attributes_of_a_linear_layer():
    layer = example(bias=False)
    assert (layer.in_features, layer.out_features, layer.bias) == (9, 5, None)
    assert "in_features=9, out_features=5, bias=False" in repr(layer)
    assert sorted(example().state_dict()) == ["bias", "weight.qdata", "weight.scale"]


@pytest.mark.parametrize(("layout", "scales"), [("rows", (5, 1)), ("columns", (1, 9))])
def test_an_int8_layer_may_have_a_scale_for_each_component(layout, scales):
    made = make_linear(9, 5, True, "int8", None, torch.bfloat16, layout)
    assert tuple(made.weight.scale.shape) == scales
    assert made.bias.dtype == torch.bfloat16
    fill_linear(made, normal(5, 9))
    assert tuple(made.weight.scale.shape) == scales
    assert float((made.weight.decode() - normal(5, 9)).abs().max()) < 0.02


def test_without_a_format_it_is_an_ordinary_linear_layer_with_memory_of_its_own():
    made = make_linear(9, 5, False, None, None, torch.float64)
    assert type(made) is nn.Linear
    weight = normal(9, 5, dtype=torch.float64).T
    fill_linear(made, weight)
    assert made.weight.is_contiguous()
    assert torch.equal(made.weight, weight)
    with torch.no_grad():
        made.weight.zero_()
    assert bool(weight.all())


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_the_weight_is_read_in_the_dtype_that_is_asked_for(quantize):
    made = make_linear(9, 5, False, quantize, None, torch.float32)
    fill_linear(made, normal(5, 9) / 4)
    stored = made.weight if quantize is None else made.weight.decode(torch.float64)
    for dtype in DTYPES:
        read = linear_weight(made, dtype)
        assert read.dtype == dtype
        assert_matches_reference(read.detach(), stored.detach().double())


class Integers(nn.Module):
    """A linear layer of another library: integers and a scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) * self.scale)


def test_an_inner_layer_of_integers_from_elsewhere_is_called():
    layer = cb.CPBilinear.from_bilinear(bilinear(6, 5, 4), 3)
    values = torch.randn(7, 6), torch.randn(7, 5)
    expected = layer(*values)
    layer.in1_proj = Integers(layer.in1_proj)
    torch.testing.assert_close(layer(*values), expected, rtol=0.05, atol=0.05)
