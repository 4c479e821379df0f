import itertools
from dataclasses import replace

import pytest
import torch
from support import bilinear
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.errors import ConfigError
from compress_bilinear.fitting import (
    Candidate,
    Latency,
    Search,
    WeightFitting,
    settle,
    smallest_within,
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
        made = [point for point in front if not point.predicted]
        assert chosen.latency_ms == min(point.latency_ms for point in made if point.output_error <= 0.5)


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
    """Makes nothing: candidates have the errors of a table times a factor, and are remembered."""

    on_output = True

    def __init__(self, layer: nn.Bilinear, factor) -> None:
        super().__init__(layer)
        self._factor, self.made = factor, []

    def build(self, config, rank, budget=None, sweeps=0):
        module = nn.Module()
        module.rank, module.flops_per_row = rank, 1
        predicted = next(each for each in self.search.candidates_at_first if each.config == config)
        self.made.append(predicted)
        made = Candidate.of(config, module, predicted.error * self._factor(config), fitted_to="whitened")
        return replace(made, bytes=predicted.bytes)


def stubbed(factor, **options) -> tuple[Search, Stub]:
    layer = bilinear(16, 12, 14, bias=False)
    fitting = Stub(layer, factor)
    fitting.search = search = Search(fitting, **options)
    search.predict(size=0.2 * stored_bytes(layer))
    search.candidates_at_first = list(search.candidates)
    return search, fitting


def smallest(limit):
    return lambda lists: [smallest_within(candidates, limit) for candidates in lists]


def test_every_method_and_format_is_predicted_at_many_sizes_and_nothing_but_dense_is_made():
    search, fitting = stubbed(lambda config: 1.0)
    assert not fitting.made
    predicted = [each for each in search.candidates if each.predicted]
    for method, quantize in itertools.product((cb.CPConfig, cb.TuckerConfig), (None, "bf16", "int8", "nf4")):
        kind = [each for each in predicted if type(each.config) is method and each.config.quantize == quantize]
        sizes, errors = [each.bytes for each in kind], [each.error for each in kind]
        assert len(kind) >= 5
        assert sizes == sorted(sizes)
        assert errors == sorted(errors, reverse=True)
        allowed = 0.2 * search.candidates[0].bytes
        assert max(size for size in sizes if size <= allowed) > 0.6 * allowed


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_what_is_picked_is_made_until_nothing_predicted_is_picked(factor):
    search, fitting = stubbed(lambda config: factor)
    (found,) = settle([search], smallest(0.5))
    assert found.module is not None
    assert found.error <= 0.5
    assert not [each for each in search.candidates if each.predicted and each.error <= 0.5 and each.bytes < found.bytes]
    assert len(fitting.made) < 25


def test_a_kind_that_disappoints_is_predicted_anew_and_gives_way_to_another():
    search, _ = stubbed(lambda config: 3.0 if isinstance(config, cb.TuckerConfig) else 1.0)
    before = {each.config: each.error for each in search.candidates if each.predicted}
    tucker = next(each for each in search.candidates if each.predicted and isinstance(each.config, cb.TuckerConfig))
    search.build(tucker)
    for each in search.candidates:
        same_kind = isinstance(each.config, cb.TuckerConfig) and each.config.quantize == tucker.config.quantize
        if each.predicted:
            assert each.error == pytest.approx(before[each.config] * (3.0 if same_kind else 1.0))


@pytest.mark.parametrize("shape", [(16, 12, 14), (9, 20, 17)])
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_tucker_is_as_good_as_predicted(shape, quantize):
    out, in1, in2 = shape
    layer = bilinear(in1, in2, out, bias=False)
    search = Search(WeightFitting(layer), only=cb.TuckerConfig(rank=(1, 1, 1), quantize=quantize))
    search.predict()
    for point in [each for each in search.candidates if each.predicted and each.error < 0.9][::12]:
        found = WeightFitting(layer).build(point.config, point.config.rank)
        assert found.bytes == point.bytes
        assert 0.8 * point.error < found.error < 1.35 * point.error


def test_an_int8_error_is_met_within_a_time_limit():
    config = cb.CPConfig(rank=cb.MaxError(0.9), quantize="int8")
    report = cb.compress(bilinear(30, 30, 20), config, max_seconds=60, measure_latency=False)[1].layers[0]
    assert report.decision == "replaced"
    assert report.weight_error <= 0.9
