"""What every quantized layer promises, by method and format: small, accurate, finite, movable."""

import copy

import pytest
import torch
from layers import BOUND, LAYERS, QUANTIZED, exact_parts, for_all, for_factors, made, relative, rows
from support import assert_same_state, bilinear, low_rank, normal, state_of
from torch import nn

import compress_bilinear as cb
from compress_bilinear.decomposition import CPDecomposition, TuckerDecomposition
from compress_bilinear.errors import ConfigError
from compress_bilinear.fitting import stored_bytes, weight_error
from compress_bilinear.ops import int8_bilinear, int8_linear, reference
from compress_bilinear.quantization import FORMATS, QuantizedTensor, decode_int8, missing, scale_grid

SHAPES = [(5, 13, 64), (3, 1000, 13), (1, 9, 3), (9, 1, 3), (7, 3, 1), (1, 1, 1)]
COMPUTES = [(*kind, mode) for kind in QUANTIZED for mode in ("on_the_fly", "bfloat16")]
CHANGE = {"bfloat16": 0.02, "int8": 0.06}  # of outputs and gradients
COMPUTES += [(method, *mode) for method in LAYERS for mode in (("int8", "int8"), ("nf4", "bitsandbytes"))]
# compiled and exported by default: each method, and each mode; the rest is slow
FEW = [
    ("dense", "int8", "int8"),
    ("cp", "nf4", "bitsandbytes"),
    ("tucker", "int8", "on_the_fly"),
    ("cp", "int8", "bfloat16"),
]


class TestAccuracy:
    @for_all
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_all_sizes_ranks_and_magnitudes(self, method, quantize, shape):
        for at, scale in enumerate([1.0, 1e-30, 1e-12, 1e12, 1e30]):
            rank = (1, 7, 16, 48)[(at + SHAPES.index(shape)) % 4]  # each with every shape and with every scale
            layer, exact = made(method, quantize, shape, rank, scale=scale, bias=scale == 1)
            assert relative(layer.to_dense(torch.float64), exact) < BOUND[quantize]
            assert all(bool(value.isfinite().all()) for value in layer.state_dict().values())
            input1, input2 = rows(layer)
            bias = None if layer.bias is None else layer.bias.detach().double()
            expected = reference.bilinear_dense(input1.double(), input2.double(), layer.to_dense(torch.float64), bias)
            assert float(expected.abs().max()) < torch.finfo(torch.float32).max
            for compute in layer.computes:
                layer.set_compute(compute)
                assert relative(layer(input1, input2).detach(), expected) < CHANGE.get(compute, 1e-4)

    @for_all
    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_weights_of_extreme_magnitude_with_zero_slices_are_solved_for_and_stay_finite(
        self, method, quantize, scale
    ):
        layer = nn.Bilinear(13, 9, 5, bias=False)
        with torch.no_grad():
            layer.weight.copy_(scale * low_rank((5, 13, 9), 3, noise=0.01))
            for axis in range(3):
                layer.weight.select(axis, 1).zero_()
        kind = {"dense": cb.DenseBilinear, "cp": cb.CPBilinear, "tucker": cb.TuckerBilinear}[method]
        rank = {"dense": (), "cp": (3,), "tucker": ((3, 3, 3),)}[method]
        new = kind.from_bilinear(layer, *rank, quantize=quantize)
        assert all(bool(value.isfinite().all()) for value in new.state_dict().values())
        assert relative(new.to_dense(torch.float64), layer.weight.detach().double()) < BOUND[quantize]
        assert bool(new(*rows(new)).isfinite().all())

    @for_factors
    @pytest.mark.parametrize("quantize", FORMATS)
    def test_zero_columns_stay_zero(self, method, quantize):
        parts = exact_parts(method, (19, 30, 23), 7)
        for factor in parts.factors:
            factor[:, 2] = 0
        kind = cb.CPBilinear if method == "cp" else cb.TuckerBilinear
        layer = kind.from_decomposition(parts, quantize=quantize)
        assert relative(layer.to_dense(torch.float64), parts.to_tensor().double()) < BOUND[quantize]
        assert bool(torch.isfinite(layer(*rows(layer))).all())
        zero = type(parts)(*(part if isinstance(part, tuple) else 0 * part for part in list(vars(parts).values())[:2]))
        assert not bool(kind.from_decomposition(zero, quantize=quantize).to_dense().any())

    @for_factors
    @pytest.mark.parametrize(("shape", "rank"), [((64, 64, 64), 24), ((100, 80, 70), 16), ((97, 148, 148), 40)])
    def test_int8_takes_027_of_the_bytes_also_with_columns_scaled_by_a_million(self, method, shape, rank):
        parts = exact_parts(method, shape, rank)
        exact = parts.to_tensor().double()
        moved = [10.0 ** normal(rank, seed=seed, dtype=torch.float32).clamp(-1, 1).mul(6) for seed in (1, 2)]
        out, in1, in2 = (factor.double() for factor in parts.factors)
        if method == "cp":
            skewed = CPDecomposition(
                parts.weights.double(), (out * moved[0], in1 * moved[1], in2 / moved[0] / moved[1])
            )
        else:
            core = parts.core.double() / moved[0][:, None] / moved[1]
            skewed = TuckerDecomposition(core, (out, in1 * moved[0], in2 * moved[1]))
        kind = cb.CPBilinear if method == "cp" else cb.TuckerBilinear
        layer = kind.from_decomposition(skewed, quantize="int8")
        assert stored_bytes(layer) <= 0.27 * stored_bytes(kind.from_decomposition(parts))
        assert relative(layer.to_dense(torch.float64), exact) <= 0.015


