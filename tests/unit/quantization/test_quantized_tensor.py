import copy

import pytest
import torch
from support import DTYPES, assert_same_state, state_of
from torch import nn

from compress_bilinear.errors import CompressionError
from compress_bilinear.quantization import NF4Tensor, QuantizedTensor


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = QuantizedTensor.quantize(1e-6 * normal(4, 9), 1)  # float16 would lose these scales
        self.other = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("how", ["to", "type"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_casting_the_parent_keeps_the_buffers_bit_for_bit(dtype, how):
    parent = Parent()
    before = state_of(parent.inner)
    getattr(parent, how)(dtype)
    assert parent.other.dtype == dtype
    assert {name: buffer.dtype for name, buffer in parent.inner.named_buffers()} == {
        "qdata": torch.int8,
        "scale": torch.float32,
    }
    assert_same_state(parent.inner, before)


def test_moving_the_parent_moves_the_buffers():
    parent = Parent().to("meta", torch.float16)
    assert parent.inner.device.type == parent.inner.scale.device.type == "meta"
    assert parent.inner.scale.dtype == torch.float32


def test_a_deepcopy_is_equal_and_independent():
    original = QuantizedTensor.quantize(normal(4, 9), 1)
    before = state_of(original)
    copied = copy.deepcopy(original)
    assert_same_state(copied, before)
    copied.qdata.zero_()
    copied.scale.zero_()
    assert_same_state(original, before)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_a_state_dict_loads_into_an_empty_tensor_of_the_same_slices(dim):
    original = QuantizedTensor.quantize(normal(3, 4, 5), dim)
    new = QuantizedTensor.empty((3, 4, 5), original.scale.shape, scale_dtype=torch.float32)
    assert not bool(new.dequantize().any())
    new.load_state_dict(original.state_dict())
    assert_same_state(new, state_of(original))
    assert torch.equal(new.dequantize(), original.dequantize())


def test_what_is_stored_are_two_buffers_and_no_parameters():
    stored = QuantizedTensor.quantize(normal(4, 9), 1)
    assert list(stored.state_dict()) == ["qdata", "scale"]
    assert list(stored.parameters()) == []
    assert stored.shape == (4, 9)
    assert repr(stored) == "QuantizedTensor(int8, shape=(4, 9), scales=(4, 1))"


@pytest.mark.parametrize(
    ("qdata", "scale", "found"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 1), "torch.float32 and torch.float32"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.float64), "torch.int8 and torch.float64"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, 1), r"\(3, 1\)"),
        (torch.zeros(2, 10, dtype=torch.int8), torch.zeros(2, 6), r"\(2, 6\)"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3), r"\(3,\)"),
        (torch.zeros(2, 1, dtype=torch.int8), torch.zeros(2, 3), r"\(2, 3\)"),
    ],
)
def test_buffers_that_do_not_fit_together_are_an_error(qdata, scale, found):
    with pytest.raises(CompressionError, match=f"Found {found}"):
        QuantizedTensor(qdata, scale)


@pytest.mark.parametrize("make", [lambda t: QuantizedTensor.quantize(t, 1), NF4Tensor.coded], ids=["int8", "nf4"])
class TestResident:
    def test_it_is_what_is_stored_and_is_not_saved(self, make):
        stored = make(normal(6, 9))
        expected = stored.dequantize(torch.float32)
        stored.keep_resident(torch.float32)
        assert stored.dequantize(torch.float32) is not expected
        assert torch.equal(stored.dequantize(torch.float32), expected)
        assert torch.equal(stored.rows(slice(2, 4), torch.float32), expected[2:4])
        assert stored.dequantize(torch.float64).dtype == torch.float64
        assert list(stored.state_dict()) == ["qdata", "scale"]

    def test_a_cast_there_and_back_loses_nothing(self, make):
        stored = make(normal(6, 9))
        stored.keep_resident(torch.float32)
        expected = stored.resident.clone()
        assert stored.half().resident.dtype == torch.float16
        assert torch.equal(stored.float().resident, expected)

    @pytest.mark.parametrize("assign", [False, True])
    def test_it_follows_what_is_loaded(self, make, assign):
        stored, other = make(normal(6, 9)), make(2 * normal(6, 9))
        stored.keep_resident(torch.float32)
        stored.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(stored.resident, other.dequantize())

    def test_a_backward_may_save_it_also_where_inference_mode_asked_for_it(self, make):
        stored = make(normal(6, 9))
        with torch.inference_mode():
            stored.keep_resident(torch.float32)
        input = normal(2, 9).requires_grad_()
        nn.functional.linear(input, stored.dequantize(torch.float32)).sum().backward()
        torch.testing.assert_close(input.grad, stored.dequantize(torch.float32).sum(0).expand(2, -1))

    def test_a_copy_has_its_own(self, make):
        stored = make(normal(6, 9))
        stored.keep_resident(torch.float32)
        copied = copy.deepcopy(stored)
        copied.resident.zero_()
        assert bool(stored.resident.any())
