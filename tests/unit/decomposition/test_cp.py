import itertools
import math
import warnings

import numpy
import pytest
import tensorly
import torch
from support import DTYPES, ROUNDING, TOLERANCES, low_rank

from compress_bilinear import AmplificationWarning, MaxError, MaxSize
from compress_bilinear.decomposition import _als, cp, cp_bytes, rounded
from compress_bilinear.decomposition import _budget as _clock
from compress_bilinear.errors import CompressionError, ConfigError, InfeasibleError

pytestmark = pytest.mark.filterwarnings("ignore::compress_bilinear.AmplificationWarning")

NOISY = low_rank((10, 13, 9), 4, noise=0.3)
FULL = low_rank((8, 12, 11), 400)  # no structure


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


@pytest.mark.parametrize(
    ("shape", "rank", "dtype"),
    [((10, 13, 9), 3, dtype) for dtype in DTYPES]
    + [((1, 8, 6), 3, torch.float32), ((7, 1, 6), 3, torch.float64), ((7, 6, 1), 2, torch.bfloat16)]
    + [((1, 9, 1), 1, torch.float16), ((2, 12, 3), 5, torch.float32)],
)
def test_a_weight_of_that_rank_is_recovered(shape, rank, dtype):
    found = cp(low_rank(shape, rank).to(dtype), rank)
    assert {factor.dtype for factor in found.factors} == {dtype}
    assert found.weights.dtype == torch.promote_types(dtype, torch.float32)
    assert (found.rank, found.shape) == (rank, shape)
    assert found.error <= max(ROUNDING[dtype], 1e-5)


@pytest.mark.parametrize("weight", [NOISY, FULL], ids=["noisy", "full"])
@pytest.mark.parametrize("rank", [4, 20])
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


@pytest.mark.parametrize(
    ("weight", "limit"),
    [(NOISY, 0.9), (NOISY, 0.31), (FULL, 0.5), (NOISY.float(), 0.5)],
    ids=["high", "noise", "full", "float32"],
)
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


@pytest.mark.parametrize("seed", range(2))
def test_matrices_2_by_2_do_not_multiply_in_6_products(seed):
    assert cp(matrix_multiplication(2, 2, 2), 6, seed=seed).error == pytest.approx(1 / math.sqrt(8), rel=1e-3)


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


def collinear(seed, shape=(32, 64, 64), rank=24, cosine=0.9):
    """An exact CP whose columns have this cosine with each other, in every factor."""
    generator = torch.Generator().manual_seed(seed)
    gram = torch.full((rank, rank), cosine, dtype=torch.float64).fill_diagonal_(1.0)
    draws = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape)
    factors = [torch.linalg.qr(draw)[0] @ torch.linalg.cholesky(gram).T for draw in draws]
    return torch.einsum("or,ir,jr->oij", *factors)


@pytest.mark.parametrize(("seed", "dtype"), [(0, torch.float64), (1, torch.float32)])
def test_collinear_components_are_found(seed, dtype):
    assert cp(collinear(seed).to(dtype), 24, seed=seed).error < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_matrices_2_by_2_multiply_in_7_products(seed):
    assert cp(matrix_multiplication(2, 2, 2), 7, seed=seed).error < 1e-6


def test_an_exact_float16_weight_is_as_close_as_its_rounding():
    found = cp(low_rank((40, 50, 45), 6).half(), 6)
    assert found.error < 2e-3


@pytest.mark.parametrize(
    ("weight", "rank"),
    [
        (NOISY, 4),
        (NOISY.float(), MaxError(0.7)),
        (low_rank((50, 45, 40), 60), 45),
        (low_rank((50, 45, 40), 60).float(), MaxSize(0.2)),
    ],
    ids=["small", "small float32", "large", "large float32"],
)
def test_the_weight_is_not_written_to(weight, rank):
    before = weight.clone()
    cp(weight, rank, max_seconds=0.5)
    assert torch.equal(weight, before)


def test_a_large_weight_in_float32_is_as_good_as_in_float64():
    weight = low_rank((60, 50, 40), 200)
    wide, narrow = cp(weight, 30), cp(weight.float(), 30)
    assert narrow.error == pytest.approx(wide.error, rel=2e-3)


