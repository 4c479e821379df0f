"""Every path of bitsandbytes that is used, against the pure-torch code, where it is known to be wrong too.

On a machine with a GPU the same tests run there as well: `python -m pytest tests/unit/quantization -k cuda`.
"""

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from bitsandbytes_quantizers import bitsandbytes_blocks, bitsandbytes_int8, bitsandbytes_nf4
from layers import int8_slices, made, rows
from support import bilinear

import compress_bilinear as cb
from compress_bilinear.errors import ConfigError
from compress_bilinear.quantization import (
    FORMATS,
    LEVELS,
    _decode_bnb,
    _formats,
    decode_int8,
    encode_int8,
    expand_scale,
)
from compress_bilinear.quantization._decode_bnb import nf4_values
from compress_bilinear.quantization._nf4 import BLOCK, decode_nf4, encode_nf4

for_devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")),
    ],
)

# the last dimension a multiple of 16 but not of the block size: what their CPU code decodes wrongly with AVX-512
WRONG = ((256, 32), (48, 16), (33, 80), (2, 144))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@for_devices
@pytest.mark.parametrize(("shape", "dim"), [((33, 65), 1), ((33, 65), 0), ((5, 7, 9), 1), ((97, 148), -1)])
def test_vectorwise_int8_is_ours_within_what_float16_rounds(device, shape, dim):
    tensor = normal(*shape).to(device)
    ours, found = int8_slices(tensor, dim), bitsandbytes_int8(tensor, dim)
    assert ours[0].device.type == ours[1].device.type == device
    if device == "cpu":
        assert all(torch.equal(one, other) for one, other in zip(ours, found, strict=True))
    step = float(ours[1].max())
    assert float((decode_int8(*ours, torch.float32) - decode_int8(*found, torch.float32)).abs().max()) <= 1.1 * step


@for_devices
def test_blockwise_with_the_linear_map_is_ours_but_for_ties(device):
    tensor = normal(6, 256).to(device)
    found, ours = bitsandbytes_blocks(tensor, (6, 4)), encode_int8(tensor, (6, 4))
    assert int((found[0].int() - ours[0].int()).abs().max()) <= 1
    error = (decode_int8(*found, torch.float32) - tensor).abs()
    assert bool((error <= 0.503 * expand_scale(found[1], tensor.shape).float()).all())  # at near ties


@for_devices
@pytest.mark.parametrize("shape", [*WRONG, (1,), (2,), (64,), (65,), (7, 5, 3), (101, 101)], ids=str)
def test_nf4_is_ours_also_at_the_shapes_that_their_own_decoding_gets_wrong(device, shape):
    tensor = normal(*shape)
    for block in tensor.view(-1).split(BLOCK):  # their magnitudes are float32: of these blocks, bfloat16 holds them
        at = block.abs().argmax()
        block[at] = (1.01 * block[at]).bfloat16()
    tensor = tensor.to(device)
    (qdata, scale), (codes, magnitudes) = encode_nf4(tensor), bitsandbytes_nf4(tensor)
    count, apart = tensor.numel(), int((qdata != codes).sum())
    assert apart == 0 if device == "cpu" else apart <= 1 + count // 1000  # a tie may fall either way
    assert torch.equal(scale.float(), magnitudes)
    exact = decode_nf4(qdata, scale, 0, count, torch.float32)
    found = nf4_values(qdata, scale, 0, count, torch.float32)
    torch.testing.assert_close(found, exact, rtol=0 if device == "cpu" else 1e-6, atol=0)
    assert float((exact.view(shape) - tensor).norm() / tensor.norm()) < 0.12


@pytest.mark.parametrize("shape", WRONG, ids=str)
def test_layers_of_those_shapes_are_right(shape):
    out, size = shape
    weight = normal(out, 3, size)
    layer = cb.DenseBilinear.from_weight(weight, quantize="nf4")
    assert float((layer.to_dense() - weight).norm() / weight.norm()) < 0.12
    input1, input2 = normal(4, 3, seed=1), normal(4, size, seed=2)
    expected = torch.einsum("ni,oij,nj->no", input1, layer.to_dense(), input2)
    torch.testing.assert_close(layer(input1, input2), expected, rtol=1e-4, atol=1e-3)


