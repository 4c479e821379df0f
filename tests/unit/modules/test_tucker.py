import pytest
import torch
from support import DTYPES, assert_matches_reference, normal
from torch import nn

from compress_bilinear import DenseBilinear, TuckerBilinear, ops
from compress_bilinear.decomposition import TuckerDecomposition, tucker_bytes
from compress_bilinear.errors import ConfigError, InputError
from compress_bilinear.fitting import stored_bytes
from compress_bilinear.modules import InterpolativeLinear, QuantizedLinear
from compress_bilinear.modules._linear import AddBias
from compress_bilinear.ops import reference

RANK = (4, 3, 6)  # of (5, 9, 7): two modes are near their sizes
PLAIN = (2, 3, 3)


def example(rank=RANK, *, dtype=torch.float64, quantize=None):
    factors = tuple(normal(size, r, dtype=dtype) for size, r in zip((5, 9, 7), rank, strict=True))
    decomposition = TuckerDecomposition(normal(*rank, dtype=dtype), factors)
    return TuckerBilinear.from_decomposition(decomposition, normal(5, dtype=dtype), quantize=quantize), decomposition


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_stands_for_the_tensor_of_its_decomposition(dtype):
    layer, decomposition = example(dtype=dtype)
    exact = torch.einsum(
        "abc,oa,ib,jc->oij", decomposition.core.double(), *(factor.double() for factor in decomposition.factors)
    )
    assert_matches_reference(layer.to_dense().detach(), exact)
    assert layer.to_dense().dtype == dtype


@pytest.mark.parametrize("rank", [(5, 3, 6), (4, 9, 6), (4, 3, 7), (5, 9, 6), (4, 9, 7), (5, 3, 7), (5, 9, 7)], ids=str)
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_full_rank_is_absorbed_into_the_core(rank, quantize, bias):
    _, decomposition = example(rank)
    layer = TuckerBilinear.from_decomposition(decomposition, normal(5, seed=3) if bias else None, quantize=quantize)
    exact = decomposition.to_tensor()
    absorbed = [type(part) for part in (layer.out_proj, layer.in1_proj, layer.in2_proj)]
    assert [kind in (nn.Identity, AddBias) for kind in absorbed] == [
        r == d for r, d in zip(rank, (5, 9, 7), strict=True)
    ]
    assert float((layer.to_dense(torch.float64).detach() - exact).norm() / exact.norm()) < (0.02 if quantize else 1e-12)
    bias_bytes = 40 if bias else 0
    assert stored_bytes(layer) == tucker_bytes(rank, (5, 9, 7), 8, quantize) + bias_bytes
    input1, input2 = normal(11, 9), normal(11, 7, seed=1)
    expected = reference.bilinear_dense(input1, input2, layer.to_dense(torch.float64), layer.bias)
    assert_matches_reference(layer(input1, input2).detach(), expected.detach())
    pairs = layer.pairwise(input1[None, :3], input2[None, :4])
    assert_matches_reference(pairs[0, 2, 3].detach(), layer(input1[2:3], input2[3:4])[0].detach())
    with pytest.raises(InputError, match=r"\(..., 9\)"):
        layer(input2, input2)


def test_a_square_factor_that_is_no_identity_is_multiplied_into_the_core():
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(d, d, generator=generator, dtype=torch.float64) for d in (5, 9, 7)]
    decomposition = TuckerDecomposition(normal(5, 9, 7), tuple(factors))
    layer = TuckerBilinear.from_decomposition(decomposition)
    assert list(layer.state_dict()) == ["core.weight"]
    torch.testing.assert_close(layer.core.weight.detach(), decomposition.to_tensor(), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("rank", [(1, 1, 1), PLAIN, RANK, (3, 5, 4)])
def test_the_forward_is_the_reference_of_its_parts(rank):
    layer, _ = example(rank)
    input1, input2 = normal(11, 9), normal(11, 7, seed=1)
    out, in1, in2 = (
        part.dense(torch.float64) if isinstance(part, InterpolativeLinear) else part.weight
        for part in (layer.out_proj, layer.in1_proj, layer.in2_proj)
    )
    factors = (out, in1.T, in2.T)
    expected = reference.bilinear_tucker(input1, input2, layer.core.weight, factors, layer.bias)
    assert_matches_reference(layer(input1, input2).detach(), expected.detach())


def test_it_is_made_of_ordinary_linear_layers_and_a_dense_core():
    layer = TuckerBilinear(9, 7, 5, PLAIN)
    assert [type(part) for part in layer.children()] == [nn.Linear, nn.Linear, DenseBilinear, nn.Linear]
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "in1_proj.weight": (3, 9),
        "in2_proj.weight": (3, 7),
        "core.weight": (2, 3, 3),
        "out_proj.weight": (5, 2),
        "out_proj.bias": (5,),
    }


