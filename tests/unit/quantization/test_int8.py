import copy

import pytest
import torch
from support import DTYPES, TOLERANCES, assert_same_state, state_of
from torch import nn

from compress_bilinear.errors import CompressionError
from compress_bilinear.quantization import LEVELS, QuantizedTensor, _int8, dequantize, quantize_int8

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
    for found, theirs in zip(
        quantize_int8(tensor, dim), quantize_int8(tensor, dim, backend="bitsandbytes"), strict=True
    ):
        assert found.dtype == theirs.dtype
        torch.testing.assert_close(found, theirs, rtol=0, atol=0)


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


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
def test_magnitudes_do_not_mix(backend):
    magnitudes = 10.0 ** torch.arange(-30, 31, 5, dtype=torch.float64)
    tensor = (magnitudes[:, None] * normal(13, 17, dtype=torch.float64)).float()
    qdata, scale = quantize_int8(tensor, 1, backend=backend)
    assert_within_half_a_step(qdata, scale, tensor)
    relative = (dequantize(qdata, scale, torch.float32) - tensor).abs().amax(1) / tensor.abs().amax(1)
    assert float(relative.max()) <= 0.5 / LEVELS * (1 + 1e-5)


@pytest.mark.parametrize("largest", [torch.finfo(torch.float32).max, 4.445e-43], ids=["largest", "subnormal"])
def test_the_ends_of_the_range_of_float32_are_kept_too(largest):
    tensor = torch.tensor([[1.0, 0.7, -0.3]]) * largest
    assert_within_half_a_step(*quantize_int8(tensor, 1), tensor)
    assert bool(torch.isfinite(dequantize(*quantize_int8(tensor, 1), torch.float32)).all())


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
def test_a_slice_of_zeros_has_scale_0_and_leaves_the_others_alone(backend):
    tensor = normal(4, 6)
    expected = quantize_int8(tensor, 1)
    tensor[2] = 0
    qdata, scale = quantize_int8(tensor, 1, backend=backend)
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
@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
def test_what_is_not_finite_in_float32_is_an_error(value, backend):
    tensor = normal(3, 4, dtype=torch.float64)
    tensor[1, 2] = value
    with pytest.raises(CompressionError, match="finite"):
        quantize_int8(tensor, 1, backend=backend)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.ones(2, 2, dtype=torch.int64), "floating. Found torch.int64"), (torch.tensor(1.0), "Found a scalar")],
)
def test_integers_and_scalars_are_an_error(tensor, message):
    with pytest.raises(CompressionError, match=message):
        quantize_int8(tensor, 0)


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_layout_of_the_input_does_not_matter(dim, backend):
    tensor = normal(5, 6, 7).permute(2, 0, 1)
    found = quantize_int8(tensor, dim, backend=backend)
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
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3), r"\(3,\)"),
        (torch.zeros(2, 1, dtype=torch.int8), torch.zeros(2, 3), r"\(2, 3\)"),
    ],
)
def test_buffers_that_do_not_fit_together_are_an_error(qdata, scale, found):
    with pytest.raises(CompressionError, match=f"Found {found}"):
        QuantizedTensor(qdata, scale)
