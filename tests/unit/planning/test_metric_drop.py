"""Targets on the network's own metric, and other targets from the tables of a plan."""

import math

import pytest
import torch
from support import assert_same_state, low_rank, state_of
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.errors import CompressionError, ConfigError, StalePlanError
from compress_bilinear.fitting import Candidate
from compress_bilinear.planning import _choose
from compress_bilinear.planning._metric_drop import TaskMetric

SIZES = ((6, 7, 8), (5, 4, 9))


class Net(nn.Module):
    """Two layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        for name, (in1, in2, out) in zip("ab", SIZES, strict=True):
            layer = nn.Bilinear(in1, in2, out)
            with torch.no_grad():
                layer.weight.copy_(low_rank((out, in1, in2), 3, noise=0.3, seed=len(name) + in1))
            self.add_module(name, layer)

    def forward(self, *rows: Tensor) -> Tensor:
        return torch.cat([self.a(*rows[:2]), self.b(*rows[2:])], -1)


def rows(seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(40, size, generator=generator) for in1, in2, _ in SIZES for size in (in1, in2))


NET = Net()
BATCHES = [rows(seed) for seed in range(8)]
TEST = rows(99)


def metric(model: nn.Module) -> float:
    """How much of the outputs of `NET` a network gives, up to 1."""
    with torch.no_grad():
        return 1 - float((model(*TEST) - NET(*TEST)).norm() / NET(*TEST).norm())


def planned(config, **options) -> cb.Plan:
    return cb.plan(NET, config, **{"calibration": BATCHES, "measure_latency": False, "evaluate": metric} | options)


@pytest.fixture(scope="module")
def plan() -> cb.Plan:
    return planned(cb.AutoConfig(size=1 / 4))


def bytes_of(plan: cb.Plan) -> int:
    return sum(layer.bytes_after for layer in plan.report.layers)


@pytest.mark.parametrize("drop", [0.02, 0.1, 0.4])
def test_the_network_is_small_and_its_metric_falls_by_no_more_than_is_allowed(drop):
    before = state_of(NET)
    plan = planned(cb.AutoConfig(metric_drop=drop))
    assert_same_state(NET, before)
    _, report = plan.apply()
    assert report.metric_before - report.metric_after <= drop
    assert all("metric_drop" in {note.code for note in layer.notes} for layer in report.layers)
    tenth_smaller = plan.at(size=0.9 * bytes_of(plan) / report.layers[0].bytes_before / 2)
    assert bytes_of(tenth_smaller) < bytes_of(plan)


def test_the_metric_that_was_confirmed_is_that_of_the_network_that_comes_out(monkeypatch):
    config, options = cb.AutoConfig(metric_drop=0.2), {"measure_latency": True, "max_seconds": None}
    asked = []
    monkeypatch.setattr(_choose, "choose_compute", lambda *args, **known: asked.append(args))
    quantized = [layer.quantize for layer in planned(config, **options).report.layers]
    assert any(quantized)
    assert not asked


def test_a_larger_drop_allows_a_smaller_network():
    sizes = [bytes_of(planned(cb.AutoConfig(metric_drop=drop))) for drop in (0.005, 0.1, 0.5)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_metric_that_nothing_keeps_leaves_the_model_alone():
    plan = planned(cb.AutoConfig(metric_drop=0.1), evaluate=lambda model: float(model is NET))
    for layer in plan.report.layers:
        assert layer.decision == "kept"
        assert "a metric within 0.1 of 1 is out of reach" in layer.reason.lower()


def test_it_is_measured_with_what_other_configs_give():
    def both(model: nn.Module) -> float:
        assert model is NET or not isinstance(model.a, nn.Bilinear)
        return metric(model)

    planned({"a": cb.DenseConfig(quantize="int8"), "*": cb.AutoConfig(metric_drop=0.1)}, evaluate=both)


def test_a_polished_candidate_that_fails_is_taken_back(plan):
    (job, *_) = plan._jobs
    assert job.chosen is not None
    held, worse = job.chosen, Candidate.of(job.chosen.config, job.chosen.module, 0.5)
    target = TaskMetric(NET, [], metric, 0.9)
    assert target.holds({job: held})
    target._known[(worse,)] = -math.inf
    job.chosen = worse
    target.confirm([job])
    assert job.chosen is held


@pytest.mark.parametrize(
    ("config", "options", "problem"),
    [
        (cb.AutoConfig(metric_drop=0.1), {"evaluate": None}, "needs `evaluate`"),
        ({"a": cb.AutoConfig(metric_drop=0.1), "b": cb.AutoConfig(metric_drop=0.2)}, {}, "in one config"),
    ],
)
def test_a_metric_that_cannot_be_kept_is_an_error(config, options, problem):
    with pytest.raises(ConfigError, match=problem):
        planned(config, **options)


def test_a_model_that_cannot_be_copied_says_what_else_there_is():
    class Held(Net):
        def __deepcopy__(self, memo):
            raise RuntimeError("it holds a lock")

    with pytest.raises(CompressionError, match=r"it holds a lock\. Use `size` or `error`"):
        cb.plan(Held(), cb.AutoConfig(metric_drop=0.1), evaluate=lambda model: 1.0, measure_latency=False)


@pytest.mark.parametrize("drop", [0, -1, True, "0.1", math.nan])
def test_a_drop_is_above_0(drop):
    with pytest.raises(ConfigError, match="above 0"):
        cb.AutoConfig(metric_drop=drop)


@pytest.mark.parametrize("target", [{"size": 0.1}, {"size": 0.6}, {"error": 0.1}], ids=str)
def test_another_target_gives_what_a_new_plan_gives(plan, target):
    there, new = plan.at(**target), planned(cb.AutoConfig(**target))
    assert there.report.config == new.report.config
    if "size" in target:
        sums = [sum(layer.output_error**2 for layer in plan.report.layers) for plan in (there, new)]
        assert sums[0] <= 1.2 * sums[1]
    assert bytes_of(there) == pytest.approx(bytes_of(new), rel=0.15)
    model, report = there.apply()
    assert metric(model) == report.metric_after


def test_a_plan_is_left_as_it_is_by_another(plan):
    before = str(plan)
    plan.at(size=0.05)
    assert str(plan) == before


def test_calibration_runs_once_for_all_targets():
    batches = iter(BATCHES)
    plan = planned(cb.AutoConfig(size=1 / 4), calibration=batches)
    assert plan.at(size=1 / 8).report.layers[0].calibration_rows == plan.report.layers[0].calibration_rows


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ({}, "and `metric_drop`. Found none"),
        ({"size": 0.1, "error": 0.1}, "Found error and size"),
        ({"error": cb.MaxError(0.1)}, "made for errors of the weight"),
    ],
)
def test_a_target_that_the_tables_cannot_meet_is_an_error(plan, target, problem):
    with pytest.raises(ConfigError, match=problem):
        plan.at(**target)


def test_without_an_auto_config_there_are_no_tables():
    with pytest.raises(ConfigError, match="needs a plan in which an AutoConfig"):
        planned(cb.DenseConfig(quantize="int8")).at(size=0.1)


def test_tables_of_other_weights_are_stale():
    model = Net()
    plan = cb.plan(model, cb.AutoConfig(size=1 / 4), measure_latency=False)
    with torch.no_grad():
        model.a.weight.mul_(2)
    with pytest.raises(StalePlanError, match="weight or bias has changed"):
        plan.at(size=1 / 8)
