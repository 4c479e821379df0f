from dataclasses import replace

import pytest
import torch
from support import bilinear, layer_inputs
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear import decomposition
from compress_bilinear.decomposition import Budget
from compress_bilinear.errors import CompressionError, ConfigError
from compress_bilinear.fitting import (
    Candidate,
    LayerInputs,
    OutputError,
    OutputFitting,
    WeightFitting,
    collect_inputs,
    solve,
)
from compress_bilinear.modules import METHODS, method_of

IN1, IN2, OUT = 10, 8, 6
CP, TUCKER = cb.CPConfig(rank=6), cb.TuckerConfig(rank=(3, 4, 4))


def rows(count: int, seed: int = 0, correlated: bool = True) -> tuple[Tensor, Tensor]:
    """x2 a noisy function of x1, both of a nonzero mean."""
    generator, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    first = torch.randn(count, IN1, generator=generator)
    if not correlated:
        return first, torch.randn(count, IN2, generator=generator)
    mixing = torch.randn(IN1, IN2, generator=fixed) / 3
    spread = torch.logspace(0, -1, IN1)
    return first * spread + 0.3, torch.tanh(first @ mixing) + 0.1 * torch.randn(count, IN2, generator=generator)


def seen(layer: nn.Bilinear, first: Tensor, second: Tensor) -> LayerInputs:
    found = collect_inputs(layer, {"": layer}, [(first, second)])[""]
    assert found is not None
    return found


def fresh_error(layer: nn.Bilinear, module: nn.Module) -> float:
    first, second = rows(4000, seed=77)
    return OutputError(layer, layer_inputs(first, second)).of(module)


@pytest.mark.parametrize("config", [CP, TUCKER], ids=["cp", "tucker"])
def test_on_correlated_inputs_it_beats_the_weight_by_far_on_fresh_rows(config):
    layer = bilinear(IN1, IN2, OUT)
    fitted = OutputFitting(layer, seen(layer, *rows(2000))).at(config, config.rank)
    plain = cb.compress(layer, config, measure_latency=False)[0]
    assert fitted.fitted_to == "rows"
    assert fresh_error(layer, fitted.module) < 0.7 * fresh_error(layer, plain)


@pytest.mark.parametrize("correlated", [True, False])
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
@pytest.mark.parametrize("kind", [cb.CPConfig, cb.TuckerConfig])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_512_rows_never_leave_more_error_than_the_weight_alone(kind, quantize, correlated, seed):
    rank = 6 if kind is cb.CPConfig else (3, 4, 4)
    layer, batch = bilinear(IN1, IN2, OUT, seed=seed), rows(512, seed, correlated)
    errors = {}
    for fit in ("output", "weight"):
        config = kind(rank=rank, quantize=quantize, fit=fit)
        (found,) = cb.plan(layer, config, calibration=[batch], measure_latency=False).report.layers
        errors[fit] = found.output_error
    assert errors["output"] <= errors["weight"] * (1 + 1e-9)


def test_the_corrected_bias_takes_away_the_mean_of_what_is_lost():
    layer = bilinear(IN1, IN2, OUT, dtype=torch.float64)
    before = layer.bias.detach().clone()
    first, second = (value.double() for value in rows(400))
    inputs = seen(layer, first, second)
    fitted = OutputFitting(layer, inputs).dense(cb.DenseConfig(quantize="nf4"), Budget())
    assert fitted.bias_corrected
    with torch.no_grad():
        lost = layer(*inputs.fit) - fitted.module(*inputs.fit)
    assert float(lost.mean(0).abs().max()) < 1e-5 * float(lost.std())  # nf4 computes in float32
    assert torch.equal(layer.bias, before)
    assert torch.equal(fitted.module.bias - before != 0, torch.ones(OUT, dtype=torch.bool))


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
@pytest.mark.parametrize("kind", [cb.DenseConfig, cb.CPConfig, cb.TuckerConfig])
def test_what_rounding_costs_the_outputs_is_less_than_value_by_value_on_fresh_rows(kind, quantize):
    layer = bilinear(IN1, IN2, OUT)
    fitting = OutputFitting(layer, seen(layer, *rows(2000)), fix_bias=False)
    if kind is cb.DenseConfig:
        plain, floating = cb.DenseBilinear.from_bilinear(layer, quantize=quantize), 0.0
        fitted = fitting.dense(kind(quantize=quantize), Budget())
    else:
        rank = 16 if kind is cb.CPConfig else (4, 6, 5)  # at which rounding costs more than fresh rows vary
        found = fitting.at(kind(rank=rank), rank)
        module = cb.CPBilinear if kind is cb.CPConfig else cb.TuckerBilinear
        plain = module.from_decomposition(found.decomposition, layer.bias, quantize=quantize)
        floating = fresh_error(layer, found.module)
        fitted = fitting.at(kind(rank=rank, quantize=quantize), rank)
    lost = [fresh_error(layer, module) ** 2 - floating**2 for module in (plain, fitted.module)]
    # of a Tucker in int8, rounding is so little that held-out rows hardly tell one way from the other
    assert lost[1] < (1.02 if kind is cb.TuckerConfig and quantize == "int8" else 0.8) * lost[0]


