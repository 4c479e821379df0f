import copy

import pytest
import torch
from support import DTYPES, assert_same_state, state_of
from torch import nn

from compress_bilinear.errors import CompressionError
from compress_bilinear.quantization import FORMATS, QuantizedTensor

INT8 = FORMATS["int8"]


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = INT8.encode(1e-6 * normal(4, 9), "rows")  # float16 would lose these scales
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
    original = INT8.encode(normal(4, 9), "rows")
    before = state_of(original)
    copied = copy.deepcopy(original)
    assert_same_state(copied, before)
    copied.qdata.zero_()
    copied.scale.zero_()
    assert_same_state(original, before)


def test_what_is_stored_are_two_buffers_and_no_parameters():
    stored = INT8.encode(normal(4, 9), "rows")
    assert list(stored.state_dict()) == ["qdata", "scale"]
    assert list(stored.parameters()) == []
    assert stored.shape == (4, 9)
    assert repr(stored) == "QuantizedTensor(int8, shape=(4, 9), scales=(4, 1))"


@pytest.mark.parametrize(
    ("qdata", "scale", "found"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 1), r"torch.int8 \(2, 3\). Found torch.float32 \(2, 3\)"),
        (torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2, 1), r"torch.int8 \(2, 3\). Found torch.int8 \(2, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.float64), "Found torch.float64"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, 1), r"torch.float32 \(2, 1\). Found .* \(3, 1\)"),
        (torch.zeros(2, 3, dtype=torch.int8), None, "`scale` of a int8 rows .* Found None"),
    ],
)
def test_buffers_that_do_not_fit_the_shape_are_an_error(qdata, scale, found):
    with pytest.raises(CompressionError, match=found):
        QuantizedTensor(INT8, "rows", (2, 3), qdata, scale)


@pytest.mark.parametrize(
    "make", [lambda t: INT8.encode(t, "rows"), lambda t: FORMATS["nf4"].encode(t, "rows")], ids=["int8", "nf4"]
)
class TestResident:
    def test_it_is_what_is_stored_and_is_not_saved(self, make):
        stored = make(normal(6, 9))
        expected = stored.decode(torch.float32)
        stored.keep_resident(torch.float32)
        assert stored.decode(torch.float32) is not expected
        assert torch.equal(stored.decode(torch.float32), expected)
        assert torch.equal(stored.decode(torch.float32, slice(2, 4)), expected[2:4])
        assert stored.decode(torch.float64).dtype == torch.float64
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
        assert torch.equal(stored.resident, other.decode())

    def test_a_backward_may_save_it_also_where_inference_mode_asked_for_it(self, make):
        stored = make(normal(6, 9))
        with torch.inference_mode():
            stored.keep_resident(torch.float32)
        input = normal(2, 9).requires_grad_()
        nn.functional.linear(input, stored.decode(torch.float32)).sum().backward()
        torch.testing.assert_close(input.grad, stored.decode(torch.float32).sum(0).expand(2, -1))

    def test_a_copy_has_its_own(self, make):
        stored = make(normal(6, 9))
        stored.keep_resident(torch.float32)
        copied = copy.deepcopy(stored)
        copied.resident.zero_()
        assert bool(stored.resident.any())
