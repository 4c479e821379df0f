"""Every path of bitsandbytes that is used, against the pure-torch code, where it is known to be wrong too.

On a machine with a GPU the same tests run there as well: `python -m pytest tests/unit/quantization -k cuda`.
"""

import pytest
import torch

import compress_bilinear as cb
from compress_bilinear.quantization import (
    LEVELS,
    dequantize,
    dequantize_nf4,
    expanded,
    quantize_blocks,
    quantize_int8,
    quantize_nf4,
)
from compress_bilinear.quantization._bitsandbytes import decoded_nf4

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
    ours, theirs = quantize_int8(tensor, dim), quantize_int8(tensor, dim, backend="bitsandbytes")
    assert theirs[0].device.type == theirs[1].device.type == device
    if device == "cpu":
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    step = float(ours[1].max())
    assert float((dequantize(*ours, torch.float32) - dequantize(*theirs, torch.float32)).abs().max()) <= 1.1 * step


@for_devices
def test_blockwise_with_the_linear_map_is_ours_but_for_ties(device):
    tensor = normal(6, 256).to(device)
    theirs, ours = quantize_blocks(tensor, (6, 4), backend="bitsandbytes"), quantize_blocks(tensor, (6, 4))
    assert int((theirs[0].int() - ours[0].int()).abs().max()) <= 1
    error = (dequantize(*theirs, torch.float32) - tensor).abs()
    assert bool((error <= 0.503 * expanded(theirs[1], tensor.shape).float()).all())


@for_devices
@pytest.mark.parametrize("shape", [*WRONG, (1,), (65,), (101, 101)], ids=str)
def test_nf4_is_ours_at_the_shapes_that_their_own_decoding_gets_wrong(device, shape):
    tensor = normal(*shape).to(device)
    ours = quantize_nf4(tensor, scale_dtype=torch.float32)
    theirs = quantize_nf4(tensor, scale_dtype=torch.float32, backend="bitsandbytes")
    count = tensor.numel()
    apart = [int((one.int() - other.int()).abs().gt(0).sum()) for one, other in zip(ours[:1], theirs[:1], strict=True)]
    assert max(apart) == 0 if device == "cpu" else max(apart) <= 1 + count // 1000  # a tie may fall either way
    exact = dequantize_nf4(*ours, 0, count, torch.float32)
    torch.testing.assert_close(decoded_nf4(*ours, count), exact, rtol=1e-6, atol=0)
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
@pytest.mark.parametrize("compute", ["on_the_fly", "resident", "int8"])
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
    layer.set_compute(compute, torch.float16)
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
    qdata, scale = quantize_int8(tensor, 1)
    assert int(qdata.abs().max()) == LEVELS
    assert float((dequantize(qdata, scale, torch.float32) - tensor).norm() / tensor.norm()) < 0.01
    layer = cb.DenseBilinear.from_weight(tensor.view(4, 8, 8), quantize="int8")
    assert bool(torch.isfinite(layer.to_dense()).all())
