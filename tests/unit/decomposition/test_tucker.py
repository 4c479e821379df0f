import itertools
import math

import numpy
import pytest
import tensorly
import torch
from support import DTYPES, ROUNDING, TOLERANCES, low_rank

from compress_bilinear import MaxError, MaxSize
from compress_bilinear.decomposition import cp, ordered, tucker, tucker_bytes, tucker_parameters
from compress_bilinear.errors import CompressionError, ConfigError, InfeasibleError

NOISY = low_rank((10, 13, 9), 4, noise=0.3)
FULL = low_rank((8, 12, 11), 400)  # no structure


def hilbert(size):
    ones = torch.arange(1, size + 1, dtype=torch.float64)
    return 1 / (ones[:, None, None] + ones[:, None] + ones - 2)


def hosvd_errors(weight):
    """The error of keeping each leading block of the full HOSVD core, by singular value decompositions."""
    core = weight.numpy()
    for mode in range(3):
        flat = numpy.moveaxis(weight.numpy(), mode, 0).reshape(weight.shape[mode], -1)
        left = numpy.linalg.svd(flat, full_matrices=False)[0]
        core = numpy.moveaxis(numpy.tensordot(core, left, (mode, 0)), -1, mode)
    kept = (core**2).cumsum(0).cumsum(1).cumsum(2)
    ranks = itertools.product(*(range(size) for size in weight.shape))
    return {(a + 1, b + 1, c + 1): math.sqrt(max(0, 1 - kept[a, b, c] / kept[-1, -1, -1])) for a, b, c in ranks}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        ((10, 13, 9), (3, 3, 3)),
        ((1, 8, 6), (1, 3, 3)),
        ((7, 1, 6), (3, 1, 3)),
        ((7, 6, 1), (2, 2, 1)),
        ((1, 1, 1), (1, 1, 1)),
    ],
)
def test_a_weight_of_that_rank_is_recovered(shape, rank, dtype):
    found = tucker(low_rank(shape, max(rank)).to(dtype), rank)
    assert {part.dtype for part in (found.core, *found.factors)} == {dtype}
    assert (found.rank, found.shape) == (rank, shape)
    assert found.error <= ROUNDING[dtype]


@pytest.mark.parametrize("weight", [NOISY, FULL], ids=["noisy", "full"])
@pytest.mark.parametrize("rank", [(1, 1, 1), (4, 4, 4), (2, 9, 5), (8, 3, 9), (8, 12, 9)])
def test_the_error_is_at_most_tensorlys(weight, rank):
    theirs = tensorly.decomposition.tucker(weight.numpy(), rank, n_iter_max=100, tol=1e-8)
    error = numpy.linalg.norm(tensorly.tucker_to_tensor(theirs) - weight.numpy()) / float(weight.norm())
    assert tucker(weight, rank).error <= 1.001 * error


def test_the_full_rank_is_exact():
    assert tucker(FULL, tuple(FULL.shape)).error <= 1e-14


def test_the_factors_have_orthonormal_columns():
    for factor in tucker(NOISY, (3, 5, 4)).factors:
        torch.testing.assert_close(
            factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64), rtol=0, atol=1e-13
        )


@pytest.mark.parametrize("limit", [0.9, 0.5, 0.3, 0.1, 0.01])
@pytest.mark.parametrize("weight", [NOISY, FULL, NOISY.float()], ids=["noisy", "full", "float32"])
def test_a_max_error_is_met_in_the_fewest_bytes_of_a_truncated_hosvd(weight, limit):
    found = tucker(weight, MaxError(limit))
    assert found.error <= limit
    bytes_found = tucker_bytes(found.rank, weight.shape, 8, None)
    enough = [rank for rank, error in hosvd_errors(weight.double()).items() if error <= limit - 1e-7]
    assert bytes_found <= min(tucker_bytes(rank, weight.shape, 8, None) for rank in enough)


@pytest.mark.parametrize("limit", [1e-3, 1e-6, 1e-9, 1e-12])
def test_a_tiny_max_error_is_met(limit):
    found = tucker(hilbert(16), MaxError(limit))
    assert found.error <= limit


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.7])
def test_a_max_size_is_met_in_bytes_and_the_best_within_it(fraction, quantize):
    weight = FULL.float()
    budget = fraction * weight.numel() * 4
    found = tucker(weight, MaxSize(fraction), quantize=quantize)
    assert tucker_bytes(found.rank, weight.shape, 4, quantize) <= budget
    errors = hosvd_errors(FULL)
    fitting = [r for r in errors if tucker_bytes(r, weight.shape, 4, quantize) <= budget]
    assert found.error <= min(errors[rank] for rank in fitting) + 1e-7