@pytest.mark.parametrize("config", [CP, TUCKER], ids=["cp", "tucker"])
def test_a_bias_that_must_not_change_does_not(config):
    layer = bilinear(IN1, IN2, OUT)
    fitted = OutputFitting(layer, seen(layer, *rows(400)), fix_bias=False).at(config, config.rank)
    assert not fitted.bias_corrected
    assert torch.equal(fitted.module.bias, layer.bias)


@pytest.mark.parametrize("config", [CP, TUCKER], ids=["cp", "tucker"])
def test_layers_without_bias_stay_so(config):
    layer = bilinear(IN1, IN2, OUT, bias=False)
    fitted = OutputFitting(layer, seen(layer, *rows(400))).at(config, config.rank)
    assert fitted.module.bias is None
    assert not fitted.bias_corrected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [CP, cb.TuckerConfig(rank=(OUT, 5, 7))], ids=["cp", "tucker"])
def test_half_precision_layers_keep_their_dtype(dtype, config):
    layer = bilinear(IN1, IN2, OUT, dtype=dtype)
    fitted = OutputFitting(layer, seen(layer, *(value.to(dtype) for value in rows(300)))).at(config, config.rank)
    assert {parameter.dtype for parameter in fitted.module.parameters()} == {dtype}
    assert fitted.error < 0.9