@for_all
def test_a_save_a_cast_and_a_copy_reload_bit_for_bit_also_after_forwards(method, quantize, tmp_path):
    layer, _ = made(method, quantize)
    net = nn.ModuleDict({"rel": layer})
    inputs = rows(layer)
    before, expected = state_of(net), layer(*inputs)
    layer(*inputs).sum().backward()
    net.zero_grad()
    assert torch.equal(layer.train()(*inputs), expected)
    assert torch.equal(layer.eval()(*inputs), expected)
    layer.out_features  # noqa: B018  # nothing is computed lazily
    net.half().bfloat16().float()
    if layer.bias is not None:
        before["rel.bias" if method == "dense" else "rel.out_proj.bias"] = layer.bias.detach().clone()
    assert_same_state(net, before)
    expected = layer(*inputs)
    copied = copy.deepcopy(net)
    assert torch.equal(copied["rel"](*inputs), expected)
    cb.save(net, tmp_path / "net.safetensors")
    again = cb.load(tmp_path / "net.safetensors", nn.ModuleDict({"rel": nn.Bilinear(30, 23, 19)}))
    assert torch.equal(again["rel"](*inputs), expected)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    with torch.device("meta"):
        rank = () if layer.rank is None else (layer.rank,)
        fresh = nn.ModuleDict({"rel": type(layer)(30, 23, 19, *rank, quantize=quantize)})
    fresh.load_state_dict(state, assign=True)
    assert torch.equal(fresh["rel"](*inputs), expected)


def in_mode(method, quantize, compute, **options):
    layer, _ = made(method, quantize, **options)
    if compute == "bitsandbytes" and missing() is not None:
        pytest.skip(missing())
    layer.set_compute(compute)
    return layer


@for_all
def test_a_mode_that_a_layer_does_not_have_is_an_error(method, quantize):
    layer, _ = made(method, quantize)
    modes = {compute for *kind, compute in COMPUTES if kind == [method, quantize]}
    assert {*layer.computes} == modes - ({"bitsandbytes"} if missing() else set())
    for compute in {"bfloat16", "int8", "bitsandbytes", "resident", "fast", None, 8} - {*layer.computes}:
        with pytest.raises(ConfigError, match="`compute` should be one of"):
            layer.set_compute(compute)


@pytest.mark.parametrize(
    ("method", "quantize", "compute"),
    [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in COMPUTES],
)
def test_it_compiles_whole_and_exports(method, quantize, compute):
    layer = in_mode(method, quantize, compute).eval()
    inputs = rows(layer)
    expected = layer(*inputs).detach()
    layer.requires_grad_(False)
    torch.compiler.reset()  # each case is a compilation of the same code
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(layer, inputs).module()
    for graph in (compiled, exported):  # which sums in another order
        assert relative(graph(*inputs), expected) < (CHANGE["bfloat16"] if compute == "bfloat16" else 1e-5)