def test_the_error_falls_with_the_rank_above_the_modes_sizes():
    weight = low_rank((16, 16, 16), 300)
    errors = [cp(weight, rank).error for rank in (8, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.slow
def test_threads_change_rounding_only():
    weight, threads = low_rank((60, 50, 40), 200).float(), torch.get_num_threads()
    errors = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            errors.append(cp(weight, 20, seed=1).error)
    finally:
        torch.set_num_threads(threads)
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


class TestTimeLimit:
    WEIGHT = low_rank((60, 50, 40), 200).float()

    def test_the_shortest_gives_a_result_and_more_time_a_better_one(self):
        least, longest = cp(self.WEIGHT, 30, max_seconds=1e-9), cp(self.WEIGHT, 30)
        assert longest.error < least.error < 1

    def test_sweeps_end_with_it(self, monkeypatch):
        # a clock that a sweep moves on by a second
        now, sweep = [0.0], _als.Sweeper.sweep
        monkeypatch.setattr(_clock.time, "perf_counter", lambda: now[0])

        def slow(self, *args):
            now[0] += 1
            return sweep(self, *args)

        monkeypatch.setattr(_als.Sweeper, "sweep", slow)
        cp(self.WEIGHT, 30, max_seconds=20)
        assert 15 <= now[0] <= 20

    def test_an_error_that_is_not_met_in_time_is_infeasible(self):
        with pytest.raises(InfeasibleError, match=r"within 1e-09 s; the lowest was 0\.\d+, at rank \d+"):
            cp(self.WEIGHT, MaxError(0.05), max_seconds=1e-9)

    @pytest.mark.parametrize("value", [0, -1.0, "soon", math.nan])
    def test_it_is_a_positive_number(self, value):
        with pytest.raises(ConfigError, match="`max_seconds` should be a positive number or None"):
            cp(NOISY, 3, max_seconds=value)


class TestProgress:
    @pytest.mark.parametrize("rank", [5, MaxError(0.5), MaxSize(0.3)], ids=repr)
    def test_it_never_goes_back_and_ends_near_the_error(self, rank):
        seen = []
        weight = NOISY if isinstance(rank, MaxError) else FULL
        found = cp(weight, rank, progress=lambda done, error: seen.append((done, error)))
        assert len(seen) > 3
        for now, later in itertools.pairwise(seen):
            assert 0 <= now[0] <= later[0] <= 1
            assert now[1] >= later[1]
        # a search also passes by ranks above the one it ends at
        assert seen[-1][1] <= 1.05 * found.error

    def test_what_it_raises_ends_the_solve(self):
        def stop(done, error):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cp(FULL, 5, progress=stop)


@pytest.mark.parametrize("rank", [64, 1000])
def test_a_rank_above_the_product_bound_is_an_error(rank):
    with pytest.raises(ConfigError, match=f"at most 63, the least product of two of the sizes .* Found {rank}"):
        cp(low_rank((9, 11, 7), 3), rank)


@pytest.mark.parametrize("axis", range(3))
def test_a_slice_a_million_times_the_others_is_no_obstacle(axis):
    weight = low_rank((9, 11, 7), 50)
    weight.select(axis, 2).mul_(1e6)
    bound = torch.linalg.svdvals(weight.select(axis, 2))  # the slice is a matrix; CP of rank 5 can take 5 of its ranks
    assert cp(weight, 5).error <= 1.01 * float(bound[5:].norm() / bound.norm())


def test_an_unamplified_result_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cp(low_rank((10, 13, 9), 3), 3).amplification < 3


def test_the_penalty_is_what_rounding_to_the_format_is_expected_to_add():
    # factors of k^-1/2 spectra cancel where nothing speaks against it
    weight = torch.randn(12, 16, 14, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for mode, size in enumerate(weight.shape):
        weight = weight * torch.arange(1, size + 1).rsqrt().view([-1 if axis == mode else 1 for axis in range(3)])
    plain, int8, nf4 = (cp(weight, 20, quantize=quantize) for quantize in (None, "int8", "nf4"))
    assert all(torch.equal(one, other) for one, other in zip(plain.factors, int8.factors, strict=True))
    assert nf4.amplification < plain.amplification
    assert plain.error < nf4.error < 1.3 * plain.error
    lost = [rounded(found, weight, "nf4").relative_error(weight) for found in (nf4, plain)]
    assert lost[0] < lost[1]


@pytest.mark.parametrize(
    ("shape", "dtype", "scale"), [((6, 5, 7), torch.float64, 1e-310), ((50, 45, 40), torch.float32, 1e-41)]
)
def test_subnormal_weights_have_a_finite_error(shape, dtype, scale):
    assert math.isfinite(cp((low_rank(shape, 2) * scale).to(dtype), 2).error)


def test_a_default_device_does_not_matter():
    weight = low_rank((6, 7, 8), 30)
    expected = cp(weight, 3).error
    with torch.device("meta"):
        assert cp(weight, 3).error == pytest.approx(expected)


def test_autocast_does_not_matter():
    weight = low_rank((50, 45, 40), 5, noise=0.01).float()
    expected = cp(weight, 5).error
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cp(weight, 5).error == pytest.approx(expected, rel=1e-3)


def test_more_time_is_never_much_worse_for_an_exact_weight():
    assert cp(low_rank((60, 70, 80), 10).float(), 10, max_seconds=20).error < 1e-5


def test_an_exact_cp_is_found_for_every_format():
    weight = low_rank((9, 8, 7), 3)
    assert cp(weight, 3, quantize="nf4").error < 1e-7


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_with_components_to_spare_sweeps_find_an_exact_one(quantize):
    weight = low_rank((16, 16, 16), 20).float()
    found = cp(weight, 40, quantize=quantize)
    assert found.relative_error(weight) < (1e-6 if quantize is None else 1e-4)
