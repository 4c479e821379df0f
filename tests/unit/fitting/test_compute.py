"""How quantized layers compute: chosen by measurement, told in the report, kept in files."""

import json

import pytest
import torch
from layers import made, rows
from support import bilinear, command_line, layer_inputs
from torch import nn

import compress_bilinear as cb
from compress_bilinear.config import MaxError
from compress_bilinear.errors import ConfigError
from compress_bilinear.fitting import (
    Latency,
    OutputError,
    choose_compute,
    reason_against_rounded_inputs,
    stored_bytes,
    timing_inputs,
)
from compress_bilinear.fitting import _compute as computing
from compress_bilinear.planning import _verdict as selection
from compress_bilinear.quantization import _decode_bnb
from compress_bilinear.report import Report

CONFIGS = {
    "dense": cb.DenseConfig(quantize="int8"),
    "cp": cb.CPConfig(rank=40, quantize="int8"),
    "tucker": cb.TuckerConfig(rank=(7, 9, 8), quantize="int8"),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rel = bilinear(24, 20, 12)

    def forward(self, input1, input2):
        return self.rel(input1, input2)


def batches(count=12):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(32, 24, generator=generator), torch.randn(32, 20, generator=generator)) for _ in range(count)]


@pytest.fixture
def timed(monkeypatch):
    """Latencies as a test wants them, by mode, and how often they were asked for."""
    known, asked = {}, []

    def latencies(calls, device, seconds=1.0):
        for call in calls.values():
            call()
        asked.append(list(calls))
        return {mode: known.get(mode, Latency(9.0, 8.9, 9.1)) for mode in calls}

    monkeypatch.setattr(computing, "latencies", latencies)
    known["asked"] = asked
    return known


