import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from support import assert_same_state, bilinear, layer_inputs, low_rank, state_of
from torch import nn

import compress_bilinear as cb
from compress_bilinear.config import CPConfig, DenseConfig, MaxError, MaxSize, TuckerConfig
from compress_bilinear.errors import ConfigError, InfeasibleError
from compress_bilinear.fitting import (
    Candidate,
    Job,
    Latency,
    Timing,
    WeightFitting,
    solve,
    stored_bytes,
    weight_error,
)
from compress_bilinear.modules import CPBilinear, DenseBilinear, FoundLayer, TuckerBilinear
from compress_bilinear.planning import _verdict as selection
from compress_bilinear.planning import judge, kept, reason_against, slowness
from compress_bilinear.report import AS_CONFIGURED, Note

TUCKER = TuckerConfig(rank=(3, 4, 4))


def planted(in1=12, in2=10, out=8, *, rank=3, noise=0.02, bias=True, dtype=torch.float32) -> nn.Bilinear:
    """A layer of low rank, plus noise."""
    layer = bilinear(in1, in2, out, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(low_rank((out, in1, in2), rank, noise=noise))
    return layer


def timing(before: float, after: float, dense: float = 1.0, spread: float = 0.1) -> Timing:
    around = [Latency(median, median * (1 - spread), median * (1 + spread)) for median in (before, after, dense)]
    return Timing(*around, dense_order="outer", batch_size=7)


def job_of(layer: nn.Bilinear, config, names=("rel", "again"), **known) -> Job:
    return Job(found=FoundLayer(names, layer), config=config, **known)


def judged(layer: nn.Bilinear, config, *, time_rows=None, force=False, inputs=None, unreached=False) -> Job:
    job = job_of(layer, config, inputs=inputs, calibrated=unreached or inputs is not None)
    job.candidates = [solve(layer, config)]
    job.chosen = job.candidates[0]
    judge(job, {"measure_latency": time_rows is not None, "batch_size": time_rows, "force": force})
    return job


def against(layer: nn.Bilinear, candidate: Candidate, config) -> Note | None:
    return reason_against(job_of(layer, config), candidate, {"weight_error": candidate.error})


class TestSolve:
    @pytest.mark.parametrize(
        ("config", "kind", "rank"),
        [
            (CPConfig(rank=3), CPBilinear, 3),
            (TUCKER, TuckerBilinear, (3, 4, 4)),
            (DenseConfig(), DenseBilinear, None),
            (CPConfig(rank=3, quantize="int8"), CPBilinear, 3),
            (TuckerConfig(rank=(2, 2, 2), quantize="int8"), TuckerBilinear, (2, 2, 2)),
            (DenseConfig(quantize="int8"), DenseBilinear, None),
        ],
        ids=str,
    )
    def test_each_config_has_its_module(self, config, kind, rank):
        layer = planted()
        before = state_of(layer)
        found = solve(layer, config)
        assert type(found.module) is kind
        assert (found.module.rank, found.module.quantize) == (rank, config.quantize)
        assert found.error == weight_error(layer.weight, found.module)
        assert hasattr(found.decomposition, "amplification") == (kind is CPBilinear)
        assert torch.equal(found.module.bias, layer.bias)
        assert found.module.bias is not layer.bias
        assert_same_state(layer, before)

    @pytest.mark.parametrize("make", [CPConfig, TuckerConfig])
    @pytest.mark.parametrize(
        ("quantize", "dtype", "target"),
        [
            (None, torch.float64, 0.1),
            (None, torch.float32, 0.1),
            ("int8", torch.float32, 0.03),
            (None, torch.float16, 0.03),
            (None, torch.bfloat16, 0.03),
            ("int8", torch.bfloat16, 0.05),
        ],
    )
    def test_a_max_error_holds_after_rounding(self, make, quantize, dtype, target):
        layer = planted(dtype=dtype)
        found = solve(layer, make(rank=MaxError(target), quantize=quantize))
        assert found.error <= target
        exact = layer.weight.detach().double()
        residual = exact - found.module.to_dense(torch.float64).detach()
        assert float(residual.norm() / exact.norm()) <= target

    @pytest.mark.parametrize(
        "config", [TuckerConfig(rank=MaxError(1e-5), quantize="int8"), CPConfig(rank=MaxError(1e-5))]
    )
    def test_a_max_error_below_what_rounding_costs_is_infeasible(self, config):
        with pytest.raises(InfeasibleError, match="1e-05"):
            solve(planted(dtype=torch.bfloat16), config)

    def test_a_max_error_that_only_the_whole_weight_meets_gives_the_whole_weight(self):
        found = solve(planted(dtype=torch.bfloat16), TuckerConfig(rank=MaxError(1e-5)))
        assert (found.module.rank, found.error) == ((8, 12, 10), 0.0)

    def test_a_tighter_target_is_tried_where_rounding_made_it_miss(self):
        class Recording(WeightFitting):
            targets: ClassVar = []

            def at(self, config, rank, *others, **more):
                self.targets.append(rank.error)
                return super().at(config, rank, *others, **more)

        layer, config = planted(noise=0.03), TuckerConfig(rank=MaxError(0.5), quantize="int8")
        goal = 1.00001 * solve(layer, TuckerConfig(rank=(3, 3, 3))).error  # and int8 adds to it
        fitting = Recording(layer)
        assert fitting.within(config, goal).error <= goal
        assert fitting.targets == sorted(fitting.targets, reverse=True)

    @pytest.mark.parametrize("quantize", [None, "int8"])
    @pytest.mark.parametrize("make", [CPConfig, TuckerConfig])
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_max_size_counts_all_that_is_stored(self, make, quantize, bias):
        layer = planted(3, 4, 90, rank=2, bias=bias)  # the bias is a twelfth of the bytes
        found = solve(layer, make(rank=MaxSize(0.25), quantize=quantize))
        assert stored_bytes(found.module) <= 0.25 * stored_bytes(layer)

    def test_a_max_size_that_the_bias_alone_exceeds_is_infeasible(self):
        with pytest.raises(InfeasibleError, match=r"MaxSize\(0.2\).*bias alone takes 360 bytes"):
            solve(planted(1, 2, 90, rank=1), CPConfig(rank=MaxSize(0.2)))

    @pytest.mark.parametrize("config", [CPConfig(rank=2), TUCKER, TuckerConfig(rank=MaxSize(0.5))], ids=str)
    def test_zero_weights_are_not_decomposed(self, config):
        layer = planted()
        nn.init.zeros_(layer.weight)
        with pytest.raises(InfeasibleError, match="all zero"):
            solve(layer, config)

    def test_a_rank_that_does_not_fit_is_the_configs_fault(self):
        with pytest.raises(ConfigError, match=r"rank\[2\].*at most 10.*Found 11"):
            solve(planted(), TuckerConfig(rank=(2, 2, 11)))


class TestReasonAgainst:
    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (TUCKER, None),
            (CPConfig(rank=3), None),
            (DenseConfig(), None),
            (DenseConfig(quantize="int8"), None),
            (TuckerConfig(rank=(8, 12, 10)), "not smaller: it would store 3872 bytes, the layer has 3872"),
        ],
        ids=str,
    )
    def test_smaller_is_the_least(self, config, reason):
        layer = planted()
        note = against(layer, solve(layer, config), config)
        assert (note is None) if reason is None else (reason in note.text)

    def test_targets_must_be_met(self):
        layer = planted()
        candidate = solve(layer, TUCKER)
        error, size = candidate.error, stored_bytes(candidate.module) / stored_bytes(layer)
        assert against(layer, candidate, TuckerConfig(rank=MaxError(error))) is None
        assert "misses the target" in against(layer, candidate, TuckerConfig(rank=MaxError(0.99 * error))).text
        assert against(layer, candidate, TuckerConfig(rank=MaxSize(size))) is None
        assert "miss the target" in against(layer, candidate, TuckerConfig(rank=MaxSize(0.99 * size))).text

    @pytest.mark.parametrize("error", [math.nan, math.inf])
    def test_factors_must_be_in_range(self, error):
        layer = planted(dtype=torch.float16)
        broken = replace(solve(layer, DenseConfig()), error=error)
        assert "range of float16" in against(layer, broken, DenseConfig()).text


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (timing(before=10, after=5), None),
        (
            timing(before=5, after=10),
            "10 ms (upper quartile 11), nn.Bilinear 5 ms (lower quartile 4.5)",
        ),
        (timing(before=10, after=9.9), "not faster here"),  # within the spread of the blocks
        (None, "has not been measured"),
    ],
    ids=["faster", "slower", "within the spread", "unmeasured"],
)
def test_an_exact_layer_must_be_faster_beyond_the_spread(measured, reason):
    assert (slowness(measured) is None) if reason is None else (reason in slowness(measured).text)


