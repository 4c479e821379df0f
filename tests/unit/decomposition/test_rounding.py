"""The quantization-aware finish: its result is what a layer stores, and never worse than rounding one by one."""

import math

import pytest
import torch
from support import low_rank

import compress_bilinear as cb
from compress_bilinear.decomposition import CPDecomposition, TuckerDecomposition, cp, distance, rounded, tucker
from compress_bilinear.decomposition._stored import stored_columns, unit_columns
from compress_bilinear.measure import weight_error

SHAPE = (37, 63, 29)
WEIGHT = low_rank(SHAPE, 12, noise=0.3).float()
CP, TUCKER = cp(WEIGHT, 16), tucker(WEIGHT, (12, 14, 13))


def layer_of(decomposition, quantize):
    kind = cb.CPBilinear if isinstance(decomposition, CPDecomposition) else cb.TuckerBilinear
    return kind.from_decomposition(decomposition, quantize=quantize)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("found", [CP, TUCKER], ids=["cp", "tucker"])
class TestRounded:
    def test_a_layer_stores_these_very_values(self, found, quantize):
        result = rounded(found, WEIGHT, quantize)
        assert type(result) is type(found)
        assert result.rank == found.rank
        layer = layer_of(result, quantize)
        assert result.error == pytest.approx(weight_error(WEIGHT, layer), rel=1e-6)
        again = rounded(result, result.to_tensor(), quantize)
        assert again.error < 1e-6  # what is rounded already is kept

    def test_it_loses_less_than_rounding_one_by_one(self, found, quantize):
        plain, fitted = (layer_of(d, quantize) for d in (found, rounded(found, WEIGHT, quantize)))
        lost = [weight_error(WEIGHT, layer) ** 2 - found.error**2 for layer in (plain, fitted)]
        assert lost[1] < (0.9 if quantize == "nf4" else 0.97) * lost[0]
        if quantize == "int8":
            assert weight_error(WEIGHT, fitted) <= math.hypot(found.error, 0.015)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_the_dtype_is_wide_enough_for_what_is_stored(self, found, quantize, dtype):
        parts = {name: value for name, value in vars(found).items() if name != "error"}
        narrow = type(found)(
            **{
                name: value.to(dtype) if isinstance(value, torch.Tensor) else tuple(f.to(dtype) for f in value)
                for name, value in parts.items()
            }
        )
        result = rounded(narrow, WEIGHT.to(dtype), quantize)
        assert result.factors[0].dtype == torch.promote_types(dtype, torch.float32)
        assert result.error == pytest.approx(weight_error(WEIGHT.to(dtype), layer_of(result, quantize)), rel=1e-5)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_the_weight_s_scale_does_not_matter(self, found, quantize, scale):
        head = "weights" if isinstance(found, CPDecomposition) else "core"
        moved = type(found)(**{head: getattr(found, head) * scale, "factors": found.factors})
        result = rounded(moved, WEIGHT * scale, quantize)
        assert result.error == pytest.approx(rounded(found, WEIGHT, quantize).error, rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 9, 8), (7, 1, 5), (6, 5, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_dimensions_of_size_1(shape, quantize):
    weight = normal(*shape)
    for found in (cp(weight, 1), tucker(weight, (1, 1, 1))):
        result = rounded(found, weight, quantize)
        assert result.error <= weight_error(weight, layer_of(found, quantize)) + 1e-9


@pytest.mark.parametrize("rank", [(37, 14, 13), (12, 63, 29), (30, 14, 13), (36, 50, 25)], ids=str)
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_absorbed_and_interpolative_modes(rank, quantize):
    found = tucker(WEIGHT, rank)
    layer = layer_of(rounded(found, WEIGHT, quantize), quantize)
    plain = layer_of(found, quantize)
    assert weight_error(WEIGHT, layer) <= 1.02 * weight_error(WEIGHT, plain)


def test_without_a_format_it_is_the_decomposition_itself():
    assert rounded(CP, WEIGHT, None) is CP


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("mode", [0, 1])
def test_fed_back_errors_of_components_that_cancel_cancel_too(mode, quantize):
    factor = normal(40, 12)
    common = normal(30, 1, seed=1)
    others = common + 0.2 * normal(30, 12, seed=2)  # nearly parallel: what one component loses another can make up for
    gram = others.T @ others
    plain, scale = stored_columns(factor, mode, quantize)
    fed, same = stored_columns(factor, mode, quantize, gram)
    assert torch.equal(scale, same)
    lost = [float(((stored * scale - factor) @ others.T).norm()) for stored in (plain, fed)]
    assert lost[1] < 0.5 * lost[0]
    again, _ = stored_columns(fed, mode, quantize)
    assert torch.equal(again, fed)  # still values of the format, and of these scales


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_zero_components_stay_zero(quantize):
    out, in1, in2 = (factor.clone() for factor in CP.factors)
    out[:, 3] = in1[:, 3] = in2[:, 3] = 0
    result = rounded(CPDecomposition(CP.weights, (out, in1, in2)), WEIGHT, quantize)
    assert math.isfinite(result.error)
    zero = rounded(CPDecomposition(0 * CP.weights, CP.factors), 0 * WEIGHT, quantize)
    assert not bool(zero.to_tensor().any())


def test_unit_columns_are_those_of_int8_and_stay_as_they_are():
    unit, scale = unit_columns(normal(9, 5))
    torch.testing.assert_close(unit.abs().amax(0), torch.full((5,), 127 / 128, dtype=torch.float64), rtol=1e-15, atol=0)
    torch.testing.assert_close(unit * scale, normal(9, 5), rtol=1e-14, atol=0)
    torch.testing.assert_close(unit_columns(unit)[1], torch.ones(5, dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_distance_of_two_approximations_is_relative_to_the_weight():
    found = distance(WEIGHT, TUCKER, lambda rows: WEIGHT[rows])
    assert found == pytest.approx(TUCKER.error, rel=1e-6)
    assert distance(WEIGHT, CP, lambda rows: CP.to_tensor()[rows]) < 1e-6
    assert isinstance(TUCKER, TuckerDecomposition)
