"""The quantization-aware finish: its result is what a layer stores, and never worse than rounding one by one."""

import math

import pytest
import torch
from support import low_rank, normal

import compress_bilinear as cb
from compress_bilinear.decomposition import (
    Budget,
    CPDecomposition,
    Metric,
    cp,
    relative_errors,
    rounded,
    stored_columns,
    stored_weight,
    tucker,
    unit_columns,
    unwhitened_cp,
    unwhitened_tucker,
)
from compress_bilinear.fitting import weight_error
from compress_bilinear.quantization import FORMATS

SHAPE = (37, 63, 29)
WEIGHT = low_rank(SHAPE, 12, noise=0.3).float()
CP, TUCKER = cp(WEIGHT, 16), tucker(WEIGHT, (12, 14, 13))


def layer_of(decomposition, quantize):
    kind = cb.CPBilinear if isinstance(decomposition, CPDecomposition) else cb.TuckerBilinear
    return kind.from_decomposition(decomposition, quantize=quantize)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("found", [CP, TUCKER], ids=["cp", "tucker"])
class TestRounded:
    def test_a_layer_stores_these_very_values(self, found, quantize):
        result = rounded(found, WEIGHT, quantize)
        assert type(result) is type(found)
        assert result.rank == found.rank
        layer = layer_of(result, quantize)
        assert relative_errors(result.to_tensor(), layer.dense_rows)[0] < 1e-6
        again = rounded(result, result.to_tensor(), quantize)
        assert again.relative_error(result.to_tensor()) < 1e-6  # what is rounded already is kept

    def test_it_loses_less_than_rounding_one_by_one(self, found, quantize):
        plain, fitted = (layer_of(d, quantize) for d in (found, rounded(found, WEIGHT, quantize)))
        lost = [weight_error(WEIGHT, layer) ** 2 - found.error**2 for layer in (plain, fitted)]
        assert lost[1] < 0.97 * lost[0]
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
        assert result.relative_error(layer_of(result, quantize).to_dense()) < 1e-5

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_the_weight_s_scale_does_not_matter(self, found, quantize, scale):
        head = "weights" if isinstance(found, CPDecomposition) else "core"
        moved = type(found)(**{head: getattr(found, head) * scale, "factors": found.factors})
        result = rounded(moved, WEIGHT * scale, quantize)
        expected = rounded(found, WEIGHT, quantize).relative_error(WEIGHT)
        assert result.relative_error(WEIGHT * scale) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shape", [(1, 9, 8), (7, 1, 5), (6, 5, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_dimensions_of_size_1(shape, quantize):
    weight = normal(*shape)
    for found in (cp(weight, 1), tucker(weight, (1, 1, 1))):
        result = rounded(found, weight, quantize)
        assert result.relative_error(weight) <= weight_error(weight, layer_of(found, quantize)) + 1e-9


@pytest.mark.parametrize("rank", [(37, 14, 13), (12, 63, 29), (30, 14, 13), (36, 50, 25)], ids=str)
@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_absorbed_and_interpolative_modes(rank, quantize):
    found = tucker(WEIGHT, rank)
    result = rounded(found, WEIGHT, quantize)
    layer, plain = layer_of(result, quantize), layer_of(found, quantize)
    assert relative_errors(result.to_tensor(), layer.dense_rows)[0] < 1e-6  # coefficients are rounded too
    lost = [weight_error(WEIGHT, each) ** 2 - found.error**2 for each in (plain, layer)]
    assert lost[1] < 0.97 * lost[0]


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
    assert math.isfinite(result.relative_error(WEIGHT))
    zero = rounded(CPDecomposition(0 * CP.weights, CP.factors), 0 * WEIGHT, quantize)
    assert not bool(zero.to_tensor().any())


