"""int8 values and their scales: see also `tests/contracts/test_formats.py`, which holds for every format."""

import pytest
import torch
from bitsandbytes_quantizers import bitsandbytes_int8
from layers import int8_slices
from support import DTYPES, TOLERANCES

from compress_bilinear.quantization import FORMATS, LEVELS, decode_int8, encode_int8, expand_scale
from compress_bilinear.quantization._int8 import encode_unit

SLICES = (((33, 65), 1), ((33, 65), 0), ((5, 7, 9), -1), ((5, 7, 9), 1), ((5, 7, 9), 0), ((64,), 0))


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def assert_within_half_a_step(qdata, scale, tensor):
    step = scale.double()
    error = (qdata.double() * step - tensor.to(torch.float32).double()).abs()
    assert bool((error <= 0.5 * step * (1 + 1e-12)).all())


@pytest.mark.parametrize(("shape", "dim"), SLICES)
def test_each_entry_is_within_half_its_scale_as_bitsandbytes_has_it_bit_for_bit(shape, dim):
    tensor = normal(*shape)
    qdata, scale = int8_slices(tensor, dim)
    assert (qdata.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert qdata.shape == shape
    assert scale.shape == tensor.sum(dim, keepdim=True).shape
    assert_within_half_a_step(qdata, scale, tensor)
    assert bool((qdata.abs().amax(dim) == LEVELS).all())  # no slice wastes levels
    for found, expected in zip((qdata, scale), bitsandbytes_int8(tensor, dim), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk", [1, 60])
@pytest.mark.parametrize(("shape", "dim"), SLICES)
def test_chunks_do_not_change_the_result(shape, dim, chunk):
    tensor = normal(*shape)
    grid = [1 if axis == dim % tensor.dim() else size for axis, size in enumerate(shape)]
    whole, chunked = encode_int8(tensor, grid), encode_int8(tensor, grid, chunk=chunk)
    assert all(torch.equal(one, other) for one, other in zip(chunked, whole, strict=True))


def test_magnitudes_do_not_mix():
    magnitudes = 10.0 ** torch.arange(-30, 31, 5, dtype=torch.float64)
    tensor = (magnitudes[:, None] * normal(13, 17, dtype=torch.float64)).float()
    qdata, scale = int8_slices(tensor, 1)
    assert_within_half_a_step(qdata, scale, tensor)
    relative = (decode_int8(qdata, scale, torch.float32) - tensor).abs().amax(1) / tensor.abs().amax(1)
    assert float(relative.max()) <= 0.5 / LEVELS * (1 + 1e-5)


@pytest.mark.parametrize("largest", [torch.finfo(torch.float32).max, 4.445e-43], ids=["largest", "subnormal"])
def test_the_ends_of_the_range_of_float32_are_kept_too(largest):
    tensor = torch.tensor([[1.0, 0.7, -0.3]]) * largest
    assert_within_half_a_step(*int8_slices(tensor, 1), tensor)
    assert bool(torch.isfinite(decode_int8(*int8_slices(tensor, 1), torch.float32)).all())


def test_a_slice_of_zeros_has_scale_0_and_leaves_the_others_alone():
    tensor = normal(4, 6)
    expected = int8_slices(tensor, 1)
    tensor[2] = 0
    qdata, scale = int8_slices(tensor, 1)
    assert float(scale[2]) == 0
    assert not bool(qdata[2].any())
    others = [0, 1, 3]
    assert torch.equal(qdata[others], expected[0][others])
    assert torch.equal(scale[others], expected[1][others])


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1,)])
def test_a_slice_of_size_1_is_kept_to_float32(shape):
    tensor = normal(*shape)
    qdata, scale = int8_slices(tensor, -1)
    assert torch.equal(qdata, (LEVELS * tensor.sign()).to(torch.int8))
    torch.testing.assert_close(decode_int8(qdata, scale, torch.float32), tensor, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((4, 6, 5), (4, 6, 1)),
        ((4, 6, 300), (4, 6, 3)),
        ((4, 300, 6), (4, 3, 6)),
        ((4, 9, 5), (4, 2, 1)),
        ((7, 10), (1, 4)),
        ((20, 7), (3, 1)),
    ],
    ids=str,
)
def test_blocks_have_scales_of_their_own_and_are_decoded_with_them(shape, grid):
    tensor = normal(*shape) * 10.0 ** torch.arange(-3, 4).repeat(shape[-1])[: shape[-1]]
    qdata, scale = encode_int8(tensor, grid)
    assert (tuple(scale.shape), scale.dtype) == (grid, torch.bfloat16)
    whole = expand_scale(scale, shape)
    assert whole.expand(shape).shape == shape
    assert_within_half_a_step(qdata, whole.float(), tensor)
    exact = qdata.double() * whole.double()
    for dtype in DTYPES:
        found = decode_int8(qdata, scale, dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact.to(dtype).double(), rtol=TOLERANCES[dtype], atol=0)
    again = encode_int8(decode_int8(qdata, scale, torch.float32), grid)
    assert torch.equal(again[0], qdata)
    assert torch.equal(again[1], scale)


def test_without_a_scale_the_step_is_the_same_power_of_two_in_every_dtype():
    tensor = normal(5, 7).clamp(-0.99, 0.99)
    qdata = encode_unit(tensor)
    assert float((decode_int8(qdata, None, torch.float64) - tensor).abs().max()) <= 2**-8
    for dtype in DTYPES:
        assert torch.equal(decode_int8(qdata, None, dtype).double(), qdata.double() / 128)


@pytest.mark.parametrize(
    "shape", [(64, 64, 64), (1, 512, 512), (2, 1024, 1024), (50, 401, 51), (86, 64, 64), (3, 601, 601)]
)
def test_a_gaussian_weight_takes_027_of_its_bytes_at_07_percent_error(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stored = FORMATS["int8"].encode(weight, "weight")
    assert FORMATS["int8"].nbytes(shape, "weight") <= 0.27 * weight.nbytes
    assert float((stored.decode() - weight).norm() / weight.norm()) <= 0.007
