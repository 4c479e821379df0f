"""What only a weight in memory does; tests/contracts/test_sources.py has what every source does."""

import math

import pytest
import torch
from support import DTYPES, low_rank

from compress_bilinear.decomposition._source import Source, mode_product


def square(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0] for size in shape]


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
    assert torch.equal(weight, before)