class TestJudge:
    @pytest.fixture
    def timed(self, monkeypatch):
        """What `time_replacement` is made to find, by (before, after)."""

        def set_to(before, after):
            monkeypatch.setattr(
                selection, "time_replacement", lambda layer, module, rows, seconds: timing(before, after)
            )

        return set_to

    def test_a_replacement_is_recorded_in_full(self, timed):
        timed(4, 2)
        layer = planted()
        inputs = layer_inputs(torch.randn(9, 12), torch.randn(9, 10), 3)
        job = judged(layer, TUCKER, time_rows=7, inputs=inputs)
        report, module = job.report, job.chosen.module
        assert (report.decision, report.notes[0]) == ("replaced", AS_CONFIGURED)
        assert [note.code for note in report.notes] == ["as_configured", "slower", "few_rows"]
        assert (report.name, report.aliases, report.shape) == ("rel", ("again",), (8, 12, 10))
        assert (report.method, report.rank, report.quantize) == ("tucker", (3, 4, 4), None)
        assert (report.params_before, report.bytes_before) == (968, 4 * 968)
        assert report.params_after == sum(p.numel() for p in module.parameters())
        assert report.bytes_after == stored_bytes(module)
        assert report.flops_before == 2 * 960 + 2 * 80
        assert report.flops_after == module.flops_per_row
        assert report.weight_error == weight_error(layer.weight, module)
        assert 0 < report.output_error < 1
        assert (report.calibration_rows, report.calibration_groups) == (9, 9)
        assert (report.latency_before_ms, report.latency_after_ms, report.latency_dense_ms) == (4, 2, 1)
        assert report.latency_after_quartiles_ms == pytest.approx((1.8, 2.2))
        assert (report.speedup, report.speedup_vs_dense, report.batch_size, report.dense_order) == (2, 0.5, 7, "outer")
        assert report.amplification is None

    def test_without_calibration_or_timing_their_figures_are_left_out(self):
        report = judged(planted(), CPConfig(rank=3)).report
        assert report.output_error is None
        assert (report.calibration_rows, report.calibration_groups) == (0, None)
        assert report.speedup is None
        assert report.latency_before_ms is None
        assert report.batch_size is None
        assert report.amplification == pytest.approx(1, abs=0.3)

    def test_slower_is_said(self, timed):
        timed(2, 4)
        job = judged(planted(), TUCKER, time_rows=7)
        assert job.chosen is not None
        slower, faster = [note.text for note in job.report.notes if note.code == "slower"]
        assert slower == "slower here than nn.Bilinear: 0.50x its speed"
        assert faster == "`DenseConfig()` is faster here, in 1 ms for 4 ms"

    def test_what_is_faster_than_the_layer_and_not_than_its_best_order_names_that(self, timed):
        timed(4, 2)
        (note,) = [note for note in judged(planted(), TUCKER, time_rows=7).report.notes if note.code == "slower"]
        assert note.text == "`DenseConfig()` is faster here, in 1 ms for 2 ms"

    def test_an_exact_layer_does_not_name_itself(self, timed):
        timed(4, 2)  # where the best order takes 1 ms
        job = judged(planted(), DenseConfig(), time_rows=7)
        assert [note.code for note in job.report.notes] == ["as_configured"]

    def test_unreached_is_said(self):
        assert "no calibration row reached it" in judged(planted(), TUCKER, unreached=True).report.reason

    def test_a_kept_layer_reports_the_candidate_that_was_turned_down(self):
        job = judged(planted(), TuckerConfig(rank=(8, 12, 10)))
        report = job.report
        assert job.chosen is None
        assert report.decision == "kept"
        assert "not smaller" in report.reason
        assert (report.rank, report.bytes_after, report.params_after) == ((8, 12, 10), 3872, 968)
        assert report.flops_after == report.flops_before
        assert report.weight_error < 1e-6

    def test_force_replaces_and_says_what_speaks_against_it(self):
        job = judged(planted(), TuckerConfig(rank=(8, 12, 10)), force=True)
        assert job.report.decision == "replaced"
        assert job.report.reason.startswith("forced, although it is not smaller")
        assert job.report.bytes_after == job.chosen.bytes == 3872

    @pytest.mark.parametrize(
        ("after", "force", "outcome", "reason"),
        [
            (2, False, "replaced", "as configured"),
            (2, True, "replaced", "as configured"),
            (8, False, "kept", "it is not faster here"),
            (8, True, "replaced", "forced, although it is not faster here"),
        ],
    )
    def test_exact_layers_are_judged_by_their_speed(self, timed, after, force, outcome, reason):
        timed(4, after)
        job = judged(planted(), DenseConfig(), time_rows=7, force=force)
        assert job.report.decision == outcome
        assert job.report.reason.startswith(reason)
        assert (job.chosen is not None) == (outcome == "replaced")
        assert job.report.weight_error == 0

    def test_a_layer_keeps_its_mode(self):
        for training in (True, False):
            assert judged(planted().train(training), TUCKER).chosen.module.training == training


