"""What every storage format in `FORMATS` promises: a new one is tested by its row in the table alone."""

import copy
import io
import itertools
from typing import get_args

import pytest
import torch
from support import DTYPES, assert_same_state, state_of
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.config import Quantize
from compress_bilinear.errors import CompressionError
from compress_bilinear.fitting import stored_bytes
from compress_bilinear.quantization import FORMATS, Layout, QuantizedTensor

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
LARGE: dict[Layout, tuple[int, ...]] = {"weight": (40, 61, 83)} | dict.fromkeys(LAYOUTS[1:], (120, 333))
# odd, of size 1 along each axis, and blocks of 64 and 128 that are exact, or have one entry more or less
MATRICES = [(17, 37), (1, 9), (9, 1), (1, 1), (2, 64), (5, 13), (3, 43)]
ODD: dict[Layout, list[tuple[int, ...]]] = dict.fromkeys(LAYOUTS, MATRICES) | {
    "weight": [(5, 37, 63), (3, 130, 9), (1, 9, 8), (7, 1, 5), (7, 5, 1), (1, 1, 1), (2, 3, 128), (2, 129, 4)],
}
NO_ENTRIES = [(0, 4), (3, 0)]
EMPTY: dict[Layout, list[tuple[int, ...]]] = dict.fromkeys(LAYOUTS, NO_ENTRIES) | {"weight": [(0, 4, 5)]}