@pytest.mark.parametrize(("method", "quantize", "compute"), COMPUTES)
class TestComputeModes:
    def test_outputs_and_gradients_are_those_of_the_dense_weight(self, method, quantize, compute):
        layer = in_mode(method, quantize, compute)
        inputs = [value.requires_grad_() for value in rows(layer)]
        layer.train()
        output = layer(*inputs)
        wanted = [*inputs, layer.bias]
        found = torch.autograd.grad(output.square().sum(), wanted)
        wide = [value.detach().double().requires_grad_() for value in wanted]
        exact = reference.bilinear_dense(wide[0], wide[1], layer.to_dense(torch.float64), wide[2])
        bound = CHANGE.get(compute, 1e-5)
        assert relative(output.detach(), exact.detach()) < bound
        for gradient, expected in zip(found, torch.autograd.grad(exact.square().sum(), wide), strict=True):
            assert relative(gradient, expected) < bound
        assert torch.equal(layer.eval()(*inputs), output)

    @pytest.mark.parametrize("derived", [False, True])
    def test_derivatives_by_what_both_inputs_are_computed_from(self, method, quantize, compute, derived):
        layer = in_mode(method, quantize, compute, shape=(19, 23, 23))
        derivatives = []
        for dtype in (torch.float32, torch.float64):
            input = normal(5, 23, seed=20, dtype=dtype).requires_grad_()
            hidden = input.tanh() if derived else input
            inputs = hidden, (hidden.sigmoid() if derived else hidden)
            if dtype == torch.float32:
                output = layer(*inputs)
            else:
                output = reference.bilinear_dense(*inputs, layer.to_dense(dtype), layer.bias.to(dtype))
            loss = output.square().sum()
            (plain,) = torch.autograd.grad(loss, input, retain_graph=True)
            (first,) = torch.autograd.grad(loss, input, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), input)
            derivatives.append((plain, first.detach(), second))
        for found, expected in zip(*derivatives, strict=True):
            assert relative(found, expected) < CHANGE.get(compute, 1e-5)

    def test_rows_are_independent(self, method, quantize, compute):
        layer = in_mode(method, quantize, compute)
        for count in (0, 1, 33):
            input1, input2 = rows(layer, count)
            output = layer(input1, input2)
            assert output.shape == (count, layer.out_features)
            for k in range(count):
                assert relative(output[k].detach(), layer(input1[k], input2[k]).detach().double()) < 1e-5

    def test_fewer_rows_than_it_is_for_are_computed_on_the_fly(self, method, quantize, compute):
        layer, plain = in_mode(method, quantize, compute), in_mode(method, quantize, "on_the_fly")
        every = layer(*rows(layer, 8))
        layer.set_compute(compute, rows=8)
        assert torch.equal(layer(*rows(layer, 8)), every)
        assert torch.equal(layer(*rows(layer, 7)), plain(*rows(layer, 7))) or compute == "bitsandbytes"

    def test_what_is_stored_does_not_change(self, method, quantize, compute):
        layer = in_mode(method, quantize, compute)
        other, _ = made(method, quantize)
        assert stored_bytes(layer) == stored_bytes(other)
        assert_same_state(layer, state_of(other))


@pytest.mark.parametrize("out", [1, 2, 7, 64])
@pytest.mark.parametrize("width", [1, 2, 7, 64])
def test_integer_products_are_exact_for_all_sizes(width, out):
    for count in (0, 1, 5, 40):
        # integers whose rows have a largest one of 127 are rounded to themselves
        input = (31 * normal(count, width, dtype=torch.float32)).round().clamp(-126, 126)
        input[:, :1] = 127
        weight = (40 * normal(out, width, seed=1, dtype=torch.float32)).round().clamp(-127, 127).to(torch.int8)
        found = int8_linear(input.double(), QuantizedTensor(FORMATS["int8"], "factor", weight.shape, weight))
        torch.testing.assert_close(found, input.double() @ weight.double().T / 128, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 1, 9), (2, 9, 1), (5, 13, 300), (4, 300, 13), (130, 40, 37)], ids=str)
def test_integer_bilinear_products_are_exact_for_all_sizes(shape):
    _, in1, in2 = shape
    weight = (40 * normal(*shape, dtype=torch.float32)).round().clamp(-127, 127).to(torch.int8)
    scale = (1e-3 * normal(*scale_grid(shape), seed=1, dtype=torch.float32).abs()).bfloat16()
    stored = QuantizedTensor(FORMATS["int8"], "weight", shape, weight, scale)
    for count in (0, 1, 2, 40):
        input1, input2 = normal(count, in1, seed=2), normal(count, in2, seed=3)
        longer = input1 if in1 > in2 else input2
        longer.mul_(31).round_().clamp_(-126, 126)[:, :1] = 127  # such rows are rounded to themselves
        exact = reference.bilinear_dense(input1, input2, decode_int8(weight, scale, torch.float64))
        torch.testing.assert_close(int8_bilinear(input1, input2, stored), exact, rtol=1e-11, atol=1e-9)
        halves = int8_bilinear(input1.half(), input2.half(), stored)
        assert halves.dtype == torch.float16
        assert count == 0 or relative(halves, exact) < 2e-3


