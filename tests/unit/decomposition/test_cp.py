import math
import warnings

import numpy
import pytest
import tensorly
import torch
from support import DTYPES, TOLERANCES, low_rank

from compress_bilinear import AmplificationWarning, MaxError, MaxSize
from compress_bilinear.decomposition import cp, cp_bytes
from compress_bilinear.errors import CompressionError, ConfigError, InfeasibleError

pytestmark = pytest.mark.filterwarnings("ignore::compress_bilinear.AmplificationWarning")

NOISY = low_rank((10, 13, 9), 4, noise=0.3)
FULL = low_rank((8, 12, 11), 400)  # no structure
BASE_ERRORS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def matrix_multiplication(rows, inner, columns):
    """vec(XY) as a bilinear map of vec(X) and vec(Y)."""
    weight = torch.zeros(rows * columns, rows * inner, inner * columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(inner):
            for k in range(columns):
                weight[i * columns + k, i * inner + j, j * columns + k] = 1
    return weight


def complex_product():
    weight = torch.zeros(2, 2, 2, dtype=torch.float64)
    weight[0, 0, 0] = weight[1, 0, 1] = weight[1, 1, 0] = 1
    weight[0, 1, 1] = -1
    return weight


def border_rank_2():
    """aab + aba + baa: of rank 3, and the limit of tensors of rank 2 whose components diverge."""
    weight = torch.zeros(2, 2, 2, dtype=torch.float64)
    weight[0, 0, 1] = weight[0, 1, 0] = weight[1, 0, 0] = 1
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((10, 13, 9), 3), ((1, 8, 6), 3), ((7, 1, 6), 3), ((7, 6, 1), 2), ((1, 9, 1), 1), ((2, 12, 3), 5)],
)
def test_a_weight_of_that_rank_is_recovered(shape, rank, dtype):
    found = cp(low_rank(shape, rank).to(dtype), rank)
    assert {factor.dtype for factor in found.factors} == {dtype}
    assert found.weights.dtype == torch.promote_types(dtype, torch.float32)
    assert (found.rank, found.shape) == (rank, shape)
    assert found.error <= BASE_ERRORS[dtype]


@pytest.mark.parametrize("weight", [NOISY, FULL], ids=["noisy", "full"])
@pytest.mark.parametrize("rank", [1, 4, 9, 20])
def test_the_error_is_at_most_tensorlys(weight, rank):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = tensorly.decomposition.parafac(weight.numpy(), rank, n_iter_max=200, init="random", random_state=0)
    error = numpy.linalg.norm(tensorly.cp_to_tensor(theirs) - weight.numpy()) / float(weight.norm())
    assert cp(weight, rank).error <= 1.01 * error


@pytest.mark.parametrize("shape", [(1, 8, 6), (8, 1, 6), (8, 6, 1)])
def test_a_matrix_is_cut_as_by_its_svd(shape):
    weight = low_rank(shape, 40)
    values = torch.linalg.svdvals(weight.squeeze())
    assert cp(weight, 2).error == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-9)


@pytest.mark.parametrize(("shape", "rank"), [((1, 5, 8), 5), ((3, 4, 5), 7), ((3, 4, 5), 12), ((1, 1, 1), 1)])
def test_a_rank_up_to_the_product_bound_is_fine(shape, rank):
    found = cp(low_rank(shape, 2), rank)
    assert found.rank == rank
    assert found.error <= 1e-5


def test_components_have_unit_columns_and_descend_by_weight():
    found = cp(NOISY, 5)
    for factor in found.factors:
        torch.testing.assert_close(factor.norm(dim=0), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-14)
    assert bool((found.weights.diff() <= 0).all())


@pytest.mark.parametrize("limit", [0.9, 0.5, 0.31])
@pytest.mark.parametrize("weight", [NOISY, FULL, NOISY.float()], ids=["noisy", "full", "float32"])
def test_a_max_error_is_met_by_fewer_bytes_than_the_weights(weight, limit):
    found = cp(weight, MaxError(limit))
    assert found.error <= limit
    assert cp_bytes(found.rank, weight.shape, weight.element_size(), None) < weight.numel() * weight.element_size()


def test_a_max_error_finds_the_rank_of_an_exact_weight():
    found = cp(low_rank((10, 13, 9), 5), MaxError(1e-3))
    assert found.rank == 5
    assert found.error <= 1e-3


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("fraction", [0.1, 0.35, 0.6])
def test_a_max_size_is_used_up_but_for_less_than_a_component(fraction, quantize):
    weight = FULL.float()
    budget = fraction * weight.numel() * 4
    rank = cp(weight, MaxSize(fraction), quantize=quantize).rank
    assert cp_bytes(rank, weight.shape, 4, quantize) <= budget < cp_bytes(rank + 1, weight.shape, 4, quantize)