def example(shape: tuple[int, ...], layout: Layout, seed: int = 0) -> Tensor:
    """Gaussian values, with what the layout says of the magnitudes of its rows or columns."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    match layout:
        case "rows":
            return values * torch.logspace(-3, 3, shape[0])[:, None]
        case "columns":
            return values * torch.logspace(-1, 1, shape[1])
        case "factor":
            return values * (127 / 128) / values.abs().amax(1, keepdim=True)
    return values


def relative(found: Tensor, exact: Tensor) -> float:
    scale = float(exact.abs().max()) or 1.0
    return float((found.double() / scale - exact.double() / scale).norm() / (exact.double() / scale).norm())


def slices(size: int) -> list[slice]:
    return [slice(None), slice(0, 1), slice(size - 1, None), slice(size // 3, size // 2 + 1), slice(0, 0)]


def test_the_table_has_the_names_that_configs_take() -> None:
    assert set(FORMATS) == set(get_args(Quantize))
    assert all(form.name == name for name, form in FORMATS.items())


@pytest.fixture(params=FORMATS)
def form(request):
    return FORMATS[request.param]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


class TestValues:
    def test_the_error_of_gaussian_values_is_below_its_bound(self, form, layout):
        exact = example(LARGE[layout], layout)
        stored = form.encode(exact, layout)
        assert relative(stored.decode(torch.float64), exact) <= form.error
        assert torch.equal(form.round_to(exact, layout), stored.decode(torch.float64))

    def test_odd_sizes_and_sizes_of_1(self, form, layout):
        for shape in ODD[layout]:
            exact = example(shape, layout)
            stored = form.encode(exact, layout)
            assert stored.shape == stored.decode().shape == shape
            assert relative(stored.decode(), exact) <= 2 * form.error, shape

    def test_what_is_stored_is_stored_unchanged_again(self, form, layout):
        for shape in (LARGE[layout], *ODD[layout]):
            once = form.round_to(example(shape, layout), layout)
            assert relative(form.round_to(once, layout), once) <= 1e-6, shape

    def test_zeros_stay_zero_also_among_others(self, form, layout):
        shape = LARGE[layout]
        for zeros in (form.zeros(shape, layout), form.encode(torch.zeros(shape), layout)):
            assert not bool(zeros.decode().any())
        exact = example(shape, layout)
        exact[3:9] = 0
        assert not bool(form.encode(exact, layout).decode()[3:9].any())

    @pytest.mark.parametrize("magnitude", [1e-30, 1e-10, 1e10, 1e30, 3.3e38])
    @pytest.mark.parametrize("layout", ["weight", "rows", "columns"])  # a factor's scale is kept elsewhere
    def test_extreme_magnitudes(self, form, layout, magnitude):
        exact = example(LARGE[layout], layout)
        exact = exact / exact.abs().max() * magnitude
        found = form.encode(exact, layout).decode()
        assert bool(torch.isfinite(found).all())
        assert relative(found, exact) <= form.error

    def test_empty_tensors(self, form, layout):
        for shape in EMPTY[layout]:
            stored = form.encode(torch.zeros(shape), layout)
            assert stored.shape == stored.decode(torch.float64).shape == shape

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e39])
    def test_what_is_not_finite_in_float32_is_an_error(self, form, layout, value):
        exact = example(LARGE[layout], layout).double()
        exact[1, 2] = value
        with pytest.raises(CompressionError, match="should be finite"):
            form.encode(exact, layout)

    def test_integers_are_an_error(self, form, layout):
        with pytest.raises(CompressionError, match=r"should be floating. Found torch.int64"):
            form.encode(torch.ones(LARGE[layout], dtype=torch.int64), layout)

    def test_the_layout_in_memory_does_not_matter_and_no_gradient_is_recorded(self, form, layout):
        exact = example(LARGE[layout], layout)
        turned = nn.Parameter(exact.movedim(0, -1).contiguous().movedim(-1, 0))
        found, expected = form.encode(turned, layout), form.encode(exact, layout)
        assert_same_state(found, state_of(expected))
        assert all(buffer.is_contiguous() and not buffer.requires_grad for buffer in found.buffers())

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_slice_is_that_of_the_whole_rounded_once(self, form, layout, dtype):
        for shape in (LARGE[layout], *ODD[layout]):
            stored = form.encode(example(shape, layout), layout)
            whole, exact = stored.decode(dtype), stored.decode(torch.float64)
            assert whole.dtype == dtype
            eps = 1e-7 if dtype == torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(whole.double(), exact, rtol=eps, atol=0 if dtype != torch.float16 else 1e-7)
            for part in slices(shape[0]):
                assert torch.equal(stored.decode(dtype, part), whole[part])

    def test_peaks_bound_the_values_of_their_blocks_and_the_nearest_are_those_stored(self, form, layout):
        for shape in (LARGE[layout], *ODD[layout]):
            exact = example(shape, layout)
            stored = form.encode(exact, layout)
            values, peaks = stored.decode(torch.float64), form.peaks(stored, slice(None))
            if peaks is None:
                continue
            assert bool((values.abs() <= peaks * (1 + 1e-12)).all())
            for part in slices(shape[0]):
                assert torch.equal(form.peaks(stored, part), peaks[part])
            torch.testing.assert_close(form.nearest(values, peaks), values, rtol=1e-12, atol=0)
            far = (form.nearest(exact.double(), peaks) - exact).abs()
            assert bool((far <= (values - exact).abs() + 1e-6 * peaks).all())


class TestBytes:
    def test_they_are_those_of_the_buffers(self, form, layout):
        for shape in (LARGE[layout], *ODD[layout], *EMPTY[layout]):
            stored = form.encode(torch.zeros(shape), layout)
            assert form.nbytes(shape, layout) == stored_bytes(stored)
            assert list(dict(stored.named_parameters())) == []

    def test_a_value_has_the_bits_that_the_format_says(self, form, layout):
        values = torch.Size(LARGE[layout]).numel()
        assert form.nbytes(LARGE[layout], layout) == pytest.approx(values * form.bits / 8, rel=0.1)

    def test_sizes_may_be_broadcast_tensors(self, form, layout):
        sizes = [torch.arange(1, 300, 37), torch.arange(1, 200, 23), torch.arange(1, 140, 31)][: len(LARGE[layout])]
        found = form.nbytes(torch.meshgrid(*sizes, indexing="ij"), layout)
        shapes = itertools.product(*(size.tolist() for size in sizes))
        assert found.flatten().tolist() == [form.nbytes(shape, layout) for shape in shapes]

    def test_layers_store_as_many_as_their_sizes_say(self, form):
        from compress_bilinear.decomposition import cp_bytes, tucker_bytes

        shape = (31, 47, 40)
        for rank in (1, 5, 64):
            layer = cb.CPBilinear(47, 40, 31, rank, bias=False, quantize=form.name)
            assert stored_bytes(layer) == cp_bytes(rank, shape, 4, form.name)
        for ranks in ((3, 9, 7), (31, 47, 40), (30, 44, 39), (12, 47, 33), (31, 2, 1)):
            tucker = cb.TuckerBilinear(47, 40, 31, ranks, bias=False, quantize=form.name)
            assert stored_bytes(tucker) == tucker_bytes(ranks, shape, 4, form.name)


class Parent(nn.Module):
    def __init__(self, stored: QuantizedTensor) -> None:
        super().__init__()
        self.inner = stored
        self.other = nn.Parameter(torch.ones(3))


class TestModule:
    @pytest.fixture
    def stored(self, form, layout):
        # float16 would lose these scales
        return form.encode(example(LARGE[layout], layout) * (1 if layout == "factor" else 1e-6), layout)

    def test_its_state_is_its_buffers(self, stored):
        names = ["qdata"] if stored.scale is None else ["qdata", "scale"]
        assert list(stored.state_dict()) == names
        assert stored.format.name in repr(stored)

    @pytest.mark.parametrize("how", ["to", "type"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_casting_the_parent_changes_nothing(self, stored, dtype, how):
        before = state_of(stored)
        parent = Parent(stored)
        getattr(parent, how)(dtype)
        assert parent.other.dtype == dtype
        assert {name: buffer.dtype for name, buffer in parent.inner.named_buffers()} == {
            name: value.dtype for name, value in before.items()
        }
        assert_same_state(parent.inner, before)

    def test_moving_the_parent_moves_the_buffers(self, stored):
        dtypes = [buffer.dtype for buffer in stored.buffers()]
        moved = Parent(stored).to("meta", torch.float16).inner
        assert moved.device.type == "meta"
        assert all(buffer.is_meta for buffer in moved.buffers())
        assert [buffer.dtype for buffer in moved.buffers()] == dtypes

    def test_copies_and_files_are_equal_and_independent(self, stored):
        before = state_of(stored)
        file = io.BytesIO()
        torch.save(stored, file)
        file.seek(0)
        for new in (copy.deepcopy(stored), torch.load(file, weights_only=False)):
            assert torch.equal(new.decode(), stored.decode())
            for buffer in new.buffers():
                buffer.zero_()
            assert_same_state(stored, before)

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_state_dict_loads_into_zeros(self, stored, assign):
        file = io.BytesIO()
        torch.save(stored.state_dict(), file)
        file.seek(0)
        new = stored.format.zeros(stored.shape, stored.layout)
        new.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert torch.equal(new.decode(), stored.decode())

    def test_another_tensor_has_the_same_format_and_layout(self, stored):
        new = stored.encode(2 * stored.decode())
        assert (new.format.name, new.layout, new.shape) == (stored.format.name, stored.layout, stored.shape)

    def test_buffers_of_other_shapes_and_dtypes_are_an_error(self, stored):
        form, layout, shape, qdata, scale = stored.format, stored.layout, stored.shape, stored.qdata, stored.scale
        for wrong in (qdata[1:], qdata.double()):
            with pytest.raises(CompressionError, match=r"`qdata` of .* should be .* Found"):
                QuantizedTensor(form, layout, shape, wrong, scale)
        for wrong in (torch.zeros(2, 2), None if scale is not None else torch.zeros(1)):
            with pytest.raises(CompressionError, match=r"`scale` of .* should be .* Found"):
                QuantizedTensor(form, layout, shape, qdata, wrong)

    def test_bitsandbytes_decodes_to_the_same_values_or_there_is_a_reason_against_it(self, stored):
        expected = stored.decode(torch.float16)
        reason = stored.use_bitsandbytes(True)
        assert stored.backend == ("torch" if reason else "bitsandbytes")
        assert torch.equal(stored.decode(torch.float16), expected)
