"""`blockwise` and `indexed`: the same layer on a sum over blocks, and on an index for a one-hot input."""

import warnings

import pytest
import torch
from support import assert_matches_reference, bilinear
from torch import nn

from compress_bilinear.errors import AmplificationWarning, InputError
from compress_bilinear.modules import CPBilinear, DenseBilinear, TuckerBilinear

OUT, IN1, IN2 = 5, 12, 7
BUILT = {
    "dense": lambda layer, quantize: DenseBilinear.from_bilinear(layer, quantize=quantize),
    "cp": lambda layer, quantize: CPBilinear.from_bilinear(layer, 6, quantize=quantize),
    "tucker": lambda layer, quantize: TuckerBilinear.from_bilinear(layer, (3, 4, 3), quantize=quantize),
    "near full": lambda layer, quantize: TuckerBilinear.from_bilinear(layer, (5, 11, 7), quantize=quantize),
}


@pytest.fixture(params=[(name, quantize) for name in BUILT for quantize in (None, "int8")], ids=str)
def module(request):
    name, quantize = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AmplificationWarning)
        return BUILT[name](bilinear(IN1, IN2, OUT, dtype=torch.float64), quantize)


LEADING = ((4,), (2, 3), (0,), ())


@pytest.mark.parametrize("blocks", [1, 3, 12])
def test_blockwise_is_the_sum_of_its_blocks(module, blocks):
    torch.manual_seed(0)
    weight = module.to_dense(torch.float64).unflatten(1, (blocks, -1))
    for leading in LEADING:
        input1 = torch.randn(*leading, blocks, IN1 // blocks, dtype=torch.float64)
        input2 = torch.randn(*leading, blocks, IN2, dtype=torch.float64)
        expected = torch.einsum("...ki,okij,...kj->...o", input1, weight, input2) + module.bias
        assert_matches_reference(module.blockwise(input1, input2).detach(), expected.detach(), 10)


@pytest.mark.parametrize("terms", [1, 3])
def test_pairwise_sum_is_the_sum_of_all_pairs(module, terms):
    torch.manual_seed(0)
    for leading in LEADING:
        input1 = torch.randn(*leading, terms, 4, IN1, dtype=torch.float64)
        input2 = torch.randn(*leading, terms, 2, IN2, dtype=torch.float64)
        weight = module.to_dense(torch.float64)
        expected = torch.einsum("...ski,oij,...slj->...klo", input1, weight, input2) + module.bias
        assert_matches_reference(module.pairwise_sum(input1, input2).detach(), expected.detach(), 10)


def test_indexed_is_a_one_hot_input(module):
    torch.manual_seed(0)
    for leading in LEADING:
        input1 = torch.randn(*leading, IN1, dtype=torch.float64)
        index = torch.randint(IN2, leading)
        expected = module(input1, nn.functional.one_hot(index, IN2).double())
        assert_matches_reference(module.indexed(input1, index).detach(), expected.detach(), 10)


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
@pytest.mark.parametrize("name", ["dense", "tucker"])
def test_products_past_the_range_of_float16_do_not_overflow_on_the_way(name, quantize):
    layer = bilinear(IN1, IN2, OUT)
    with torch.no_grad():
        layer.weight.mul_(1e-3)
    module = BUILT[name](layer, quantize).half()
    input1, input2 = torch.randn(4, 3, IN1 // 3), torch.randn(4, 3, IN2)
    input1, input2 = (300 * value.sign() * (1 + value.abs() / 8) for value in (input1, input2))
    assert float(input1.amax() * input2.amax()) > torch.finfo(torch.float16).max
    weight = module.to_dense(torch.float64).unflatten(1, (3, -1))
    expected = torch.einsum("...ki,okij,...kj->...o", input1.half().double(), weight, input2.half().double())
    found = module.blockwise(input1.half(), input2.half())
    assert found.dtype == torch.float16
    assert_matches_reference(found.detach(), (expected + module.bias).detach(), 10)
    rows1, rows2 = input1.flatten(1).half(), input2[:, 0].half()
    expected = torch.einsum("ki,oij,lj->klo", rows1.double(), module.to_dense(torch.float64), rows2.double())
    found = module.pairwise_sum(rows1[None], rows2[None])
    assert found.dtype == torch.float16
    assert_matches_reference(found.detach(), (expected + module.bias).detach(), 10)


def test_wrapped_projections_run():
    layer = CPBilinear(IN1, IN2, OUT, 6)
    inputs = torch.randn(4, 3, IN1 // 3), torch.randn(4, 3, IN2)
    expected = layer.blockwise(*inputs)
    calls = []
    layer.in1_proj.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(layer.blockwise(*inputs), expected)
    assert calls


def test_wrong_inputs_are_told():
    layer = DenseBilinear(IN1, IN2, OUT)
    with pytest.raises(InputError, match="K at least 1"):
        layer.blockwise(torch.randn(4, 3, 4), torch.randn(4, 2, IN2))
    with pytest.raises(InputError, match=r"\(..., 12\)"):
        layer.blockwise(torch.randn(4, 3, 5), torch.randn(4, 3, IN2))
    with pytest.raises(InputError, match=r"\(..., S, L1, I\). Found \(4, 12\)"):
        layer.pairwise_sum(torch.randn(4, IN1), torch.randn(4, IN2))
    with pytest.raises(InputError, match="same leading dimensions"):
        layer.pairwise_sum(torch.randn(3, 4, IN1), torch.randn(2, 4, IN2))
    with pytest.raises(InputError, match="integers"):
        layer.indexed(torch.randn(4, IN1), torch.zeros(4))
    with pytest.raises(InputError, match="same leading dimensions"):
        layer.indexed(torch.randn(4, IN1), torch.zeros(3, dtype=torch.long))