@for_devices
@pytest.mark.parametrize("compute", ["on_the_fly", "int8"])
@pytest.mark.parametrize("method", ["dense", "cp", "tucker"])
def test_products_past_the_range_of_float16_do_not_overflow_on_the_way(device, compute, method):
    # the hidden values of a CP, or the sums of an integer product, pass 65504; the outputs do not
    layers = {
        "dense": lambda: cb.DenseBilinear.from_bilinear(source, quantize="int8"),
        "cp": lambda: cb.CPBilinear.from_bilinear(source, 4, quantize="int8"),
        "tucker": lambda: cb.TuckerBilinear.from_bilinear(source, (3, 4, 4), quantize="int8"),
    }
    source = torch.nn.Bilinear(64, 48, 6, bias=False)
    with torch.no_grad():
        source.weight.copy_(1e-3 * torch.einsum("or,ri,rj->oij", normal(6, 3), normal(3, 64), normal(3, 48)))
    layer = layers[method]().to(device)
    layer.set_compute(compute)
    input1, input2 = (30 * normal(40, size, seed=size).to(device) for size in (64, 48))
    exact = layer.to_dense(torch.float64)
    expected = torch.einsum("ni,oij,nj->no", input1.half().double(), exact, input2.half().double())
    found = layer(input1.half(), input2.half())
    assert float(expected.abs().max()) < 65504
    assert bool(torch.isfinite(found).all())
    assert float((found.double() - expected).norm() / expected.norm()) < 0.03


