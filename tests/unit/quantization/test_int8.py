import pytest
import torch
from bitsandbytes_quantizers import bitsandbytes_int8
from support import DTYPES, TOLERANCES
from torch import nn

from compress_bilinear.errors import CompressionError
from compress_bilinear.quantization import (
    LEVELS,
    _int8,
    dequantize,
    expanded,
    quantize_blocks,
    quantize_int8,
    quantize_unit,
    scale_grid,
)

SLICES = (((33, 65), 1), ((33, 65), 0), ((5, 7, 9), -1), ((5, 7, 9), 1), ((5, 7, 9), 0), ((64,), 0))


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def assert_within_half_a_step(qdata, scale, tensor):
    step = scale.double()
    error = (qdata.double() * step - tensor.to(torch.float32).double()).abs()
    assert bool((error <= 0.5 * step * (1 + 1e-12)).all())


@pytest.mark.parametrize(("shape", "dim"), SLICES)
def test_agrees_bit_for_bit_with_bitsandbytes(shape, dim):
    tensor = normal(*shape)
    for found, expected in zip(quantize_int8(tensor, dim), bitsandbytes_int8(tensor, dim), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk", [1, 60, 2**30])
@pytest.mark.parametrize(("shape", "dim"), SLICES)
def test_chunks_do_not_change_the_result(shape, dim, chunk, monkeypatch):
    tensor = normal(*shape)
    expected = quantize_int8(tensor, dim)
    monkeypatch.setattr(_int8, "_CHUNK", chunk)
    for found, whole in zip(quantize_int8(tensor, dim), expected, strict=True):
        assert torch.equal(found, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "dim"), SLICES)
def test_each_entry_is_within_half_its_scale(shape, dim, dtype):
    tensor = normal(*shape, dtype=dtype)
    qdata, scale = quantize_int8(tensor, dim)
    assert (qdata.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert qdata.shape == shape
    assert scale.shape == tensor.sum(dim, keepdim=True).shape
    assert_within_half_a_step(qdata, scale, tensor)
    assert bool((qdata.abs().amax(dim) == LEVELS).all())  # no slice wastes levels


def test_magnitudes_do_not_mix():
    magnitudes = 10.0 ** torch.arange(-30, 31, 5, dtype=torch.float64)
    tensor = (magnitudes[:, None] * normal(13, 17, dtype=torch.float64)).float()
    qdata, scale = quantize_int8(tensor, 1)
    assert_within_half_a_step(qdata, scale, tensor)
    relative = (dequantize(qdata, scale, torch.float32) - tensor).abs().amax(1) / tensor.abs().amax(1)
    assert float(relative.max()) <= 0.5 / LEVELS * (1 + 1e-5)


@pytest.mark.parametrize("largest", [torch.finfo(torch.float32).max, 4.445e-43], ids=["largest", "subnormal"])
def test_the_ends_of_the_range_of_float32_are_kept_too(largest):
    tensor = torch.tensor([[1.0, 0.7, -0.3]]) * largest
    assert_within_half_a_step(*quantize_int8(tensor, 1), tensor)
    assert bool(torch.isfinite(dequantize(*quantize_int8(tensor, 1), torch.float32)).all())


def test_a_slice_of_zeros_has_scale_0_and_leaves_the_others_alone():
    tensor = normal(4, 6)
    expected = quantize_int8(tensor, 1)
    tensor[2] = 0
    qdata, scale = quantize_int8(tensor, 1)
    assert float(scale[2]) == 0
    assert not bool(qdata[2].any())
    assert not bool(dequantize(qdata, scale, torch.float32)[2].any())
    others = [0, 1, 3]
    assert torch.equal(qdata[others], expected[0][others])
    assert torch.equal(scale[others], expected[1][others])


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1,)])
def test_a_slice_of_size_1_is_kept_to_float32(shape):
    tensor = normal(*shape)
    qdata, scale = quantize_int8(tensor, -1)
    assert torch.equal(qdata, (LEVELS * tensor.sign()).to(torch.int8))
    torch.testing.assert_close(dequantize(qdata, scale, torch.float32), tensor, rtol=2e-7, atol=0)