def test_a_max_size_is_nearly_used_up():
    weight = low_rank((16, 24, 20), 600)
    found = tucker(weight, MaxSize(0.4))
    assert tucker_bytes(found.rank, weight.shape, 8, None) > 0.97 * 0.4 * weight.numel() * 8


def test_int8_fits_a_larger_rank_into_the_same_bytes():
    weight = FULL.float()
    assert tucker(weight, MaxSize(0.3), quantize="int8").error < 0.9 * tucker(weight, MaxSize(0.3)).error


def test_a_size_too_small_for_rank_1_is_infeasible():
    with pytest.raises(InfeasibleError, match=r"Rank \(1, 1, 9\) stores 256 bytes. .* 9360 bytes allows 93."):
        tucker(NOISY, MaxSize(0.01))


@pytest.mark.parametrize("rank", [(2, 2, 2), MaxError(0.1), MaxSize(0.5)], ids=repr)
def test_a_zero_weight_gives_zeros(rank):
    found = tucker(torch.zeros(5, 6, 7), rank)
    assert found.error == 0
    assert not bool(found.to_tensor().any())


@pytest.mark.parametrize(
    ("weight", "rank", "error", "message"),
    [
        (NOISY, (11, 1, 1), ConfigError, r"`rank\[0\]` should be at most 10, out_features of the weight. Found 11."),
        (NOISY, (1, 0, 1), ConfigError, r"`rank\[1\]` should be a positive int. Found 0."),
        (NOISY, 3, ConfigError, "triple .* Found 3."),
        (NOISY / 0, (1, 1, 1), CompressionError, "finite. Found NaN or infinity."),
        (NOISY[0], (1, 1, 1), CompressionError, r"shape \(O, I, J\). Found \(13, 9\)."),
    ],
    ids=["large", "zero", "int", "nan", "matrix"],
)
def test_what_cannot_be_decomposed_is_an_error(weight, rank, error, message):
    with pytest.raises(error, match=message):
        tucker(weight, rank)


def test_another_storage_format_is_an_error():
    with pytest.raises(ConfigError, match="Found 'int4'"):
        tucker(NOISY, (1, 1, 1), quantize="int4")


SCALES = [(torch.float64, s) for s in (1e-200, 1e-100, 1e100, 1e200)] + [(torch.float32, s) for s in (1e-30, 1e30)]


