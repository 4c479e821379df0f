import itertools
import random

import pytest
import torch
from support import bilinear
from torch import nn

import compress_bilinear as cb
from compress_bilinear.errors import InfeasibleError
from compress_bilinear.fitting import Candidate
from compress_bilinear.planning import _allocate as allocation
from compress_bilinear.planning import allocate, best_within
from compress_bilinear.planning._allocate import _hull

INT8 = cb.DenseConfig(quantize="int8")


def option(size: int, error: float, latency: float | None = None, config=INT8) -> Candidate:
    return Candidate(config=config, module=None, bytes=size, flops=size, error=error, latency=latency)


def front(seed: int, count: int = 7) -> list[Candidate]:
    draw = random.Random(seed)
    kept = option(1000, 0.0, 1.0, config=None)
    return [kept, *(option(draw.randint(20, 900), draw.random() ** 2 * 0.9, draw.random() * 2) for _ in range(count))]


def total(options) -> float:
    return sum(each.error**2 for each in options)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", [0.2, 0.4, 0.7])
def test_allocation_is_close_to_the_best_of_all_and_never_over_budget(seed, share):
    fronts = {str(k): front(10 * seed + k) for k in range(3)}
    budget = int(share * 3000)
    fit = [c for c in itertools.product(*fronts.values()) if sum(o.bytes for o in c) <= budget]
    if not fit:
        with pytest.raises(InfeasibleError, match=f"{budget} bytes for 3 layers is out of reach"):
            allocate(fronts, budget, "size")
        return
    chosen = allocate(fronts, budget, "size")
    assert sum(each.bytes for each in chosen.values()) <= budget
    best = min(map(total, fit))
    assert total(chosen.values()) <= 1.3 * best + 0.02


def test_allocation_is_within_a_few_percent_on_average():
    ratios = []
    for seed in range(100):
        fronts = {str(k): front(1000 + 10 * seed + k) for k in range(4)}
        fit = [c for c in itertools.product(*fronts.values()) if sum(o.bytes for o in c) <= 1600]
        if fit:
            ratios.append((total(allocate(fronts, 1600, "size").values()) + 1e-3) / (min(map(total, fit)) + 1e-3))
    assert sum(ratios) / len(ratios) < 1.06


def test_a_budget_for_all_keeps_all():
    fronts = {str(k): front(k) for k in range(3)}
    assert all(each.config is None for each in allocate(fronts, 3000, "size").values())


def test_what_loses_everything_is_never_allocated():
    kept = option(1000, 0.0, config=None)
    with pytest.raises(InfeasibleError):
        allocate({"a": [kept, option(10, 1.0), option(20, float("inf"))]}, 100, "size")


def test_speed_leaves_out_what_is_slower_only_where_something_faster_fits():
    kept = option(1000, 0.0, 1.0, config=None)
    slow, quick = option(100, 0.1, 2.0), option(900, 0.2, 0.5)
    assert allocate({"a": [kept, slow, quick]}, 950, "speed")["a"] is quick
    assert allocate({"a": [kept, slow, quick]}, 500, "speed")["a"] is slow
    # each fits alone, but not both: one has to be slower
    chosen = allocate({"a": [kept, slow, quick], "b": [kept, slow, quick]}, 1000, "speed")
    assert sorted(each.bytes for each in chosen.values()) == [100, 900]


def test_speed_takes_the_faster_of_what_is_as_good():
    kept, exact = option(1000, 0.0, 1.0, config=None), option(1000, 0.0, 0.4)
    assert allocate({"a": [kept, exact]}, 1000, "speed")["a"] is exact
    assert allocate({"a": [kept, exact]}, 1000, "size")["a"] is kept


@pytest.mark.parametrize("seed", range(10))
def test_hulls_are_convex_and_below_all_options(seed):
    options = front(seed, 12)
    hull = _hull(options)
    slopes = [allocation._slope(a, b) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes)
    assert all(slope < 0 for slope in slopes)
    assert hull[0].bytes == min(each.bytes for each in options)
    for each in options:
        for a, b in itertools.pairwise(hull):
            if a.bytes <= each.bytes <= b.bytes:
                assert each.error**2 >= a.error**2 + allocation._slope(a, b) * (each.bytes - a.bytes) - 1e-12


@pytest.mark.parametrize("seed", range(10))
def test_the_best_within_a_limit_is_the_cheapest(seed):
    options = front(seed)
    fit = [each for each in options if each.error <= 0.1]
    assert best_within(options, 0.1, "size").bytes == min(each.bytes for each in fit)
    assert best_within(options, 0.1, "speed").latency == min(each.latency for each in fit)


@pytest.mark.parametrize("limit", [0.5, 0.8])
def test_by_weight_it_is_never_larger_than_a_single_method(limit):
    layer = bilinear(6, 5, 4)
    (auto,) = cb.plan(layer, cb.AutoConfig(error=limit), measure_latency=False).report.layers
    assert auto.weight_error <= limit
    for quantize in (None, "int8", "nf4"):
        for kind in (cb.CPConfig, cb.TuckerConfig):
            config = kind(rank=cb.MaxError(limit), quantize=quantize)
            (single,) = cb.plan(layer, config, measure_latency=False).report.layers
            assert auto.bytes_after <= single.bytes_after


def test_exact_low_rank_beats_8_bit_dense_at_an_error_that_rounded_factors_miss():
    layer = nn.Bilinear(20, 20, 20)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("o,i,j->oij", *torch.randn(3, 20, generator=torch.Generator().manual_seed(0))))
    (found,) = cb.plan(layer, cb.AutoConfig(error=0.006), measure_latency=False).report.layers
    assert found.bytes_after < layer.weight.numel() / 10
