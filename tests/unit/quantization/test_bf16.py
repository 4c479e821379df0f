import pytest
import torch
from torch import nn

from compress_bilinear.errors import CompressionError
from compress_bilinear.quantization import BF16Tensor


def values(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_values_are_the_nearest_and_half_the_bytes_of_float32():
    tensor = values(7, 5).float()
    stored = BF16Tensor.coded(tensor)
    assert torch.equal(stored.dequantize(), tensor.bfloat16().float())
    assert stored.qdata.numel() * stored.qdata.element_size() == tensor.numel() * 2
    assert torch.equal(stored.rows(slice(2, 4), torch.float64), tensor[2:4].bfloat16().double())
    assert list(dict(stored.named_buffers())) == ["qdata"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_casting_the_parent_changes_nothing(dtype):
    parent = nn.ModuleList([BF16Tensor.coded(1e-30 * values(3, 4))])
    before = parent[0].qdata.clone()
    parent.to(dtype)
    assert parent[0].qdata.dtype == torch.bfloat16
    assert torch.equal(parent[0].qdata, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3.4e38])
def test_values_that_it_cannot_hold_are_an_error(bad):
    with pytest.raises(CompressionError, match=r"should be (finite|within bfloat16's range)"):
        BF16Tensor.coded(torch.tensor([1.0, bad]))


def test_other_buffers_are_an_error():
    with pytest.raises(CompressionError, match="should be bfloat16, without scales"):
        BF16Tensor(torch.zeros(2, dtype=torch.int8))
