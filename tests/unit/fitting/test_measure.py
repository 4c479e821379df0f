import pytest
import torch
from support import assert_matches_reference, bilinear, layer_inputs, low_rank
from torch import Tensor, nn

from compress_bilinear import ops
from compress_bilinear.decomposition import cp, tucker
from compress_bilinear.fitting import Latency, LayerInputs, OutputError, Timing, _latency, _measure
from compress_bilinear.modules import CPBilinear, DenseBilinear, TuckerBilinear

SHAPE = (8, 12, 10)  # (O, I, J)
CPU = torch.device("cpu")


def replacement(layer: nn.Bilinear, method: str, quantize: str | None = None):
    weight, bias = layer.weight.detach(), layer.bias
    match method:
        case "cp":
            return CPBilinear.from_decomposition(cp(weight, 3), bias, quantize=quantize)
        case "tucker":
            return TuckerBilinear.from_decomposition(tucker(weight, (3, 4, 5)), bias, quantize=quantize)
        case _:
            return DenseBilinear.from_bilinear(layer, quantize=quantize)


@pytest.fixture(params=["cp", "tucker", "dense"])
def method(request):
    return request.param


@pytest.fixture(params=[None, "int8"])
def quantize(request):
    return request.param


@pytest.fixture
def layer() -> nn.Bilinear:
    found = bilinear(12, 10, 8)
    with torch.no_grad():
        found.weight.copy_(low_rank(SHAPE, 3, noise=0.1))
    return found


def rows(count: int) -> LayerInputs:
    generator = torch.Generator().manual_seed(0)
    return layer_inputs(torch.randn(count, 12, generator=generator), torch.randn(count, 10, generator=generator))


def output_error(layer, module, inputs):
    return OutputError(layer, inputs).of(module)