@pytest.mark.parametrize("config", [CPConfig(rank=2, quantize="int8"), TUCKER, DenseConfig()], ids=str)
def test_kept_layers_stay_what_they_were(config):
    report = kept(job_of(planted(), config, ("",)), Note("text", "because"))
    assert (report.label, report.decision, report.reason) == ("(root)", "kept", "because")
    assert (report.params_after, report.bytes_after) == (report.params_before, report.bytes_before) == (968, 3872)
    assert report.quantize == config.quantize


def compressed(layer, config, **options):
    """The report of compressing one layer."""
    return cb.compress(layer, config, measure_latency=False, **options)[1].layers[0]


def test_a_replacement_whose_outputs_overflow_is_not_made():
    layer = nn.Bilinear(32, 32, 512, bias=False, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.fill_(512**-0.5 / 32)
    rows = torch.full((4, 32), 60.0, dtype=torch.float16)
    assert bool(torch.isfinite(layer(rows, rows)).all())
    report = compressed(layer, CPConfig(rank=1), calibration=[(rows, rows)])
    assert report.decision == "kept"
    assert "range of float16" in report.reason


def test_rows_of_zeros_leave_the_output_error_unknown():
    rows = torch.zeros(4, 12), torch.zeros(4, 10)
    assert compressed(bilinear(12, 10, 8), CPConfig(rank=2), calibration=[rows]).output_error is None


def test_a_weight_that_rounds_to_nothing_is_kept():
    layer = bilinear(12, 10, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(1e-200)
    report = compressed(layer, DenseConfig(quantize="int8"))
    assert report.decision == "kept"
    assert "keeps nothing" in report.reason


@pytest.mark.parametrize("config", [DenseConfig(), TuckerConfig(rank=(4, 5, 6))], ids=["dense", "absorbed"])
def test_measuring_a_float64_layer_leaves_its_weight_alone(config):
    layer = bilinear(5, 6, 4, dtype=torch.float64)
    new, report = cb.compress(layer, config, force=True, measure_latency=False)
    torch.testing.assert_close(new.to_dense().detach(), layer.weight.detach(), rtol=0, atol=0)
    assert report.layers[0].weight_error == 0


def test_a_layer_without_a_shape_can_be_kept():
    layer = planted()
    layer.weight = nn.parameter.UninitializedParameter()
    report = kept(job_of(layer, TUCKER), Note("text", "lazy"))
    assert (report.shape, report.bytes_before, report.flops_before, report.flops_after) == (None, 0, None, None)
