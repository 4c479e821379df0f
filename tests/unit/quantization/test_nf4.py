"""NF4 values by definition; `test_bitsandbytes.py` compares them with those of bitsandbytes."""

import pytest
import torch

from compress_bilinear.quantization._nf4 import BLOCK, NF4_CODE, decode_nf4, encode_nf4

# whole blocks and not, odd and even
SHAPES = ((1,), (2,), (64,), (65,), (33, 80), (7, 5, 3), (101, 101))


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_definition(tensor, scale):
    """Each value's nearest code times its block's magnitude, one block after another."""
    code = torch.tensor(NF4_CODE, dtype=torch.float64)
    blocks = zip(tensor.flatten().double().split(BLOCK), scale.double(), strict=True)
    return torch.cat([code[(block[:, None] / (s or 1) - code).abs().argmin(1)] * s for block, s in blocks])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_nearest_code_times_the_blocks_magnitude(shape):
    tensor = normal(*shape)
    qdata, scale = encode_nf4(tensor)
    assert (qdata.dtype, scale.dtype) == (torch.uint8, torch.bfloat16)
    found = decode_nf4(qdata, scale, 0, tensor.numel(), torch.float64)
    torch.testing.assert_close(found, by_definition(tensor, scale), rtol=1e-12, atol=0)
    assert float((found - tensor.flatten()).norm() / tensor.norm()) < 0.12


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (1, 64), (63, 65), (130, 333), (128, 192), (320, 333)])
def test_a_part_is_that_of_the_whole(start, stop):
    qdata, scale = encode_nf4(normal(333))
    whole = decode_nf4(qdata, scale, 0, 333, torch.float32)
    assert torch.equal(decode_nf4(qdata, scale, start, stop, torch.float32), whole[start:stop])


def test_chunks_do_not_change_the_result():
    tensor = normal(1000)
    whole, chunked = encode_nf4(tensor), encode_nf4(tensor, chunk=128)
    assert all(torch.equal(one, other) for one, other in zip(chunked, whole, strict=True))