class TestBytes:
    def test_parameters_and_buffers_count(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        # 16 of the linear, 4 x 4 of the normalisation, and one int64 counter
        assert _measure.stored_bytes(model) == 4 * (16 + 16) + 8
        assert _measure.parameter_count(model) == 16 + 8

    def test_half_precision_takes_half(self):
        assert _measure.stored_bytes(bilinear(12, 10, 8, dtype=torch.bfloat16)) == 2 * 968

    def test_what_is_shared_counts_once(self):
        layer, other = bilinear(12, 10, 8), nn.Linear(8, 8, bias=False)
        other.bias = layer.bias
        model = nn.ModuleList([layer, layer, other])
        assert _measure.stored_bytes(model) == 4 * (968 + 64)
        assert _measure.parameter_count(model) == 968 + 64

    def test_what_has_no_size_yet_does_not_count(self):
        assert _measure.stored_bytes(nn.LazyLinear(3, bias=False)) == 0

    def test_int8_counts_values_and_scales(self, layer):
        dense = replacement(layer, "dense", "int8")
        assert _measure.stored_bytes(dense) == 960 + 2 * 8 * 4 + 4 * 8  # short rows share a scale by three
        assert _measure.parameter_count(dense) == 968


class TestErrors:
    def test_weight_error_is_the_float64_residual_of_what_is_stored(self, layer, method, quantize):
        module = replacement(layer, method, quantize)
        exact = layer.weight.detach().double()
        expected = float((exact - module.to_dense(torch.float64).detach()).norm() / exact.norm())
        assert _measure.weight_error(layer.weight, module) == pytest.approx(expected, rel=1e-9, abs=1e-15)

    def test_exact_layers_have_no_weight_error(self, layer):
        assert _measure.weight_error(layer.weight, replacement(layer, "dense")) == 0

    @pytest.mark.parametrize("bias", [True, False])
    def test_output_error_is_against_float64_and_without_bias_below(self, layer, method, quantize, bias):
        if bias:
            with torch.no_grad():
                layer.bias += 100  # in the denominator it would hide any error
        else:
            layer.bias = None
        module, inputs = replacement(layer, method, quantize), rows(4120)
        input1, input2 = inputs.held_out  # more than two blocks
        wide = (input1.double(), input2.double(), layer.weight.detach().double())
        exact = ops.reference.bilinear_dense(*wide)
        added = 0 if layer.bias is None else layer.bias.detach().double()
        with torch.no_grad():
            found = module(input1, input2).double() - added
        expected = float((exact - found).norm() / exact.norm())
        error = output_error(layer, module, inputs)
        assert error == pytest.approx(expected, rel=1e-3, abs=1e-6)  # rounding differs from block to block

    def test_a_bias_does_not_flatter(self, layer):
        inputs = rows(64)
        plain = output_error(layer, replacement(layer, "dense", "int8"), inputs)
        with torch.no_grad():
            layer.bias += 100
        biased = output_error(layer, replacement(layer, "dense", "int8"), inputs)
        assert biased == pytest.approx(plain, rel=1e-2)

    def test_zero_against_zero_is_no_error_of_the_weight_and_says_nothing_of_the_output(self, layer):
        with torch.no_grad():
            layer.weight.zero_()
        module = replacement(layer, "dense", "int8")
        assert _measure.weight_error(layer.weight, module) == 0
        assert output_error(layer, module, rows(4)) is None

    @pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
    def test_the_scale_of_the_rows_does_not_matter(self, scale):
        layer = bilinear(12, 10, 8, bias=False, dtype=torch.float64)
        module = replacement(layer, "dense", "int8")
        inputs = [torch.randn(8, size, generator=torch.Generator().manual_seed(0)).double() for size in (12, 10)]
        plain = output_error(layer, module, layer_inputs(inputs[0], inputs[1]))
        scaled = output_error(layer, module, layer_inputs(inputs[0] * scale, inputs[1]))
        assert plain is not None
        assert scaled == pytest.approx(plain, rel=1e-6)


class TestLatencies:
    def test_quartiles_are_in_order_and_every_call_is_made(self):
        made = {"a": 0, "b": 0}

        def call(name):
            made[name] += 1
            torch.ones(200, 200) @ torch.ones(200, 200)

        found = _latency.latencies({name: lambda name=name: call(name) for name in made}, CPU, seconds=0.02)
        assert set(found) == {"a", "b"}
        for name, latency in found.items():
            assert 0 < latency.lower <= latency.median <= latency.upper
            assert made[name] >= 8  # two first tries, and two calls in each of three rounds

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(12, 10, 8), (7, 5, 80), (5, 6, 1), (1, 9, 3)])
    def test_every_exact_contestant_computes_the_layer(self, shape, bias):
        layer = bilinear(*shape, bias=bias)
        x1, x2 = torch.randn(33, shape[0]), torch.randn(33, shape[1])
        wide = [t.detach().double() for t in (x1, x2, layer.weight)]
        expected = ops.reference.bilinear_dense(*wide, layer.bias.detach().double() if bias else None)
        calls = _latency.dense_calls(layer, x1, x2)
        assert set(calls) == {"in1_first", "in2_first", "outer", "one_gemm", "DenseBilinear"}
        for call in calls.values():
            assert_matches_reference(call(), expected)

    def test_contestants_that_need_too_much_memory_are_left_out(self):
        layer = nn.Bilinear(1024, 512, 4, device="meta")
        x1, x2 = torch.empty(2**15, 1024, device="meta"), torch.empty(2**15, 512, device="meta")
        assert set(_latency.dense_calls(layer, x1, x2)) == {"in1_first", "in2_first", "DenseBilinear"}

    def test_figures_are_positive_and_nothing_is_disturbed(self, layer, method):
        random = torch.get_rng_state()
        found = _latency.time_replacement(layer, replacement(layer, method), 16, seconds=0.02)
        assert torch.equal(torch.get_rng_state(), random)
        assert layer.weight.grad is None
        assert found.batch_size == 16
        for latency in (found.before, found.after, found.dense):
            assert 0 < latency.lower <= latency.median <= latency.upper
        assert found.dense.median <= found.before.median
        assert found.speedup > 0
        assert found.speedup_vs_dense > 0

    def test_inputs_have_the_batch_size_and_the_layers_dtype(self, monkeypatch):
        seen: list[Tensor] = []
        layer = bilinear(12, 10, 8, dtype=torch.bfloat16)
        module = DenseBilinear.from_bilinear(layer)
        monkeypatch.setattr(DenseBilinear, "forward", lambda self, x1, x2: seen.extend((x1, x2)))
        _latency.time_replacement(layer, module, 3, seconds=0.001)
        assert {(tuple(x.shape), x.dtype) for x in seen} == {((3, 12), torch.bfloat16), ((3, 10), torch.bfloat16)}

    @pytest.mark.parametrize(
        ("medians", "order", "speedup", "vs_dense"),
        [
            ({"before": 8.0, "after": 2.0}, "one_gemm", 4.0, 2.5),
            ({"before": 4.0, "after": 8.0}, "nn.Bilinear", 0.5, 0.5),
        ],
    )
    def test_best_dense_counts_nn_bilinear_in(self, layer, monkeypatch, medians, order, speedup, vs_dense):
        def latencies(calls, device, seconds):
            of = {name: medians.get(name, 5.0 if name == "one_gemm" else 6.0) for name in calls}
            return {name: Latency(value, value, value) for name, value in of.items()}

        monkeypatch.setattr(_latency, "latencies", latencies)
        monkeypatch.setattr(_latency, "_first_try", lambda call, device: 1.0)
        found = _latency.time_replacement(layer, replacement(layer, "dense"), 16)
        assert (found.dense_order, found.speedup, found.speedup_vs_dense) == (order, speedup, vs_dense)

    @pytest.mark.parametrize(("seconds", "exact"), [(1e-3, ["in1_first", "outer"]), (1.0, ["in1_first"])])
    def test_contestants_that_start_behind_are_not_timed(self, layer, monkeypatch, seconds, exact):
        timed: list[str] = []
        tries = iter([seconds * each for each in (1.0, 10.0, 1.5, 10.0, 10.0)])
        monkeypatch.setattr(_latency, "_first_try", lambda call, device: next(tries))

        def latencies(calls, device, seconds):
            timed.extend(calls)
            return dict.fromkeys(calls, Latency(1, 1, 1))

        monkeypatch.setattr(_latency, "latencies", latencies)
        _latency.time_replacement(layer, replacement(layer, "dense"), 16)
        assert timed == ["before", "after", *exact]  # of long calls the best alone


def test_speedups_are_of_the_medians():
    timing = Timing(Latency(6, 1, 9), Latency(2, 1, 9), Latency(3, 1, 9), "outer", 1)
    assert (timing.speedup, timing.speedup_vs_dense) == (3, 1.5)


def test_the_environment_says_what_figures_hold_for():
    found = _measure.environment(CPU, torch.bfloat16)
    assert (found["device"], found["dtype"]) == ("cpu", "bfloat16")
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert all(found[key] for key in ("processor", "python", "compress_bilinear", "numpy", "tensorly", "bitsandbytes"))