class TestChoice:
    @pytest.mark.parametrize(
        ("int8", "expected"),
        [
            ((9, 8, 10), "on_the_fly"),  # within the spread
            ((2, 2, 2), "int8"),
            ((2, 1, 9.2), "on_the_fly"),  # faster in the median, but not beyond the spread
        ],
    )
    def test_the_fastest_beyond_the_spread_is_taken(self, timed, int8, expected):
        timed |= {"int8": Latency(*int8)}
        layer, _ = made("cp", "int8")
        choice = choose_compute(layer, "fastest", rows(layer))
        assert choice.compute == layer.compute == expected
        assert [one.mode for one in choice.modes if one.chosen] == [expected]
        latencies = {one.mode: one.latency_ms for one in choice.modes}
        assert latencies == {"on_the_fly": 9, "bfloat16": 9, "int8": int8[0], "bitsandbytes": None}

    def test_a_mode_with_a_reason_against_it_is_not_taken(self, timed):
        timed |= {"int8": Latency(1, 1, 1)}
        layer, _ = made("dense", "int8")
        choice = choose_compute(
            layer, "fastest", rows(layer), reason_against=lambda one: "no" if one.compute == "int8" else None
        )
        assert choice.compute == "on_the_fly"
        refused = {one.mode: one.refused for one in choice.modes}
        assert (refused["on_the_fly"], refused["int8"]) == (None, "no")
        assert "decoded by torch alone" in refused["bitsandbytes"]

    def test_a_mode_that_changes_the_outputs_by_more_than_is_allowed_is_not_taken(self, timed):
        timed |= {"int8": Latency(1, 1, 1), "bfloat16": Latency(2, 2, 2)}
        layer, _ = made("dense", "int8")
        assert choose_compute(layer, "fastest", rows(layer), most_change=0.02).compute == "int8"
        assert choose_compute(layer, "fastest", rows(layer), most_change=0.0045).compute == "bfloat16"
        choice = choose_compute(layer, None, rows(layer), most_change=1e-4)
        assert choice.compute == "on_the_fly"
        refused = {one.mode: one.refused for one in choice.modes}
        assert refused.keys() == {"on_the_fly", "bfloat16", "int8"}
        assert "changes the outputs by 0.00" in refused["bfloat16"]

    def test_it_is_taken_from_the_fewest_rows_on_for_which_it_is_faster(self, monkeypatch):
        asked = []

        def latencies(calls, device, seconds=1.0):
            asked.append(len(next(iter(calls.values())).args[0]))
            fly = Latency(*[asked[-1]] * 3)
            return {mode: fly if mode == "on_the_fly" else Latency(*[0.5 * asked[-1] + 10] * 3) for mode in calls}

        monkeypatch.setattr(computing, "latencies", latencies)
        layer, _ = made("cp", "nf4")
        choice = choose_compute(layer, None, rows(layer, 200))
        assert asked == [200, 50, 13]
        assert [one.rows for one in choice.modes] == [1, 50, 1]
        assert (layer.compute, layer.compute_rows) == ("bfloat16", 50)

    def test_the_time_for_measuring_is_given(self, monkeypatch):
        given = []
        real = computing.latencies
        monkeypatch.setattr(computing, "latencies", lambda *args: given.append(args[2]) or real(*args))
        layer, _ = made("dense", "int8")
        choose_compute(layer, "fastest", rows(layer, 1), seconds=0.02)
        assert given == [0.02]

    @pytest.mark.parametrize("asked", ["on_the_fly", "int8"])
    def test_a_mode_that_is_given_is_taken_without_or_with_its_latency(self, timed, asked):
        layer, _ = made("dense", "int8")
        choice = choose_compute(layer, asked, rows(layer), timed=False)
        assert (choice.compute, choice.latencies, timed["asked"]) == (asked, {}, [])
        assert all(one.latency_ms is None for one in choice.modes)
        assert choose_compute(layer, asked, rows(layer)).latencies.keys() == {"on_the_fly", "bfloat16", "int8"}

    @pytest.mark.parametrize(
        ("bitsandbytes", "expected"), [((1, 1, 1), "bitsandbytes"), ((9, 8, 10), "on_the_fly")], ids=str
    )
    def test_bitsandbytes_is_taken_where_it_is_faster_and_changes_nothing(self, timed, bitsandbytes, expected):
        timed |= {"bitsandbytes": Latency(*bitsandbytes)}
        layer, _ = made("cp", "nf4")
        choice = choose_compute(layer, "fastest", rows(layer))
        assert choice.compute == layer.compute == expected
        known = {one.mode: one for one in choice.modes}["bitsandbytes"]
        assert (known.output_change, known.refused) == (0, None)

    @pytest.mark.parametrize(("asked", "told"), [("on_the_fly", False), ("bitsandbytes", True)])
    def test_bitsandbytes_is_not_imported_for_what_does_not_want_it(self, monkeypatch, asked, told):
        imported = []
        monkeypatch.setattr(_decode_bnb, "imported", lambda: imported.append(1) or OSError("not here"))
        layer, _ = made("dense", "nf4")
        choice = choose_compute(layer, asked, rows(layer), timed=False)
        assert bool(imported) == told
        assert choice.compute == "on_the_fly"
        refused = {one.mode: one.refused for one in choice.modes}.get("bitsandbytes")
        assert refused == ("bitsandbytes cannot be imported: not here" if told else None)

    def test_what_each_mode_changes(self):
        layer, _ = made("dense", "int8")
        known = {one.mode: one for one in choose_compute(layer, "fastest", rows(layer)).modes}
        assert known["on_the_fly"].output_change == 0
        assert 0.002 < known["int8"].output_change < 0.02

    @pytest.mark.parametrize(("method", "quantize"), [("dense", "nf4"), ("cp", "nf4"), ("tucker", "nf4")])
    def test_a_layer_without_the_mode_computes_on_the_fly_and_says_why(self, method, quantize):
        layer, _ = made(method, quantize)
        choice = choose_compute(layer, "int8", rows(layer))
        assert choice.compute == "on_the_fly"
        assert "4 bits" in {one.mode: one for one in choice.modes}["int8"].refused
        with pytest.raises(ConfigError, match="Found 'int8': its values have 4 bits"):
            layer.set_compute("int8")

    def test_a_tucker_of_which_nothing_but_the_core_is_left_has_no_integer_mode(self):
        layer = cb.TuckerBilinear.from_bilinear(bilinear(5, 4, 3), (3, 5, 4), quantize="int8")
        assert layer.computes == ("on_the_fly", "bfloat16")
        assert "none of its projections" in layer.refused_compute("int8")


def test_rows_are_those_that_the_layer_saw_over_and_over():
    layer = bilinear(3, 2, 4)
    seen = layer_inputs(torch.arange(6.0).view(2, 3), torch.arange(4.0).view(2, 2))
    first, second = timing_inputs(layer, 5, seen)
    assert first[:, 0].tolist() == [0, 3, 0, 3, 0]
    assert second[:, 1].tolist() == [1, 3, 1, 3, 1]
    assert [value.shape for value in timing_inputs(layer, 5)] == [(5, 3), (5, 2)]