@for_devices
def test_absolute_maxima_past_float16_stay_what_they_are(device):
    # bitsandbytes takes float16 alone on CUDA, where 1e5 is infinite: the pure-torch code is the one that layers use
    tensor = 1e5 * normal(4, 64).to(device)
    qdata, scale = int8_slices(tensor, 1)
    assert int(qdata.abs().max()) == LEVELS
    assert float((decode_int8(qdata, scale, torch.float32) - tensor).norm() / tensor.norm()) < 0.01
    layer = cb.DenseBilinear.from_weight(tensor.view(4, 8, 8), quantize="int8")
    assert bool(torch.isfinite(layer.to_dense()).all())


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TestDecoding:
    """What `compute="bitsandbytes"` reads the weights by."""

    @for_devices
    @pytest.mark.parametrize("shape", [*WRONG, (1,), (65,), (101, 101), (5, 7, 33), (3, 64)], ids=str)
    def test_nf4_of_any_rows_is_ours(self, device, shape):
        tensor = FORMATS["nf4"].encode(1e3 * normal(*shape), "factor").to(device)
        parts = [slice(None), slice(0, 1), slice(shape[0] - 1, None), slice(shape[0] // 3, shape[0] // 2), slice(0, 0)]
        cases = list(itertools.product(DTYPES, parts))
        exact = [tensor.decode(dtype, part) for dtype, part in cases]
        assert tensor.use_bitsandbytes(True) is None
        for (dtype, part), expected in zip(cases, exact, strict=True):
            found = tensor.decode(dtype, part)
            assert (found.shape, found.device.type) == (expected.shape, device)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(found, expected, rtol=0 if device == "cpu" else eps, atol=0)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
    @pytest.mark.parametrize("method", ["dense", "cp", "tucker"])
    def test_layers_on_cuda_compute_the_same_also_when_they_moved_there(self, method):
        layer = made(method, "nf4", (6, 40, 256), bias=False)[0].to("cuda")
        inputs = [value.to("cuda") for value in rows(layer)]
        expected = layer(*inputs)
        layer.set_compute("bitsandbytes")
        torch.testing.assert_close(layer(*inputs), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        layer.cpu().cuda()
        assert layer.compute == "bitsandbytes"
        torch.testing.assert_close(layer(*inputs), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

    @pytest.mark.parametrize(
        ("tensor", "reason"),
        [
            (FORMATS["bf16"].zeros((4, 64), "factor"), "bf16 is decoded by torch alone"),
            (FORMATS["int8"].zeros((4, 64), "factor"), "bitsandbytes is used for nf4"),
            (FORMATS["nf4"].zeros((4, 64), "factor", "meta"), "are on meta"),
        ],
    )
    def test_what_it_is_not_for_is_said_and_not_tried(self, tensor, reason, monkeypatch):
        monkeypatch.setattr(_decode_bnb, "imported", lambda: pytest.fail("bitsandbytes was imported"))
        assert reason in tensor.use_bitsandbytes(True)
        assert tensor.backend == "torch"

    @pytest.mark.parametrize("wrong", [lambda *args: 1.01 * nf4_values(*args), lambda *args: 1 / 0])
    def test_a_layer_that_is_decoded_wrongly_does_not_get_it(self, wrong, monkeypatch):
        monkeypatch.setattr(_formats, "nf4_values", wrong)
        layer = cb.DenseBilinear.from_weight(normal(3, 8, 9), quantize="nf4")
        assert "bitsandbytes" not in layer.computes
        with pytest.raises(ConfigError, match=r"bitsandbytes (decodes it wrongly|cannot decode it: division by zero)"):
            layer.set_compute("bitsandbytes")
        assert (layer.compute, layer.weight.backend) == ("on_the_fly", "torch")

    def test_a_machine_without_it(self, without_bitsandbytes):
        without_bitsandbytes()
        layer = cb.CPBilinear.from_bilinear(bilinear(8, 9, 7), 3, quantize="nf4")
        assert "not installed" in layer.refused_compute("bitsandbytes")
        with pytest.raises(ConfigError, match="Found none: bitsandbytes is not installed"):
            cb.set_compute(layer, "bitsandbytes")

    def test_what_is_wrong_only_in_small_float16_values_is_wrong(self, monkeypatch):
        def flushed(*args):
            return nf4_values(*args) * (args[-1] != torch.float16)

        monkeypatch.setattr(_formats, "nf4_values", flushed)
        tensor = FORMATS["nf4"].encode(4e-5 * torch.rand(3, 64, generator=torch.Generator().manual_seed(0)), "factor")
        assert "wrongly to torch.float16" in tensor.reason_against_bitsandbytes()


class TestImport:
    @pytest.fixture
    def interpreter(self):
        """Runs code where bitsandbytes has not been imported, and gives the last line of what it prints."""

        def run(code):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
            return done.stdout.splitlines()[-1]

        return run

    @pytest.mark.parametrize(
        ("module", "error", "told"),
        [
            pytest.param(
                *("bitsandbytes.backends.cpu.ops", "OSError('libcudart\\nand pages')", "cannot be imported: libcudart"),
                marks=pytest.mark.slow,
            ),
            (
                "bitsandbytes.functional",
                "ModuleNotFoundError('no other', name='other')",
                "cannot be imported: no other",
            ),
        ],
        ids=["after half of it", "a dependency"],
    )
    def test_one_that_fails_is_told_alike_each_time(self, interpreter, module, error, told):
        code = f"""
import sys
from compress_bilinear.quantization import FORMATS
class Finder:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            raise {error}
sys.meta_path.insert(0, Finder)
tensor = FORMATS["nf4"].zeros((4, 64), "factor")
print({{tensor.reason_against_bitsandbytes() for _ in range(3)}})
"""
        assert interpreter(code) == str({f"bitsandbytes {told}"})

    @pytest.mark.slow
    def test_threads_wait_for_the_whole_of_it(self, interpreter):
        code = """
import logging, threading
from compress_bilinear.quantization import FORMATS
found = []
start = threading.Barrier(4)
def ask(): start.wait(); found.append(FORMATS["nf4"].zeros((4, 64), "factor").reason_against_bitsandbytes())
threads = [threading.Thread(target=ask) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(found, logging.getLogger("bitsandbytes").level)
"""
        assert interpreter(code) == "[None, None, None, None] 0"


class TestLayers:
    @pytest.fixture(params=["dense", "cp", "tucker"])
    def layer(self, request):
        layer, _ = made(request.param, "nf4")
        return layer

    @pytest.fixture
    def calls(self, monkeypatch):
        made = []

        def counted(*args):
            made.append(args)
            return nf4_values(*args)

        monkeypatch.setattr(_formats, "nf4_values", counted)
        return made

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_call_is_bit_for_bit_that_on_the_fly(self, layer, dtype, calls):
        first, second = rows(layer, 6, dtype)
        index = torch.arange(6)

        def found():
            blocks = first[:2].view(2, 3, 10), second.view(2, 3, 23)
            yield layer(first, second)
            yield layer.pairwise(first, second)
            yield layer.blockwise(*blocks)
            yield layer.indexed(first, index)
            with torch.autocast("cpu", torch.bfloat16):
                yield layer(first, second)

        expected = list(found())
        layer.set_compute("bitsandbytes")
        assert layer.compute == "bitsandbytes"
        for one, other in zip(found(), expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        calls.clear()
        layer(first, second)
        assert len(calls) >= (1 if layer.method == "dense" else 3)

    def test_float64_and_graphs_are_decoded_by_torch(self, layer, calls):
        layer.set_compute("bitsandbytes")
        wide, inputs = rows(layer, dtype=torch.float64), rows(layer)
        calls.clear()
        layer(*wide)
        torch.func.vmap(lambda one, other: layer(one, other))(*inputs)
        torch.export.export(layer, inputs)
        assert calls == []

    def test_copies_keep_it_and_another_mode_ends_it(self, layer, calls):
        layer.set_compute("bitsandbytes")
        inputs, copied = rows(layer), copy.deepcopy(layer)
        expected = layer(*inputs)
        calls.clear()
        assert torch.equal(copied(*inputs), expected)
        assert calls
        assert copied.bfloat16().compute == "bitsandbytes"
        copied.set_compute("on_the_fly")
        inputs = rows(layer, dtype=torch.bfloat16)
        calls.clear()
        copied(*inputs)
        assert calls == []

    def test_a_device_without_it_ends_it_with_a_warning(self, layer):
        layer.set_compute("bitsandbytes")
        with pytest.warns(UserWarning, match="A layer computes on the fly from now on: .* on meta"):
            layer.to("meta")
        assert layer.compute == "on_the_fly"

    def test_a_move_that_fails_leaves_the_mode(self, layer):
        def no_room(tensor):
            raise torch.OutOfMemoryError

        layer.set_compute("bitsandbytes")
        with pytest.raises(torch.OutOfMemoryError):
            layer._apply(no_room)
        assert {part.compute for part in layer.modules() if hasattr(part, "compute")} == {"bitsandbytes"}

    def test_a_pickle_is_read_where_it_is_missing(self, layer, without_bitsandbytes):
        layer.set_compute("bitsandbytes")
        inputs, pickled = rows(layer), pickle.dumps(layer)
        expected = layer(*inputs)
        assert pickle.loads(pickled).compute == "bitsandbytes"
        without_bitsandbytes()
        with pytest.warns(UserWarning, match="A layer computes on the fly .* bitsandbytes is not installed"):
            again = pickle.loads(pickled)
        assert again.compute == "on_the_fly"
        assert torch.equal(again(*inputs), expected)

    def test_compress_sets_it_and_says_so(self):
        net = torch.nn.Sequential(bilinear(24, 20, 12))
        small, report = cb.compress(net, cb.DenseConfig(quantize="nf4"), compute="bitsandbytes", force=True)
        assert small[0].weight.backend == "bitsandbytes"
        assert report.layers[0].compute == "bitsandbytes"
        assert "computes by bitsandbytes" in str(report).replace("\n", " ")