@pytest.mark.parametrize("rank", [(3, 4, 5), MaxError(0.3)], ids=repr)
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_the_scale_of_the_weight_does_not_matter(dtype, scale, rank):
    base = tucker(NOISY, rank)
    found = tucker((NOISY * scale).to(dtype), rank)
    assert found.rank == base.rank
    expected = scale * base.to_tensor()
    largest = float(expected.abs().max())
    torch.testing.assert_close(found.to_tensor().double() / largest, expected / largest, rtol=0, atol=TOLERANCES[dtype])
    assert found.error == pytest.approx(base.error, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_that_of_what_is_returned(dtype):
    weight = NOISY.to(dtype)
    found = tucker(weight, (5, 6, 4))
    exact = torch.einsum("abc,oa,ib,jc->oij", found.core.double(), *(factor.double() for factor in found.factors))
    assert found.error == pytest.approx(float((weight.double() - exact).norm() / weight.double().norm()), rel=1e-9)


def test_the_same_weight_gives_the_same_result_in_any_layout_and_leaves_it_as_it_was():
    weight = torch.nn.Parameter(NOISY.clone())
    found, again = tucker(weight, (3, 4, 5)), tucker(NOISY.permute(2, 0, 1).contiguous().permute(1, 2, 0), (3, 4, 5))
    assert torch.equal(weight.detach(), NOISY)
    for part, same in zip((found.core, *found.factors), (again.core, *again.factors), strict=True):
        assert not part.requires_grad
        assert torch.equal(part, same)


def test_a_weight_whose_singular_values_decay_fast_keeps_its_small_ones():
    # float32 Grams would stop at 1e-4
    assert tucker(hilbert(30), (10, 10, 10)).error < 1e-8


def test_float32_weights_are_solved_beyond_what_float32_grams_see():
    weight = hilbert(60).float()
    # singular values from the fifth on are below 1e-4 of the largest
    assert tucker(weight, (7, 7, 7)).error < 1.5 * tucker(weight.double(), (7, 7, 7)).error < 1e-4


@pytest.mark.parametrize("method", [tucker, cp])
def test_low_precision_products_are_off_while_solving_and_on_again_after(method):
    weight, found = low_rank((9, 10, 11), 5, noise=0.3), []
    torch.set_float32_matmul_precision("medium")
    try:
        method(weight, 3 if method is cp else (3, 3, 3), progress=lambda *_: found.append(precision()))
        assert set(found) == {"highest"}
        assert precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def precision():
    return torch.get_float32_matmul_precision()


def test_the_hilbert_tensor_reaches_1e_8_at_the_smallest_ranks_that_permit_it():
    weight = hilbert(60)
    values = torch.linalg.svdvals(weight.flatten(1))
    least = next(r for r in range(1, 60) if float(values[r:].norm() / values.norm()) <= 1e-8)
    assert tucker(weight, (least, least, least)).error <= 1e-8
    found = tucker(weight, MaxError(1e-8))
    assert found.rank == (least, least, least)
    assert found.error <= 1e-8


def test_ranks_beyond_what_grams_see_still_lower_the_error():
    errors = [tucker(hilbert(40), (r, r, r)).error for r in (11, 12, 13)]
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 0.3 * errors[1] < 1e-9


@pytest.mark.parametrize("shape", [(1, 8, 9), (8, 1, 9), (8, 9, 1), (1, 1, 6), (1, 1, 1)])
def test_a_mode_of_size_1_is_absorbed(shape):
    weight = low_rank(shape, 30)
    rank = tuple(max(1, size // 2) for size in shape)
    found = tucker(weight, rank)
    for size, factor in zip(shape, found.factors, strict=True):
        assert size > 1 or torch.equal(factor, torch.ones(1, 1, dtype=torch.float64))
    if shape == (1, 8, 9):
        values = torch.linalg.svdvals(weight[0])
        assert found.error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-9)


@pytest.mark.parametrize("rank", [(10, 4, 3), (3, 13, 3), (3, 4, 9), (10, 13, 3), (10, 13, 9)], ids=str)
def test_a_full_rank_has_the_identity_for_its_factor(rank):
    found = tucker(NOISY, rank)
    for r, size, factor in zip(rank, NOISY.shape, found.factors, strict=True):
        assert torch.equal(factor, torch.eye(size, dtype=torch.float64)) == (r == size)
        torch.testing.assert_close(factor.T @ factor, torch.eye(r, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_weight_that_is_a_tensor_train_becomes_one():
    # G1 (O, 2), G2 (2, I, 3), G3 (3, J): in1 is at full rank, and its factor would be all cost
    generator = torch.Generator().manual_seed(0)
    cores = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((20, 2), (2, 6, 3), (3, 25))]
    found = tucker(torch.einsum("oa,aib,bj->oij", *cores), MaxError(1e-6))
    assert found.rank == (2, 6, 3)
    assert torch.equal(found.factors[1], torch.eye(6, dtype=torch.float64))


def st_hosvd(weight, error):
    """Parameters of the sequentially truncated HOSVD that gives each mode a third of the squared error."""
    rest, allowed, ranks = weight, error**2 / 3 * float(weight.square().sum()), []
    for mode in range(3):
        left, values, _ = torch.linalg.svd(rest.movedim(mode, 0).flatten(1), full_matrices=False)
        tails = values.square().flip(0).cumsum(0).flip(0)
        ranks.append(max(1, int((tails > allowed).sum())))
        rest = torch.tensordot(rest, left[:, : ranks[-1]], dims=([mode], [0])).movedim(-1, mode)
    return ranks[0] * ranks[1] * ranks[2] + sum(r * d for r, d in zip(ranks, weight.shape, strict=True))


@pytest.mark.parametrize("error", [0.6, 0.3])
def test_fewer_parameters_than_an_even_split_of_the_error(error):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, 28, generator=generator, dtype=torch.float64)
    for mode, size in enumerate(weight.shape):  # singular values that fall by a power law
        weight *= torch.arange(1, size + 1).pow(-0.7).view([-1 if m == mode else 1 for m in range(3)])
    found = tucker(weight, MaxError(error))
    assert found.error <= error
    assert tucker_parameters(found.rank, weight.shape) < 0.9 * st_hosvd(weight, error)


@pytest.mark.parametrize("error", [0.9, 0.5, 0.1, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_max_error_holds_after_rounding_to_any_dtype(error, dtype):
    found = tucker(NOISY.to(dtype), MaxError(error))
    assert found.error <= error


@pytest.mark.parametrize("rank", [(3, 4, 5), (10, 4, 9), MaxError(0.3), MaxSize(0.4)], ids=repr)
@pytest.mark.parametrize(
    "weight", [NOISY, NOISY.float(), low_rank((50, 45, 40), 60).float()], ids=["64", "32", "large"]
)
def test_the_weight_is_not_written_to(weight, rank):
    before = weight.clone()
    tucker(weight, rank)
    assert torch.equal(weight, before)


def test_a_time_limit_returns_the_start_at_least_and_still_meets_the_target():
    weight = low_rank((30, 28, 26), 400)
    assert tucker(weight, (6, 6, 6), max_seconds=1e-9).error >= tucker(weight, (6, 6, 6)).error
    assert tucker(weight, MaxError(0.5), max_seconds=1e-9).error <= 0.5


@pytest.mark.parametrize("scale", [1e-7, 1e5, 1e7])
def test_ranks_do_not_depend_on_the_scale_of_the_weight(scale):
    noise = low_rank((40, 40, 40), 400)
    weight = 1 + 0.3 * noise / noise.std()
    expected = tucker(weight, MaxError(0.2))
    found = tucker(weight * scale, MaxError(0.2))
    assert (found.rank, found.error <= 0.2) == (expected.rank, True)


@pytest.mark.parametrize("weight", [low_rank((10, 10, 10), 1), torch.zeros(10, 10, 10)], ids=["rank 1", "zero"])
@pytest.mark.parametrize("rank", [(8, 2, 2), (2, 9, 3)], ids=str)
def test_a_rank_beyond_the_weights_is_still_the_one_asked_for(weight, rank):
    found = tucker(weight, rank)
    assert found.rank == rank
    for factor in found.factors:
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]).to(factor), rtol=0, atol=1e-6)


def test_a_size_that_only_an_absorbed_mode_fits_is_feasible():
    # (1, 1, 1) stores 21 numbers, (4, 1, 1) only 20
    rank = tucker(low_rank((4, 8, 8), 50), MaxSize(20.5 / 256)).rank
    assert tucker_parameters(rank, (4, 8, 8)) == 20


@pytest.mark.parametrize(
    ("shape", "dtype", "scale"), [((6, 5, 7), torch.float64, 1e-310), ((50, 45, 40), torch.float32, 1e-41)]
)
def test_subnormal_weights_have_a_finite_error(shape, dtype, scale):
    assert math.isfinite(tucker((low_rank(shape, 2) * scale).to(dtype), (2, 2, 2)).error)


def test_autocast_does_not_matter():
    weight = low_rank((50, 45, 40), 5, noise=0.01).float()
    expected = tucker(weight, (5, 5, 5)).error
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tucker(weight, (5, 5, 5)).error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("rank", [(3, 4, 5), MaxError(0.3)], ids=repr)
def test_progress_never_goes_back_and_may_end_the_solve(rank):
    seen = []
    tucker(FULL, rank, progress=lambda done, error: seen.append(done))
    assert seen
    assert seen == sorted(seen)

    def stop(done, error):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tucker(FULL, rank, progress=stop)


@pytest.mark.parametrize("rank", [(4, 5, 3), (10, 5, 9), (10, 13, 9), MaxError(0.35), MaxSize(0.2)], ids=repr)
@pytest.mark.parametrize("scale", [1.0, 1e-150])
def test_a_weight_in_its_hosvds_coordinates_has_the_same_ranks_and_nearly_the_error(rank, scale):
    tensor, _ = ordered(NOISY)
    tensor = tensor * scale
    before = tensor.clone()
    found, expected = tucker(tensor, rank, ordered=True), tucker(tensor, rank)
    assert found.rank == expected.rank
    assert expected.error - 1e-12 <= found.error <= 1.01 * expected.error + 1e-12  # HOOI gains little
    assert found.error == pytest.approx(found.relative_error(tensor), rel=1e-9)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("rank", [(8, 9, 10), (12, 45, 40), MaxSize(0.1)], ids=repr)
def test_an_ordered_float32_weight_too(rank):
    tensor, _ = ordered(low_rank((50, 45, 40), 60, noise=0.2).float())
    found, expected = tucker(tensor, rank, ordered=True), tucker(tensor, rank)
    assert found.rank == expected.rank
    assert 0.999 * expected.error <= found.error <= 1.06 * expected.error
    assert found.error == pytest.approx(found.relative_error(tensor), rel=1e-3)


@pytest.mark.parametrize("rank", [(8, 9, 10), (12, 45, 40), (25, 28, 30), MaxSize(0.1)], ids=repr)
def test_an_error_that_energies_tell_is_that_of_the_result(rank):
    weight = low_rank((50, 45, 40), 60, noise=0.2).float()
    found = tucker(weight, rank)
    assert found.error == pytest.approx(found.relative_error(weight), rel=1e-3)


def test_a_zero_weight_is_in_any_order():
    assert tucker(torch.zeros(3, 4, 5), (2, 2, 2), ordered=True).error == 0
    assert tucker(torch.zeros(3, 4, 5), MaxError(0.1), ordered=True).rank == (1, 1, 1)