@pytest.mark.parametrize(("shape", "dim"), [((0, 4), 0), ((0, 4), 1), ((3, 0), 1)])
def test_an_empty_tensor_gives_empty_values(shape, dim):
    qdata, scale = quantize_int8(torch.zeros(shape), dim)
    assert qdata.shape == shape
    assert scale.shape == torch.zeros(shape).sum(dim, keepdim=True).shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e39])
def test_what_is_not_finite_in_float32_is_an_error(value):
    tensor = normal(3, 4, dtype=torch.float64)
    tensor[1, 2] = value
    with pytest.raises(CompressionError, match="finite"):
        quantize_int8(tensor, 1)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.ones(2, 2, dtype=torch.int64), "floating. Found torch.int64"), (torch.tensor(1.0), "Found a scalar")],
)
def test_integers_and_scalars_are_an_error(tensor, message):
    with pytest.raises(CompressionError, match=message):
        quantize_int8(tensor, 0)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_layout_of_the_input_does_not_matter(dim):
    tensor = normal(5, 6, 7).permute(2, 0, 1)
    found = quantize_int8(tensor, dim)
    for part, expected in zip(found, quantize_int8(tensor.contiguous(), dim), strict=True):
        assert part.is_contiguous()
        assert torch.equal(part, expected)


def test_quantizing_a_parameter_records_no_gradient():
    assert not any(part.requires_grad for part in quantize_int8(nn.Parameter(normal(2, 3)), 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantizing_rounds_once(dtype):
    qdata, scale = quantize_int8(normal(6, 50), 1)
    exact = qdata.double() * scale.double()
    found = dequantize(qdata, scale, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=TOLERANCES[dtype] / 10, atol=0)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((4, 6, 5), (4, 6, 1)),
        ((4, 6, 300), (4, 6, 3)),
        ((4, 300, 6), (4, 3, 6)),
        ((4, 9, 5), (4, 2, 1)),
        ((7, 10), (1, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_have_scales_of_their_own_and_are_de_quantized_with_them(shape, grid, dtype):
    tensor = normal(*shape) * 10.0 ** torch.arange(-3, 4).repeat(shape[-1])[: shape[-1]]
    qdata, scale = quantize_blocks(tensor, grid)
    assert (tuple(scale.shape), scale.dtype) == (grid, torch.bfloat16)
    whole = expanded(scale, shape)
    assert whole.expand(shape).shape == shape
    assert_within_half_a_step(qdata, whole.float(), tensor)
    exact = qdata.double() * whole.double()
    found = dequantize(qdata, scale, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact.to(dtype).double(), rtol=TOLERANCES[dtype], atol=0)
    again = quantize_blocks(dequantize(qdata, scale, torch.float64), grid)
    assert torch.equal(again[0], qdata)
    assert torch.equal(again[1], scale)


@pytest.mark.parametrize("grid", [(0, 1), (4, 6), (4, 11)])
def test_a_grid_with_empty_blocks_is_an_error(grid):
    with pytest.raises(CompressionError, match="without an empty one"):
        quantize_blocks(normal(4, 10), grid)


def test_without_a_scale_the_step_is_the_same_power_of_two_in_every_dtype():
    tensor = normal(5, 7).clamp(-0.99, 0.99)
    qdata = quantize_unit(tensor)
    assert float((dequantize(qdata, None, torch.float64) - tensor).abs().max()) <= 2**-8
    for dtype in DTYPES:
        assert torch.equal(dequantize(qdata, None, dtype).double(), qdata.double() / 128)


@pytest.mark.parametrize(
    "shape", [(64, 64, 64), (1, 512, 512), (2, 1024, 1024), (50, 401, 51), (86, 64, 64), (3, 601, 601)]
)
def test_a_gaussian_weight_takes_027_of_its_bytes_at_07_percent_error(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    qdata, scale = quantize_blocks(weight, scale_grid(shape))
    assert qdata.nbytes + scale.nbytes <= 0.27 * weight.nbytes
    assert float((dequantize(qdata, scale, torch.float32) - weight).norm() / weight.norm()) <= 0.007