def test_unit_columns_are_those_of_int8_and_stay_as_they_are():
    unit, scale = unit_columns(normal(9, 5))
    torch.testing.assert_close(unit.abs().amax(0), torch.full((5,), 127 / 128, dtype=torch.float64), rtol=1e-15, atol=0)
    torch.testing.assert_close(unit * scale, normal(9, 5), rtol=1e-14, atol=0)
    torch.testing.assert_close(unit_columns(unit)[1], torch.ones(5, dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_distance_of_two_approximations_is_relative_to_the_weight():
    itself, error, apart = relative_errors(WEIGHT, lambda rows, dtype: WEIGHT[rows].to(dtype), TUCKER.dense_rows)
    assert itself == 0
    assert error == apart == pytest.approx(TUCKER.error, rel=1e-6)
    assert relative_errors(WEIGHT, CP.dense_rows, CP.dense_rows)[2] == 0


def spread_metric() -> Metric:
    """Of inputs whose directions have very different variances, mixed."""
    moments = [None]
    for mode in (1, 2):
        rows = normal(400, SHAPE[mode], seed=mode) * torch.logspace(0, -2, SHAPE[mode], dtype=torch.float64)
        rows = rows @ normal(SHAPE[mode], SHAPE[mode], seed=5)
        moments.append(rows.T @ rows / 400)
    return Metric.of_moments(moments, 10**9)


def error_in(metric, weight, values) -> float:
    white = metric.whiten(weight.double())
    return float((metric.whiten(values.double()) - white).norm() / white.norm())


def one_by_one(weight, quantize, roots):
    """The same by GPTQ's own rule: in1 from its first entry on, in2 from its last, in the Kronecker product itself."""
    form = FORMATS[quantize]
    stored = form.encode(weight, "weight")
    nearest, peaks = (
        part.flip(2).flatten(1) for part in (stored.decode(torch.float64), form.peaks(stored, slice(None)))
    )
    systems = []
    for root in roots:
        system = root @ root
        systems.append(system + 1e-2 * system.diagonal().mean() * torch.eye(len(root)).double())
    upper = torch.linalg.cholesky(torch.linalg.inv(torch.kron(systems[0], systems[1].flip(0, 1))), upper=True)
    wanted = weight.flip(2).flatten(1).clone()
    for k in range(wanted.shape[1]):
        found = form.nearest(wanted[:, k], peaks[:, k])
        found = torch.where(nearest[:, k].abs() >= peaks[:, k], nearest[:, k], found)
        wanted[:, k:] -= ((wanted[:, k] - found) / upper[k, k])[:, None] * upper[k, k:]
        wanted[:, k] = found
    return wanted.view(weight.shape).flip(2)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
class TestInAMetric:
    @pytest.mark.parametrize("method", ["cp", "tucker"])
    def test_the_error_counts_there_and_is_less_than_by_rounding_one_by_one(self, method, quantize):
        metric = spread_metric()
        white = metric.whiten(WEIGHT)
        found = (
            unwhitened_cp(cp(white, 16), metric, torch.float32)
            if method == "cp"
            else unwhitened_tucker(tucker(white, (12, 14, 13)), metric, torch.float32)
        )
        result = rounded(found, white, quantize, metric)
        plain, fitted = (error_in(metric, WEIGHT, layer_of(d, quantize).to_dense()) for d in (found, result))
        floating = error_in(metric, WEIGHT, found.to_tensor())
        assert fitted**2 - floating**2 < 0.9 * (plain**2 - floating**2)

    @pytest.mark.parametrize("rank", [SHAPE, (12, 63, 29)], ids=str)
    def test_what_is_rounded_is_left_as_it_is(self, rank, quantize):
        metric = spread_metric()
        found = unwhitened_tucker(tucker(metric.whiten(WEIGHT), rank), metric, torch.float32)
        before = found.core.clone()
        result = rounded(found, metric.whiten(WEIGHT), quantize, metric)
        assert torch.equal(found.core, before)
        assert not torch.equal(result.core, before)

    def test_a_dense_weight_loses_less_and_is_what_a_layer_stores(self, quantize):
        metric = spread_metric()
        values = stored_weight(WEIGHT, quantize, metric)
        again = cb.DenseBilinear.from_weight(values, quantize=quantize).to_dense()
        torch.testing.assert_close(again, values, rtol=1e-6, atol=0)
        plain = cb.DenseBilinear.from_weight(WEIGHT, quantize=quantize).to_dense()
        assert error_in(metric, WEIGHT, values) < 0.75 * error_in(metric, WEIGHT, plain)
        # and the weight keeps to what it was
        assert float((values - WEIGHT).norm()) < 3 * float((plain - WEIGHT).norm())

    def test_outputs_for_which_there_is_no_time_are_rounded_to_the_nearest(self, quantize):
        class Counted(Budget):
            def left(self):
                self.asked = getattr(self, "asked", 0) + 1
                return 10.5 - self.asked

            def child(self, share=1.0, span=(0.0, 1.0)):
                part = super().child(share, span)
                part.left = self.left
                return part

        told, most = [], 4 * WEIGHT[0].numel()
        metric, plain = spread_metric(), cb.DenseBilinear.from_weight(WEIGHT, quantize=quantize).to_dense()
        assert torch.equal(stored_weight(WEIGHT, quantize, metric, Budget(1e-9)), plain)
        values = stored_weight(WEIGHT, quantize, metric, Counted(1.0, lambda *seen: told.append(seen[0])), most)
        all_of_them = stored_weight(WEIGHT, quantize, metric)
        done = [torch.equal(one, other) for one, other in zip(values, all_of_them, strict=True)]
        assert 0 < sum(done) < len(done)
        assert done == sorted(done, reverse=True)
        rest = sum(done)
        assert torch.equal(values[rest:], plain[rest:])
        assert told == sorted(told)
        assert len(told) > 1

    def test_where_all_directions_count_about_alike_the_nearest_values_are_as_good(self, quantize):
        rows = [normal(5000, size, seed=size) for size in SHAPE[1:]]
        for moments in ([None, None], [part.T @ part / 5000 for part in rows]):
            assert stored_weight(WEIGHT, quantize, Metric.of_moments([None, *moments], 5000)) is None

    def test_one_uneven_axis_is_enough(self, quantize):
        metric = Metric.of_moments([None, None, spread_metric().roots[2]], 10**9)
        values = stored_weight(WEIGHT, quantize, metric)
        nearest = cb.DenseBilinear.from_weight(WEIGHT, quantize=quantize).to_dense()
        assert error_in(metric, WEIGHT, values) < 0.9 * error_in(metric, WEIGHT, nearest)

    @pytest.mark.parametrize("shape", [(3, 37, 34), (2, 5, 63), (4, 40, 3), (2, 33, 1)], ids=str)
    def test_entries_are_rounded_as_one_after_another_in_the_whole_metric(self, quantize, shape):
        roots = [
            mixed @ mixed.T + 0.1 * torch.eye(size).double()
            for mixed, size in ((normal(n, n, seed=n) / n, n) for n in shape[1:])
        ]
        metric = Metric((None, *roots), (None, *(torch.linalg.inv(root) for root in roots)))
        weight = normal(*shape)
        values = stored_weight(weight, quantize, metric)
        torch.testing.assert_close(values, one_by_one(weight, quantize, roots), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_every_dtype_keeps_the_very_values(self, quantize, dtype):
        metric, weight = spread_metric(), WEIGHT.to(dtype)
        weight[3] = 0
        values = stored_weight(weight, quantize, metric)
        assert values.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(cb.DenseBilinear.from_weight(values, quantize=quantize).to_dense(values.dtype), values)
        assert not bool(values[3].any())
        nearest = cb.DenseBilinear.from_weight(weight, quantize=quantize).to_dense(values.dtype)
        assert error_in(metric, weight, values) < 0.75 * error_in(metric, weight, nearest)

    def test_one_column_one_row_and_zeros_are_rounded(self, quantize):
        for shape in ((1, 1, 3), (3, 1, 7), (2, 5, 1)):
            moments = [None, *(torch.eye(size).double() + 9 for size in shape[1:])]
            metric = Metric.of_moments(moments, 10**9)
            for weight in (normal(*shape).float(), torch.zeros(shape)):
                values = stored_weight(weight, quantize, metric)
                again = cb.DenseBilinear.from_weight(values, quantize=quantize).to_dense()
                assert torch.equal(again, values)