def test_half_precision_cores_stay_in_range_where_one_direction_of_the_inputs_dominates():
    layer = bilinear(IN1, IN2, OUT, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.mul_(100)
    first, second = ((100 * value.mean(1, keepdim=True) + value) / 100 for value in rows(300))
    fitted = OutputFitting(layer, seen(layer, first.half(), second.half())).at(TUCKER, TUCKER.rank)
    assert fitted.fitted_to == "rows"
    assert fitted.error < 0.1


@pytest.mark.parametrize("config", [CP, TUCKER], ids=["cp", "tucker"])
def test_factors_out_of_range_give_way_to_those_of_the_weight(config, monkeypatch):
    def unwhiten(*_, **__):
        raise CompressionError("`core` should be finite. Found NaN or infinity.")

    layer, batch = bilinear(IN1, IN2, OUT), rows(300)
    expected = solve(layer, config).module.to_dense()
    method = method_of(config)
    monkeypatch.setitem(METHODS, method.name, replace(method, unwhiten=unwhiten))
    fitted = OutputFitting(layer, seen(layer, *batch)).at(config, config.rank)
    assert fitted.fitted_to == "weight"
    torch.testing.assert_close(fitted.module.to_dense(), expected)
    (told,) = cb.plan(layer, config, calibration=[batch], measure_latency=False).report.layers
    assert "fitted to the weight, for factors fitted to the outputs leave the range" in told.reason
    with pytest.raises(ConfigError):  # a rank that does not fit is another matter
        OutputFitting(layer, seen(layer, *batch)).at(config, 10**6 if config is CP else (OUT + 1, 1, 1))


@pytest.mark.parametrize("make", ["constant", "zero", "rank one"])
@pytest.mark.parametrize("config", [CP, TUCKER], ids=["cp", "tucker"])
def test_inputs_that_say_little_give_finite_replacements(make, config):
    layer, (first, second) = bilinear(IN1, IN2, OUT), rows(64)
    if make == "constant":
        second = second[:1].expand(64, -1)
    elif make == "zero":
        first = first * 0
    else:
        first = first[:, :1] * torch.ones(IN1)
    fitted = OutputFitting(layer, seen(layer, first, second)).at(config, config.rank)
    assert bool(torch.isfinite(fitted.module.to_dense()).all())
    if make != "zero":
        assert fitted.error < 0.7


def test_autocast_does_not_matter():
    layer, batch = bilinear(IN1, IN2, OUT), rows(300)
    inputs = seen(layer, *batch)
    expected = OutputFitting(layer, inputs).at(TUCKER, TUCKER.rank).error
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert OutputFitting(layer, inputs).at(TUCKER, TUCKER.rank).error == pytest.approx(expected, rel=1e-3)


def heavy_tailed(in1: int, in2: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Few rows, of which some are far larger than others: their second moments say little of other rows."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.randn(32, size, generator=generator) / torch.randn(32, 1, generator=generator).abs()
        for size in (in1, in2)
    )
    return first, second


@pytest.mark.parametrize("asked", [cb.AutoConfig(size=0.06), cb.TuckerConfig(rank=cb.MaxError(0.95, on="output"))])
def test_what_is_chosen_never_leaves_more_error_than_the_weight_alone(asked):
    layer, batch = bilinear(20, 18, 3, seed=4), heavy_tailed(20, 18, seed=4)
    (found,) = cb.plan(layer, asked, calibration=[batch], measure_latency=False).report.layers
    assert found.decision == "replaced"
    kind = cb.CPConfig if found.method == "cp" else cb.TuckerConfig
    config = kind(rank=found.rank, quantize=found.quantize, fit="weight")
    (plain,) = cb.plan(layer, config, calibration=[batch], measure_latency=False).report.layers
    assert found.output_error <= plain.output_error * (1 + 1e-9)
    if isinstance(asked, cb.AutoConfig):
        assert found.bytes_after <= asked.fraction * found.bytes_before
        (chosen,) = (point for point in found.front if point.chosen)
        assert (chosen.rank, chosen.output_error) == (found.rank, pytest.approx(found.output_error))


@pytest.mark.parametrize("asked", [cb.DenseConfig(quantize="int8"), cb.AutoConfig(size=0.3)])
def test_the_time_for_all_bounds_the_rounding_of_a_dense_layer(asked, monkeypatch):
    seconds, original = [], decomposition.stored_weight

    def counted(weight, quantize, metric, budget):
        seconds.append(budget.max_seconds)
        return original(weight, quantize, metric, budget)

    monkeypatch.setattr(decomposition, "stored_weight", counted)
    cb.plan(bilinear(IN1, IN2, OUT), asked, calibration=[rows(300)], measure_latency=False, max_seconds=20)
    assert seconds
    assert all(0 < each <= 20 for each in seconds)


def test_a_fit_of_several_attempts_has_one_progress():
    seen = []
    config = cb.TuckerConfig(rank=cb.MaxError(0.3), quantize="int8")
    solve(bilinear(20, 18, 12), config, Budget(progress=lambda done, error: seen.append(done)))
    assert seen == sorted(seen)


def test_a_rank_near_one_that_was_solved_is_as_good_and_takes_fewer_sweeps(monkeypatch):
    layer = bilinear(40, 40, 30)
    for mode, size in enumerate(layer.weight.shape):
        layer.weight.data *= (torch.arange(1, size + 1) ** -0.5).view([-1 if m == mode else 1 for m in range(3)])
    config, sweeps = cb.CPConfig(rank=100), []
    sketch = METHODS["cp"].sketch
    row = replace(METHODS["cp"], sketch=lambda *args, **known: sweeps.append(args[4]) or sketch(*args, **known))
    monkeypatch.setitem(METHODS, "cp", row)
    alone = WeightFitting(layer).solved(config, 110, Budget()).error
    fitting = WeightFitting(layer)
    fitting.solved(config, 100, Budget())
    near = fitting.solved(config, 110, Budget()).error
    assert near <= 1.02 * alone
    assert sweeps[2] < sweeps[1] == sweeps[0]
    fitting.solved(config, 40, Budget())  # which is another problem
    assert sweeps[3] == sweeps[0]


def test_a_layer_that_is_kept_has_nothing_to_polish():
    layer = bilinear(IN1, IN2, OUT)
    kept = Candidate.kept(layer)
    for fitting in (WeightFitting(layer), OutputFitting(layer, seen(layer, *rows(100)))):
        assert fitting.polished(kept, Budget()) is kept
