"""What every source of a weight promises the solvers: what it sums slab by slab is what einsum gives of the whole."""

import pytest
import torch
from support import low_rank
from torch import Tensor

from compress_bilinear.decomposition import Metric
from compress_bilinear.decomposition._source import Source

EQUATIONS = ("ojk,ijk->oi", "jok,jik->oi", "jko,jki->oi")  # of Gram matrices
PROJECTIONS = ("oij,or->rij", "oij,ir->orj", "oij,jr->oir")
PRODUCTS = ("oij,ir,jr->or", "oij,or,jr->ir", "oij,or,ir->jr")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}  # relative to the largest entry; sums of up to 40,000 terms


def matrices(shape, rank, *, orthonormal, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape]
    return [torch.linalg.qr(draw)[0] for draw in draws] if orthonormal else draws


def assert_close(found, expected, dtype):
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=TOLERANCE[dtype] * max(float(expected.abs().max()), 1e-6)
    )


class SourceContract:
    """A subclass gives `source`: one of the weight `self.weight` (O, I, J), float64, read in a working dtype."""

    weight: Tensor

    def source(self, dtype: torch.dtype, slab: int) -> Source:
        raise NotImplementedError

    @pytest.fixture(autouse=True, params=[(17, 37, 63), (80, 7, 5), (3, 1, 9), (1, 5, 6)], ids=str)
    def shape(self, request):
        self.weight = low_rank(request.param, 60)
        return request.param

    @pytest.fixture(params=[(torch.float32, 2**20), (torch.float64, 16)], ids=["float32", "float64, tiny slabs"])
    def made(self, request) -> Source:
        return self.source(*request.param)

    @pytest.fixture
    def dtype(self, made):
        return made.dtype

    def test_the_slabs_are_the_weight(self, made, dtype):
        assert_close(torch.cat([slab for _, slab in made.slabs()]) / made.scale, self.weight, dtype)

    def test_the_total_is_the_squared_norm(self, made, dtype):
        expected = float(self.weight.square().sum())
        assert made.total / made.scale**2 == pytest.approx(expected, rel=TOLERANCE[dtype])

    def test_gram_matrices(self, made, dtype):
        for mode, equation in enumerate(EQUATIONS):
            assert_close(
                made.gram(mode) / made.scale**2, torch.einsum(equation, self.weight, self.weight), torch.float32
            )
        assert made.gram(0).dtype == torch.float64

    @pytest.mark.parametrize("modes", [(0,), (1,), (2,), (0, 2), (0, 1, 2), ()], ids=str)
    def test_projections(self, made, dtype, modes):
        bases, expected = matrices(self.weight.shape, 4, orthonormal=True), self.weight
        for mode in modes:
            expected = torch.einsum(PROJECTIONS[mode], expected, bases[mode])
        found = made.project([u.to(dtype) if m in modes else None for m, u in enumerate(bases)])
        assert_close(found / made.scale, expected, dtype)

    def test_a_projection_may_skip_a_mode(self, made, dtype):
        bases = [u.to(dtype) for u in matrices(self.weight.shape, 4, orthonormal=True)]
        for skip in range(3):
            kept = [None if mode == skip else u for mode, u in enumerate(bases)]
            assert torch.equal(made.project(bases, skip), made.project(kept))

    def test_products_with_factors(self, made, dtype):
        factors = matrices(self.weight.shape, 5, orthonormal=False)
        for mode, equation in enumerate(PRODUCTS):
            others = [factor for m, factor in enumerate(factors) if m != mode]
            found = made.mttkrp([factor.to(dtype) for factor in factors], mode)
            assert found.dtype == torch.float64
            assert_close(found / made.scale, torch.einsum(equation, self.weight, *others), dtype)

    def test_every_order_of_the_axes_has_norm_1(self, made, dtype):
        for order in ((0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)):
            tensor, scale = made.permuted(order)
            assert tensor.flatten(0, 1).data_ptr() == tensor.data_ptr()  # no copy
            assert_close(tensor * scale, self.weight.permute(order) / self.weight.norm(), dtype)


class TestInMemory(SourceContract):
    """A tensor of ordinary size."""

    def source(self, dtype, slab):
        return Source(self.weight.to(dtype), dtype, slab)


class TestHalfPrecisionOfExtremeSize(SourceContract):
    """Values near the end of float16's range, whose squares are far beyond it."""

    @pytest.fixture(autouse=True)
    def rounded(self, shape):
        half = (self.weight / self.weight.abs().max() * 6e4).half()
        self.half, self.weight = half, half.double()

    def source(self, dtype, slab):
        return Source(self.half, dtype, slab)


class TestWhitened(SourceContract):
    """A weight in the metric of its inputs' second moments."""

    @pytest.fixture(autouse=True)
    def whitened(self, shape):
        moments = [None, *(self.moment(size, seed) for seed, size in enumerate(shape[1:]))]
        self.metric, self.plain = Metric.of_moments(moments, 400), self.weight
        self.weight = torch.einsum("oij,ia,jb->oab", self.plain, *self.metric.roots[1:])

    @staticmethod
    def moment(size, seed):
        rows = torch.randn(400, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows = rows * torch.logspace(0, -1, size, dtype=torch.float64)
        return rows.T @ rows / 400

    def source(self, dtype, slab):
        return Source(self.metric.whiten(self.plain.to(dtype)), dtype, slab)
