"""NF4: the pure-torch code is right everywhere, and bitsandbytes agrees where it is."""

import pytest
import torch

from compress_bilinear.errors import CompressionError
from compress_bilinear.quantization import BLOCK, NF4_CODE, NF4Tensor, _nf4, dequantize_nf4, nf4_bytes, quantize_nf4
from compress_bilinear.quantization._decode_bnb import nf4_values

# whole blocks and not, odd and even, and the layouts that bitsandbytes decodes wrongly on CPUs with AVX-512
SHAPES = ((1,), (2,), (64,), (65,), (256, 32), (48, 16), (33, 80), (7, 5, 3), (101, 101))


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_definition(tensor, scale):
    """Each value's nearest code times its block's magnitude, one block after another."""
    code = torch.tensor(NF4_CODE, dtype=torch.float64)
    blocks = zip(tensor.flatten().double().split(BLOCK), scale.double(), strict=True)
    return torch.cat([code[(block[:, None] / (s or 1) - code).abs().argmin(1)] * s for block, s in blocks])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_nearest_code_times_the_blocks_magnitude(shape, scale_dtype):
    tensor = normal(*shape)
    qdata, scale = quantize_nf4(tensor, scale_dtype=scale_dtype)
    assert (qdata.dtype, scale.dtype) == (torch.uint8, scale_dtype)
    assert qdata.nbytes + 2 * scale.numel() == nf4_bytes(tensor.numel())
    found = dequantize_nf4(qdata, scale, 0, tensor.numel(), torch.float64)
    torch.testing.assert_close(found, by_definition(tensor, scale), rtol=1e-12, atol=0)
    assert float((found - tensor.flatten()).norm() / tensor.norm()) < 0.12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bitsandbytes_agrees_bit_for_bit_on_flat_tensors(shape):
    tensor = normal(*shape)
    ours = quantize_nf4(tensor, scale_dtype=torch.float32)
    for found, theirs in zip(
        ours, quantize_nf4(tensor, scale_dtype=torch.float32, backend="bitsandbytes"), strict=True
    ):
        assert torch.equal(found, theirs)
    count = tensor.numel()
    assert torch.equal(dequantize_nf4(*ours, 0, count, torch.float32), nf4_values(*ours, 0, count, torch.float32))


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (1, 64), (63, 65), (130, 333), (128, 192), (320, 333)])
def test_a_part_is_that_of_the_whole(start, stop):
    qdata, scale = quantize_nf4(normal(333))
    whole = dequantize_nf4(qdata, scale, 0, 333, torch.float32)
    assert torch.equal(dequantize_nf4(qdata, scale, start, stop, torch.float32), whole[start:stop])


def test_chunks_do_not_change_the_result(monkeypatch):
    tensor = normal(1000)
    expected = quantize_nf4(tensor)
    monkeypatch.setattr(_nf4, "_CHUNK", 128)
    assert all(torch.equal(found, whole) for found, whole in zip(quantize_nf4(tensor), expected, strict=True))


def test_what_is_stored_is_stored_unchanged_again():
    once = NF4Tensor.coded(normal(9, 70))
    again = NF4Tensor.coded(once.dequantize(torch.float64))
    assert torch.equal(again.qdata, once.qdata)
    assert torch.equal(again.scale, once.scale)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30, torch.finfo(torch.float32).max])
def test_extreme_magnitudes_and_zeros_stay_finite(magnitude):
    tensor = normal(200).clamp(-1, 1) * magnitude
    tensor[64:128] = 0
    found = NF4Tensor.coded(tensor).dequantize()
    assert bool(torch.isfinite(found).all())
    assert not bool(found[64:128].any())
    assert float((found.double() - tensor).norm() / tensor.double().norm()) < 0.12


def test_buffers_that_do_not_fit_the_shape_are_an_error():
    stored = NF4Tensor.coded(normal(9, 7))
    with pytest.raises(CompressionError, match=r"of \(9, 8\) values should be uint8"):
        NF4Tensor(stored.qdata, stored.scale, (9, 8))
    with pytest.raises(CompressionError, match="float32"):
        NF4Tensor(stored.qdata, stored.scale.float(), (9, 7))
