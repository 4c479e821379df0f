import math

import pytest
import torch
from support import DTYPES, SHAPES, low_rank

from compress_bilinear.decomposition import _source
from compress_bilinear.decomposition._source import Source, gram, mode_product

EQUATIONS = {0: ("oij,kij->ok", "oij,or->rij"), 1: ("oij,okj->ik", "oij,ir->orj"), 2: ("oij,oik->jk", "oij,jr->oir")}


@pytest.fixture(params=[2**20, 16], ids=["one slab", "many slabs"])
def slabs(request, monkeypatch):
    monkeypatch.setattr(_source, "_SLAB", request.param)
    monkeypatch.setattr(_source, "_LEAST_SLAB", request.param)


def basis(shape, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(size, min(size, rank), generator=generator, dtype=torch.float64) for size in shape)
    return [torch.linalg.qr(draw)[0] for draw in draws]


@pytest.mark.parametrize("shape", [(out, in1, in2) for in1, in2, out in SHAPES], ids=str)
@pytest.mark.usefixtures("slabs")
class TestAgainstEinsum:
    @pytest.mark.parametrize("mode", range(3))
    def test_a_gram(self, shape, mode):
        weight = low_rank(shape, 60)
        expected = torch.einsum(EQUATIONS[mode][0], weight, weight)
        torch.testing.assert_close(Source(weight).gram(mode), expected, rtol=1e-11, atol=1e-9)
        torch.testing.assert_close(gram(weight, mode), expected, rtol=1e-11, atol=1e-9)

    @pytest.mark.parametrize("skip", [None, 0, 1, 2])
    def test_a_projection(self, shape, skip):
        weight, factors = low_rank(shape, 60), basis(shape, 4)
        expected = weight
        for mode in range(3):
            if mode != skip:
                expected = torch.einsum(EQUATIONS[mode][1], expected, factors[mode])
        torch.testing.assert_close(Source(weight).project(factors, skip), expected, rtol=1e-11, atol=1e-9)

    def test_a_projection_along_some_modes(self, shape):
        weight, (out, in1, in2) = low_rank(shape, 60), basis(shape, 4)
        for kept in ((out, None, None), (None, in1, None), (None, None, in2), (out, None, in2), (None, None, None)):
            expected = weight
            for mode, factor in enumerate(kept):
                expected = expected if factor is None else torch.einsum(EQUATIONS[mode][1], expected, factor)
            torch.testing.assert_close(Source(weight).project(kept), expected, rtol=1e-11, atol=1e-9)

    def test_what_a_projection_loses(self, shape):
        weight, factors = low_rank(shape, 60), basis(shape, 4)
        kept = torch.einsum("oij,oa,ib,jc->abc", weight, *factors)
        lost = weight - torch.einsum("abc,oa,ib,jc->oij", kept, *factors)
        assert Source(weight).lost(factors) == pytest.approx(float(lost.square().sum()), rel=1e-9, abs=1e-18)

    def test_a_rotation(self, shape):
        weight, square = low_rank(shape, 60), basis(shape, 10**6)
        expected = torch.einsum("oij,oa,ib,jc->abc", weight, *square)
        torch.testing.assert_close(Source(weight).rotate(square), expected, rtol=1e-10, atol=1e-9)

    def test_every_order_of_the_axes_with_norm_1(self, shape):
        weight = low_rank(shape, 60)
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            tensor, scale = Source(weight).permuted(order)
            assert tensor.flatten(0, 1).data_ptr() == tensor.data_ptr()  # no copy
            torch.testing.assert_close(tensor * scale, weight.permute(order) / weight.norm(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mode", range(3))
def test_a_mode_product_without_a_matrix_is_the_tensor(mode):
    tensor = low_rank((3, 4, 5), 2)
    assert mode_product(tensor, None, mode) is tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [10, 50])
def test_the_working_dtype_is_float64_for_small_and_float64_weights_else_float32(dtype, size):
    source = Source(low_rank((size, size, size), 3).to(dtype))
    assert source.dtype == (torch.float64 if size == 10 or dtype == torch.float64 else torch.float32)
    assert {slab.dtype for _, slab in source.slabs()} == {source.dtype}


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float64, s) for s in (1e-300, 1e-150, 1.0, 1e150, 1e300)]
    + [(torch.float32, s) for s in (1e-36, 1e36)]
    + [(torch.float16, 1e-3)],
)
@pytest.mark.parametrize("size", [6, 50])
def test_squares_stay_within_range(dtype, factor, size):
    weight = low_rank((size, size, size), 3)
    weight = (weight / weight.abs().max() * factor).to(dtype)
    source = Source(weight)
    assert math.log2(source.scale) == round(math.log2(source.scale))
    scaled = torch.cat([slab for _, slab in source.slabs()]).double()
    exact = weight.double() * source.scale
    torch.testing.assert_close(scaled, exact, rtol=1e-7, atol=0)
    assert source.total == pytest.approx(float(exact.square().sum()), rel=1e-6)
    assert 1e-13 < source.total < 1e18


def test_nothing_is_written_to_the_weight():
    weight = low_rank((5, 6, 7), 30)
    before = weight.clone()
    source = Source(weight)
    source.project((None, None, None)).zero_()
    source.rotate(basis(weight.shape, 10)).zero_()
    assert torch.equal(weight, before)