def test_a_rank_near_its_size_stores_only_what_is_beside_an_identity():
    layer = TuckerBilinear(9, 7, 5, RANK)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "in1_proj.weight": (3, 9),
        "in2_proj.index": (7,),
        "in2_proj.rest.weight": (6, 1),
        "core.weight": (4, 3, 6),
        "out_proj.index": (5,),
        "out_proj.rest.weight": (1, 4),
        "out_proj.bias": (5,),
    }
    layer, decomposition = example()
    kept = {int(row) for row in layer.in2_proj.index[:6]}
    matrix = layer.in2_proj.dense(torch.float64)
    assert torch.equal(matrix[:, sorted(kept)], torch.eye(6, dtype=torch.float64))
    assert torch.linalg.matrix_rank(torch.cat([matrix.T, decomposition.factors[2]], dim=1)) == 6  # the same space


@pytest.mark.parametrize("rank", [PLAIN, RANK, (5, 3, 6), (4, 9, 7)], ids=str)
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_the_stored_decomposition_makes_the_same_layer(rank, quantize):
    layer, _ = example(rank, quantize=quantize)
    found = layer.to_decomposition()
    assert found.rank == rank
    assert_matches_reference(found.to_tensor(), layer.to_dense(torch.float64).detach())
    again = TuckerBilinear.from_decomposition(found)
    assert_matches_reference(again.to_dense().detach(), found.to_tensor())
    for name in ("out_proj", "in1_proj", "in2_proj"):
        part = getattr(layer, name)
        assert not isinstance(part, InterpolativeLinear) or torch.equal(part.index, getattr(again, name).index)


def test_it_shares_no_memory_with_its_decomposition():
    layer, decomposition = example()
    before = decomposition.to_tensor()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(decomposition.to_tensor(), before)


@pytest.mark.parametrize(("rank", "core"), [((2, 2, 3), (2, 1, 1)), ((2, 4, 3), (2, 1, 1))])
def test_int8_has_its_scales_in_the_core(rank, core):
    layer, decomposition = example(rank, quantize="int8")
    projections = (layer.in1_proj, layer.in2_proj, layer.out_proj)
    assert all(isinstance(part, QuantizedLinear) for part in projections)
    assert all(part.weight.scale is None and part.sigma is None for part in projections)
    assert tuple(layer.core.weight.scale.shape) == core
    exact = decomposition.to_tensor()
    assert float((layer.to_dense(torch.float64) - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize(
    ("rank", "projections"),
    [
        (PLAIN, 2 * (2 * 5 + 3 * 9 + 3 * 7)),
        (RANK, 2 * (4 * 1 + 3 * 9 + 6 * 1) + 6),  # the kept inputs are added
        ((5, 2, 2), 2 * (2 * 9 + 2 * 7)),
        ((5, 8, 7), 2 * 8 + 8),
    ],
)
def test_flops_are_those_of_the_projections_and_of_the_core(rank, projections):
    layer, _ = example(rank)
    assert layer.flops_per_row == projections + ops.dense_flops(rank)


@pytest.mark.parametrize("rank", [(3, 5, 4), (4, 8, 6), (4, 9, 4), (2, 5, 7)], ids=str)
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_interpolative_layer_is_as_good_as_its_decomposition(rank, quantize, dtype):
    layer, decomposition = example(rank, dtype=dtype, quantize=quantize)
    exact = decomposition.to_tensor().double()
    found = layer.to_dense(torch.float64).detach()
    rounding = 0.02 if quantize else {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 0.02)
    assert float((found - exact).norm() / exact.norm()) < rounding
    assert stored_bytes(layer) == tucker_bytes(rank, (5, 9, 7), dtype.itemsize, quantize) + 5 * dtype.itemsize
    input1, input2 = normal(11, 9, dtype=dtype), normal(11, 7, seed=1, dtype=dtype)
    expected = reference.bilinear_dense(input1.double(), input2.double(), found, layer.bias.double())
    assert_matches_reference(layer(input1, input2).detach(), expected.detach())


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_cast_of_everything_leaves_the_index(quantize):
    layer, _ = example(dtype=torch.float32, quantize=quantize)
    exact = layer.to_dense(torch.float64)
    net = nn.Sequential(layer).type(torch.float64)
    assert net[0].in2_proj.index.dtype == torch.int32
    torch.testing.assert_close(net[0].to_dense(torch.float64), exact)


def test_an_interpolative_layer_has_the_gradients_of_the_dense_weight():
    layer, _ = example((4, 8, 6))
    input1, input2 = normal(11, 9).requires_grad_(), normal(11, 7, seed=1).requires_grad_()
    wanted = [input1, input2, *layer.parameters()]
    gradients = torch.autograd.grad(layer(input1, input2).square().sum(), wanted)
    dense = reference.bilinear_dense(input1, input2, layer.to_dense(), layer.bias)
    for found, expected in zip(gradients, torch.autograd.grad(dense.square().sum(), wanted), strict=True):
        assert_matches_reference(found, expected)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ((6, 1, 1), r"`rank\[0\]` should be at most 5, out_features of the layer. Found 6."),
        ((1, 10, 1), r"`rank\[1\]` should be at most 9, in1_features of the layer. Found 10."),
        ((1, 1, 0), r"`rank\[2\]` should be a positive int. Found 0."),
        (3, "triple"),
    ],
)
def test_a_bad_rank_is_an_error(rank, message):
    with pytest.raises(ConfigError, match=message):
        TuckerBilinear(9, 7, 5, rank)