def test_targets_out_of_reach_are_infeasible():
    with pytest.raises(InfeasibleError, match=r"Rank 1 stores 256 bytes. .* 9360 bytes allows 93."):
        cp(NOISY, MaxSize(0.01))
    with pytest.raises(InfeasibleError, match="CP rank above"):
        cp(low_rank((4, 5, 6), 100), MaxError(0.01))
    with pytest.raises(InfeasibleError, match="CP rank of at least 5"):
        cp(low_rank((1, 5, 6), 100), MaxError(1e-3))


@pytest.mark.parametrize("rank", [3, MaxError(0.1), MaxSize(0.5)], ids=repr)
@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 6, 7)])
def test_a_zero_weight_gives_zeros(shape, rank):
    found = cp(torch.zeros(shape), rank)
    assert found.error == 0
    assert not bool(found.to_tensor().any())


def test_zero_slices_stay_finite():
    weight = NOISY.clone()
    weight[2] = weight[:, 5] = 0
    found = cp(weight, 12)
    assert math.isfinite(found.error)
    assert bool(torch.isfinite(found.to_tensor()).all())


@pytest.mark.parametrize(
    ("weight", "rank", "error", "message"),
    [
        (NOISY, 0, ConfigError, "`rank` should be a positive int. Found 0."),
        (NOISY, 2.0, ConfigError, "`rank` should be a positive int. Found 2.0."),
        (NOISY, (1, 2, 3), ConfigError, r"`rank` should be a positive int. Found \(1, 2, 3\)."),
        (NOISY / 0, 1, CompressionError, "finite. Found NaN or infinity."),
        (NOISY[0], 1, CompressionError, r"shape \(O, I, J\). Found \(13, 9\)."),
    ],
    ids=["zero", "float", "triple", "nan", "matrix"],
)
def test_what_cannot_be_decomposed_is_an_error(weight, rank, error, message):
    with pytest.raises(error, match=message):
        cp(weight, rank)


def test_another_storage_format_is_an_error():
    with pytest.raises(ConfigError, match="Found 'int4'"):
        cp(NOISY, 1, quantize="int4")


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, s) for s in (1e-200, 1e-100, 1e100, 1e200)] + [(torch.float32, s) for s in (1e-30, 1e30)],
)
def test_the_scale_of_the_weight_does_not_matter(dtype, scale):
    weight = low_rank((6, 5, 7), 2, noise=0.2)
    base, found = cp(weight, 3), cp((weight * scale).to(dtype), 3)
    assert found.error == pytest.approx(base.error, rel=1e-3)
    assert found.amplification == pytest.approx(base.amplification, rel=1e-2)
    largest = float(weight.abs().max()) * scale
    difference = found.to_tensor().double() / largest - base.to_tensor() / float(weight.abs().max())
    assert float(difference.abs().max()) <= max(TOLERANCES[dtype], 1e-4)


def test_a_seed_gives_the_same_result_whatever_the_global_generator_and_another_seed_another():
    weight = low_rank((5, 6, 4), 30)
    torch.manual_seed(1)
    first = cp(weight, 6, seed=3)
    torch.manual_seed(2)
    second = cp(torch.nn.Parameter(weight), 6, seed=3)
    for part, same in zip((first.weights, *first.factors), (second.weights, *second.factors), strict=True):
        assert not same.requires_grad
        assert torch.equal(part, same)
    assert not torch.equal(first.factors[0], cp(weight, 6, seed=4).factors[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_that_of_what_is_returned(dtype):
    weight = NOISY.to(dtype)
    found = cp(weight, 6)
    exact = torch.einsum("r,or,ir,jr->oij", found.weights.double(), *(factor.double() for factor in found.factors))
    assert found.error == pytest.approx(float((weight.double() - exact).norm() / weight.double().norm()), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_matrices_2_by_2_multiply_in_7_products_and_not_in_6(seed):
    weight = matrix_multiplication(2, 2, 2)
    assert cp(weight, 7, seed=seed).error < 1e-5
    assert cp(weight, 6, seed=seed).error == pytest.approx(1 / math.sqrt(8), rel=1e-3)


def test_matrices_2_by_2_by_3_multiply_in_11_products():
    assert cp(matrix_multiplication(2, 2, 3), 11).error < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_complex_numbers_multiply_in_3_products_and_not_in_2(seed):
    assert cp(complex_product(), 3, seed=seed).error < 1e-5
    assert cp(complex_product(), 2, seed=seed).error > 0.4


def test_a_weight_without_a_best_approximation_stays_finite():
    found = cp(border_rank_2(), 2)
    assert bool(torch.isfinite(found.to_tensor()).all())
    assert found.error < 0.1
    assert found.amplification < 100
    assert cp(border_rank_2(), 3).error < 1e-5


@pytest.mark.parametrize(("weight", "rank"), [(border_rank_2(), 2), (complex_product(), 2)], ids=["border", "complex"])
def test_components_that_cancel_are_warned_of(weight, rank):
    with pytest.warns(AmplificationWarning, match=f"components of rank {rank} cancel: amplification"):
        found = cp(weight, rank)
    assert found.amplification > 3