@pytest.mark.parametrize("method", LAYERS)
@pytest.mark.parametrize("shape", [(5, 13, 64), (3, 9, 1), (1, 1, 1)], ids=str)
def test_integer_products_stay_accurate_at_extreme_magnitudes_and_show_nan(method, shape):
    for scale in (1e-30, 1e-6, 1e6, 1e30):
        layer, _ = made(method, "int8", shape, scale=scale, bias=False)
        if "int8" not in layer.computes:
            pytest.skip("only a core is left")
        layer.set_compute("int8")
        input1, input2 = rows(layer)
        exact = reference.bilinear_dense(input1.double(), input2.double(), layer.to_dense(torch.float64))
        assert relative(layer(input1, input2), exact) < 0.06
        assert bool(torch.isfinite(layer(0 * input1, input2)).all())
        input1[0, 0] = torch.nan
        found = layer(input1, input2)
        assert bool(found[0].isnan().any())
        assert bool(found[1:].isfinite().all())


class TestBitsOfTheApi:
    @pytest.mark.parametrize("compute", ["on_the_fly", "int8"])
    def test_a_layers_mode_replaces_its_cores_own(self, compute):
        layer, _ = made("tucker", "int8")
        layer.set_compute(compute)
        inputs = rows(layer)
        expected = layer(*inputs)
        layer.core.set_compute("int8")
        assert not torch.equal(layer(*inputs), expected)
        layer.set_compute(compute)
        assert torch.equal(layer(*inputs), expected)

    def test_a_layer_in_floating_point(self):
        layer = cb.CPBilinear.from_bilinear(bilinear(4, 5, 6), 2)
        with pytest.raises(ConfigError, match="the layer is in floating point"):
            layer.set_compute("int8")

    @for_factors
    def test_the_report_splits_the_error(self, method):
        layer = bilinear(30, 23, 19)
        with torch.no_grad():
            layer.weight.copy_(low_rank((19, 30, 23), 9, noise=0.3))
        config = cb.CPConfig(rank=9, quantize="nf4")
        if method == "tucker":
            config = cb.TuckerConfig(rank=(9,) * 3, quantize="nf4")
        reports = []
        for asked in (config, cb.DenseConfig(quantize="int8"), cb.DenseConfig()):
            model, report = cb.compress(nn.Sequential(layer), asked, force=True, measure_latency=False)
            reports.append(report.layers[0])
            assert reports[-1].weight_error == pytest.approx(weight_error(layer.weight, model[0]), rel=1e-9)
        of_factors, of_dense, exact = reports
        assert of_factors.truncation_error < of_factors.weight_error
        assert 0.01 < of_factors.quantization_error < 0.25
        assert of_factors.weight_error < of_factors.truncation_error + of_factors.quantization_error
        assert of_factors.compute == "on_the_fly"
        assert of_dense.truncation_error == 0
        assert of_dense.quantization_error == of_dense.weight_error > 0
        assert exact.quantization_error is None


@for_all
def test_bfloat16_computes_pairs_too_and_leaves_autocast_its_dtype(method, quantize):
    layer, plain = in_mode(method, quantize, "bfloat16"), in_mode(method, quantize, "on_the_fly")
    first, second = rows(layer, 6)
    pairs, exact = layer.pairwise(first, second[:4]), plain.pairwise(first, second[:4])
    assert pairs.dtype == torch.float32
    assert 1e-4 < relative(pairs.detach(), exact.detach().double()) < CHANGE["bfloat16"]
    layer.set_compute("bfloat16", rows=25)
    assert torch.equal(layer.pairwise(first, second[:4]), exact)
    layer.set_compute("bfloat16")
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(layer(first, second), plain(first, second))
    assert layer(first.double(), second.double()).dtype == torch.float64
    assert layer(first[:0], second[:0]).shape == (0, layer.out_features)