def test_the_reason_against_a_mode_is_about_the_outputs_of_rounded_inputs_alone():
    layer = bilinear(24, 20, 12)
    first, second = (torch.cat(values) for values in zip(*batches(), strict=True))
    measured = OutputError(layer, layer_inputs(first, second, 12))
    module = cb.DenseBilinear.from_bilinear(layer, quantize="int8")
    error = measured.of(module)
    limit = MaxError(1.2 * error, on="output")
    assert reason_against_rounded_inputs(module, limit, measured) is None
    module.set_compute("int8")
    assert "misses" in reason_against_rounded_inputs(module, limit, measured)
    assert reason_against_rounded_inputs(module, MaxError(0.5, on="output"), measured) is None
    assert reason_against_rounded_inputs(module, MaxError(1.2 * error), measured) is None


class TestCompress:
    @pytest.mark.parametrize("method", CONFIGS)
    def test_the_report_is_of_the_mode_that_the_layer_has(self, method, monkeypatch, tmp_path):
        computed = []
        original = selection.time_replacement

        def watched(layer, module, batch_size, seconds):
            computed.append(module.compute)
            return original(layer, module, batch_size, seconds=0.01)

        monkeypatch.setattr(selection, "time_replacement", watched)
        config, net = CONFIGS[method], Net()
        small, report = cb.compress(net, config, calibration=batches(), compute="int8", force=True)
        _, plain = cb.compress(net, config, calibration=batches(), force=True, measure_latency=False)
        (layer,) = report.layers
        assert computed == [layer.compute] == ["int8"]
        assert small.rel.compute == "int8"
        assert {one.mode for one in layer.compute_modes} == {"on_the_fly", "bfloat16", "int8"}
        assert layer.output_error != plain.layers[0].output_error  # rounded inputs count
        assert plain.layers[0].compute_modes == ()
        assert Report.from_json(report.to_json()) == report
        assert "compute modes: on the fly (" in str(report).replace("\n", " ")
        assert report.config["compute"] == "int8"
        inputs = batches(1)[0]
        cb.save(small, tmp_path / "small.safetensors")
        again = cb.load(tmp_path / "small.safetensors", Net())
        assert again.rel.compute == "int8"
        assert torch.equal(again(*inputs), small(*inputs))

    def test_the_fastest_of_each_layer(self, timed):
        timed |= {"int8": Latency(1, 1, 1)}
        net = nn.Sequential(bilinear(9, 8, 7), bilinear(9, 8, 7, seed=1))
        configs = {"0": CONFIGS["dense"], "1": cb.DenseConfig()}
        small, report = cb.compress(net, configs, compute="fastest", force=True)
        assert [layer.compute for layer in report.layers] == ["int8", None]
        assert small[0].compute == "int8"
        assert report.layers[0].bytes_after == stored_bytes(small[0])

    def test_the_fastest_is_the_default_where_latencies_are_measured(self, timed, tmp_path):
        timed |= {"bfloat16": Latency(1, 1, 1)}
        net, options = Net(), {"calibration": batches(), "force": True}
        small, report = cb.compress(net, CONFIGS["cp"], **options)
        assert small.rel.compute == report.layers[0].compute == "bfloat16"
        small.rel.set_compute("bfloat16", rows=7)
        cb.save(small, tmp_path / "small.safetensors")
        again = cb.load(tmp_path / "small.safetensors", Net()).rel
        assert (again.compute, again.compute_rows) == ("bfloat16", 7)
        for others in ({"measure_latency": False}, {"compute": "on_the_fly"}, {"compute_error": 1e-6}):
            kept, _ = cb.compress(net, CONFIGS["cp"], **options, **others)
            assert kept.rel.compute == "on_the_fly"

    @pytest.mark.slow
    def test_rounded_inputs_that_miss_a_target_are_not_taken(self, timed):
        timed |= {"int8": Latency(1, 1, 1)}
        net = Net()
        plain = cb.plan(net, CONFIGS["dense"], calibration=batches(), compute="on_the_fly")
        error = plain.report.layers[0].output_error
        config = cb.AutoConfig(error=MaxError(1.1 * error, on="output"))
        layer = cb.plan(net, config, calibration=batches(), compute="fastest").report.layers[0]
        assert (layer.method, layer.quantize, layer.compute) == ("dense", "int8", "on_the_fly")
        assert "misses" in {one.mode: one for one in layer.compute_modes}["int8"].refused

    def test_refining_keeps_the_mode(self):
        config = cb.CPConfig(rank=6, quantize="int8")
        net = Net()
        options = {"calibration": batches(), "compute": "int8", "refine": "network", "max_seconds": 2}
        small, _ = cb.compress(net, config, **options)
        assert small.rel.compute == "int8"
        assert small.rel.in1_proj.integer_rows

    def test_what_was_chosen_to_meet_a_limit_does_not_miss_it_by_its_mode(self):
        net, asked = Net(), {"calibration": batches(), "measure_latency": False}
        dense = cb.plan(net, cb.DenseConfig(quantize="int8"), **asked).report.layers[0]
        config = cb.AutoConfig(error=1.1 * dense.output_error)
        (chosen,) = cb.plan(net, config, compute="int8", **asked).report.layers
        assert chosen.decision == "replaced"
        assert chosen.output_error <= 1.1 * dense.output_error
        assert chosen.compute == "on_the_fly"
        assert "misses" in {mode.mode: mode.refused for mode in chosen.compute_modes}["int8"]

    @pytest.mark.parametrize(
        ("config", "asked", "message"),
        [
            (CONFIGS["cp"], {"compute": "fast"}, "`compute` should be one of"),
            (CONFIGS["cp"], {"compute": "fastest", "measure_latency": False}, "chosen by latencies"),
            (CONFIGS["cp"], {"compute_error": -0.1}, "`compute_error` should be a number of at least 0. Found -0.1"),
            (cb.CPConfig(rank=3), {"compute": "int8"}, "needs a config with `quantize`"),
            (CONFIGS["cp"], {"compute": "resident"}, "no longer a mode: `cb.dequantize"),
        ],
    )
    def test_mistakes(self, config, asked, message):
        with pytest.raises(ConfigError, match=message):
            cb.plan(Net(), config, **asked)


