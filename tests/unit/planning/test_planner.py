import pytest
import torch
from support import bilinear, layer_inputs
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.errors import ConfigError
from compress_bilinear.fitting import (
    Candidate,
    Latency,
    OutputFitting,
    Search,
    WeightFitting,
    stored_bytes,
)
from compress_bilinear.fitting import _search as automatic
from compress_bilinear.report import Report

IN1, IN2, OUT = 6, 5, 4


class Net(nn.Module):
    """Two layers, one that is shared, and one whose weight is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a = bilinear(IN1, IN2, OUT, seed=1)
        self.b = self.again = bilinear(IN1, IN2, OUT, seed=2)
        self.zero = bilinear(IN1, IN2, OUT)
        nn.init.zeros_(self.zero.weight)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.a(x1, x2) + self.b(x1, x2) + self.again(x1, x2) + self.zero(x1, x2)


def rows(count: int = 160) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(count, IN1, generator=generator)
    return first, first[:, :IN2] + 0.3 * torch.randn(count, IN2, generator=generator)


def planned(config, **options) -> cb.Plan:
    known = {"calibration": [rows()], "measure_latency": False}
    return cb.plan(Net(), config, **known | options)


@pytest.mark.parametrize("calibration", [None, [rows()]], ids=["weight", "output"])
def test_a_size_is_met_by_all_layers_together(calibration):
    plan = planned(cb.AutoConfig(size=0.3), calibration=calibration)
    *layers, zero = plan.report.layers
    assert [layer.name for layer in layers] == ["a", "b"]
    assert zero.decision == "kept"
    assert "all zero" in zero.reason
    assert sum(layer.bytes_after for layer in layers) <= 0.3 * sum(layer.bytes_before for layer in layers)
    for front in plan.fronts.values():
        assert ("dense", "int8") in {(point.method, point.quantize) for point in front}
        assert sum(point.chosen for point in front) == 1
    new, _ = plan.apply()
    assert new.b is new.again
    assert Report.from_dict(plan.report.to_dict()).layers[0].front == plan.report.layers[0].front
    again = planned(cb.AutoConfig(size=0.3), calibration=calibration)
    assert again.fronts == plan.fronts


def test_an_error_is_met_by_every_layer_and_not_larger_than_by_a_single_method():
    auto = planned(cb.AutoConfig(error=0.3)).report.layers[:2]
    assert all(layer.output_error <= 0.3 for layer in auto if layer.decision == "replaced")
    for kind in (cb.CPConfig, cb.TuckerConfig):
        single = planned(kind(rank=cb.MaxError(0.3, on="output"), quantize="int8")).report.layers[:2]
        for chosen, other in zip(auto, single, strict=True):
            assert chosen.bytes_after <= other.bytes_after
            assert other.decision == "kept" or other.output_error <= 0.3


def test_two_auto_configs_allocate_apart():
    configs = {"a": cb.AutoConfig(size=0.2), "*": cb.AutoConfig(size=0.6)}
    first, second, _ = planned(configs).report.layers
    assert first.bytes_after <= 0.2 * first.bytes_before
    assert 0.2 * second.bytes_before < second.bytes_after <= 0.6 * second.bytes_before


@pytest.mark.slow
def test_speed_takes_the_fastest_that_meets_the_error(monkeypatch):
    def measured(calls, device, seconds=1.0):
        return {name: Latency(10.0 - int(name) % 9, 1.0, 1.0) for name in calls}

    monkeypatch.setattr(automatic, "latencies", measured)
    plan = planned(cb.AutoConfig(error=0.5, prefer="speed"))
    for front in plan.fronts.values():
        (chosen,) = (point for point in front if point.chosen)
        assert chosen.latency_ms == min(point.latency_ms for point in front if point.output_error <= 0.5)


@pytest.mark.slow
def test_16_bits_and_for_speed_the_exact_dense_layer_compete():
    formats = {(point.method, point.quantize) for point in planned({"a": cb.AutoConfig(error=0.3)}).fronts["a"]}
    assert ("dense", "bf16") in formats
    assert ("dense", None) not in formats
    quick = planned({"a": cb.AutoConfig(error=0.3, prefer="speed")}, measure_latency=True)
    assert ("dense", None) in {(point.method, point.quantize) for point in quick.fronts["a"]}
    # in half precision there are 16 bits already
    layer = bilinear(IN1, IN2, OUT, dtype=torch.bfloat16)
    batches = [tuple(value.bfloat16() for value in rows())]
    (front,) = cb.plan(layer, cb.AutoConfig(size=0.6), calibration=batches, measure_latency=False).fronts.values()
    assert not any(point.quantize == "bf16" for point in front)


class Everything(Search):
    """Leaves nothing out."""

    def _may_win(self, config, limit):
        return True


@pytest.mark.slow
def test_what_cannot_win_is_not_searched_for():
    layer, inputs, found = Net().a, layer_inputs(*rows(), 160), []
    for kind in (Search, Everything):
        search = kind(OutputFitting(layer, inputs))
        search.within(0.3)
        found.append(search.candidates)
    few, all_of_them = found
    assert len(few) < 0.8 * len(all_of_them)
    smallest = [min(each.bytes for each in candidates if each.error <= 0.3) for candidates in found]
    assert smallest[0] == smallest[1]


def test_a_size_has_every_format_at_the_largest_it_can_fill():
    layer = bilinear(16, 16, 16)
    scale = torch.arange(1, 17) ** -0.5
    layer.weight.data *= scale[:, None, None] * scale[:, None] * scale
    (auto,) = cb.plan(layer, cb.AutoConfig(size=0.13), measure_latency=False).report.layers
    for kind in (cb.CPConfig, cb.TuckerConfig):
        config = kind(rank=cb.MaxSize(0.11), quantize="nf4")
        (single,) = cb.plan(layer, config, measure_latency=False).report.layers
        assert auto.weight_error <= single.weight_error


def test_speed_has_every_format_of_cp_and_tucker_compete():
    (front,) = planned({"a": cb.AutoConfig(error=0.5, prefer="speed")}, calibration=None).fronts.values()
    for method in ("cp", "tucker"):
        assert {point.quantize for point in front if point.method == method} == {None, "bf16", "int8", "nf4"}


def test_a_probe_leaves_it_open_whether_rows_help():
    fitting = OutputFitting(bilinear(IN1, IN2, OUT), layer_inputs(*rows(), 160))
    config = cb.CPConfig(rank=2, quantize="int8")
    with fitting.probing():
        fitting.at(config, 2, thorough=False)
    assert not fitting._rows_help
    fitting.at(config, 2, thorough=False)
    assert fitting._rows_help


def test_output_targets_need_calibration():
    for config in (cb.CPConfig(rank=cb.MaxError(0.1, on="output")), cb.AutoConfig(error=cb.MaxError(0.1, on="output"))):
        with pytest.raises(ConfigError, match="needs `calibration`"):
            planned(config, calibration=None)


def test_output_targets_say_where_there_are_too_few_rows_or_none_that_meet_them():
    target = cb.MaxError(0.1, on="output")
    for config in (cb.CPConfig(rank=target), cb.AutoConfig(error=target)):
        assert "Found too few" in planned(config, calibration=[rows(20)]).report.layers[0].reason
    layer = planned(cb.TuckerConfig(rank=cb.MaxError(1e-6, on="output"), quantize="nf4")).report.layers[0]
    assert "out of reach of a tucker that is smaller" in layer.reason


class Stub(WeightFitting):
    """Fits nothing: it gives the errors that it is told, and remembers what it was asked for."""

    on_output = True

    def __init__(self, layer: nn.Bilinear, error, dense: float) -> None:
        super().__init__(layer)
        self._error_of, self._dense_error, self.asked = error, dense, []

    def _made(self, config, size: float, error: float, rank) -> Candidate:
        module = nn.Module()
        module.register_buffer("stored", torch.empty(int(size * stored_bytes(self.layer)), dtype=torch.uint8))
        module.rank, module.flops_per_row = rank, 1
        return Candidate.of(config, module, error, fitted_to="whitened")

    def at(self, config, rank, *_, **__):
        kind = ("cp" if isinstance(config, cb.CPConfig) else "tucker", config.quantize)
        self.asked.append((*kind, round(rank.fraction, 4)))
        return self._made(
            config, rank.fraction, self._error_of(*kind, rank.fraction), 1 if kind[0] == "cp" else (1, 1, 1)
        )

    def dense(self, config, *_):
        return self._made(config, {"int8": 0.25, "nf4": 0.13, "bf16": 0.5}[config.quantize], self._dense_error, None)


def sizes_asked(error, fraction: float, dense: float = 0.5, formats=("int8", "nf4")) -> dict:
    """How often each kind was fitted, in `Search.sized` at three sizes."""
    layer = bilinear(16, 16, 16, bias=False)
    stub = Stub(layer, error, dense)
    Search(stub).sized(fraction, alone=True)
    kinds = [(method, quantize) for method in ("tucker", "cp") for quantize in formats]
    return {kind: sum(each[:2] == kind for each in stub.asked) for kind in kinds}


def test_what_is_far_behind_at_a_size_is_not_tried_at_smaller_ones():
    far = automatic._BEHIND + 0.1
    found = sizes_asked(lambda method, quantize, size: 0.1 * (far if method == "cp" else 1), 0.1)
    assert found == {("tucker", "int8"): 3, ("tucker", "nf4"): 3, ("cp", "int8"): 1, ("cp", "nf4"): 1}


def test_what_is_a_little_behind_or_behind_what_is_larger_goes_on():
    near = automatic._BEHIND - 0.1
    found = sizes_asked(lambda method, quantize, size: 0.1 * (near if method == "cp" else 1), 0.1)
    assert set(found.values()) == {3}
    # dense layers are far better, where they fit
    assert sizes_asked(lambda *_: 0.4, 0.16, dense=0.05)["tucker", "int8"] == 3
    # nf4 does not fill the largest size, and what does is no measure for it
    found = sizes_asked(lambda method, quantize, size: 0.1 if size > 0.12 else 0.4, 0.16)
    assert found["tucker", "nf4"] == 3


def test_an_int8_error_is_met_within_a_time_limit():
    config = cb.CPConfig(rank=cb.MaxError(0.9), quantize="int8")
    report = cb.compress(bilinear(30, 30, 20), config, max_seconds=60, measure_latency=False)[1].layers[0]
    assert report.decision == "replaced"
    assert report.weight_error <= 0.9


def test_more_bits_are_tried_at_every_size_where_rounding_is_all_that_is_lost():
    # of a weight of low rank: a CP in few bits is as large as it can be at every size, and bf16 rounds more coarsely
    lost = {"int8": {"cp": 1e-4, "tucker": 6e-3}, "nf4": {"cp": 0.01, "tucker": 0.1}, "bf16": 2e-3, None: 1e-7}

    def error(method, quantize, size):
        return lost[quantize] if quantize in ("bf16", None) else lost[quantize][method]

    found = sizes_asked(error, 1.0, formats=("int8", None))
    assert found["cp", "int8"] == 1
    assert found["tucker", None] == found["cp", None] == 3