class TestFiles:
    def test_a_file_of_bitsandbytes_mode_loads_where_it_cannot_be_used(self, tmp_path, without_bitsandbytes):
        net = nn.Sequential(cb.TuckerBilinear.from_bilinear(bilinear(9, 8, 7), (3, 4, 4), quantize="nf4"))
        cb.set_compute(net, "bitsandbytes")
        inputs = rows(net[0])
        expected = net[0](*inputs)
        cb.save(net, tmp_path / "net.safetensors")
        again = cb.load(tmp_path / "net.safetensors", nn.Sequential(bilinear(9, 8, 7)))[0]
        assert (again.compute, again.core.weight.backend) == ("bitsandbytes", "bitsandbytes")
        assert torch.equal(again(*inputs), expected)
        without_bitsandbytes()
        with pytest.warns(UserWarning, match="computes on the fly: bitsandbytes is not installed"):
            plain = cb.load(tmp_path / "net.safetensors", nn.Sequential(bilinear(9, 8, 7)))[0]
        assert (plain.compute, plain.core.weight.backend) == ("on_the_fly", "torch")
        assert torch.equal(plain(*inputs), expected)

    def test_a_file_of_an_earlier_version_with_resident_weights_computes_on_the_fly(self, tmp_path):
        net = nn.Sequential(cb.DenseBilinear.from_bilinear(bilinear(6, 5, 4), quantize="int8"))
        net[0].compute = "resident"  # a mode that there was
        cb.save(net, tmp_path / "net.safetensors")
        again = cb.load(tmp_path / "net.safetensors", nn.Sequential(bilinear(6, 5, 4)))[0]
        assert again.compute == "on_the_fly"
        inputs = rows(again)
        assert torch.equal(again(*inputs), net[0](*inputs))

    def test_a_description_with_a_mode_that_the_layer_lacks_computes_on_the_fly(self, tmp_path):
        net = nn.Sequential(cb.DenseBilinear.from_bilinear(bilinear(6, 5, 4), quantize="nf4"))
        net[0].compute = "int8"  # not by `set_compute`
        cb.save(net, tmp_path / "net.safetensors")
        with pytest.warns(UserWarning, match=r"Layer '0' of the file computes on the fly: .* 4 bits"):
            again = cb.load(tmp_path / "net.safetensors", nn.Sequential(bilinear(6, 5, 4)))[0]
        assert again.compute == "on_the_fly"

    def test_the_command_line_writes_it(self, tmp_path, monkeypatch, capsys):
        torch.save(Net().state_dict(), tmp_path / "net.pt")
        target = str(tmp_path / "small.safetensors")
        options = ["--method", "dense", "--quantize", "int8", "--compute", "int8", "--json", "--batch-size", "8", "-q"]
        status, out, _ = command_line(monkeypatch, capsys, "compress", str(tmp_path / "net.pt"), "-o", target, *options)
        assert (status, json.loads(out)["layers"][0]["compute"]) == (0, "int8")
        assert cb.load(target, Net()).rel.compute == "int8"
