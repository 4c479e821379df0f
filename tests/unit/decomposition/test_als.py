import math

import pytest
import torch
from support import low_rank

from compress_bilinear.decomposition._als import PENALTY, Iterate, Stage, Sweeper, balanced, descend
from compress_bilinear.decomposition._budget import Budget
from compress_bilinear.decomposition._exact import measured_exactly

SHAPES = [(5, 6, 7), (1, 4, 9), (6, 1, 3), (13, 8, 4)]


def unit(shape, rank=40, noise=0.0):
    tensor = low_rank(shape, rank, noise=noise)
    return tensor / tensor.norm()


def factors(shape, rank, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape]


def objective(tensor, parts, penalty):
    model = torch.einsum("ir,jr,kr->ijk", *parts)
    sizes = torch.stack([part.norm(dim=0) for part in parts]).prod(0)
    return float((tensor - model).square().sum() + penalty * sizes.square().sum())


@pytest.mark.parametrize(("room", "slab"), [(2**20, 2**20), (2**20, 30), (0, 30)], ids=["whole", "kept", "twice"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 17])
def test_products_with_the_tensor(room, slab, shape, rank):
    tensor, (first, second, third) = unit(shape), factors(shape, rank)
    sweeper = Sweeper(tensor, rank, room, slab=slab)
    for found, equation, others in (
        (sweeper._first(second, third), "ijk,jr,kr->ir", (second, third)),
        (sweeper._second(first, third), "ijk,ir,kr->jr", (first, third)),
        (sweeper._third(first, second), "ijk,ir,jr->kr", (first, second)),
    ):
        torch.testing.assert_close(found, torch.einsum(equation, tensor, *others), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sweep_over_a_scaled_tensor_is_one_over_the_tensor(dtype):
    tensor, parts = unit((13, 8, 4)), factors((13, 8, 4), 5)
    exact = Sweeper(tensor, 5, 2**20).sweep(parts, 1e-3)
    found = Sweeper((tensor / 7).to(dtype), 5, 2**20, scale=7.0).sweep([part.to(dtype) for part in parts], 1e-3)
    assert found.objective == pytest.approx(exact.objective, rel=1e-4 if dtype == torch.float32 else 1e-10)
    for one, other in zip(found.factors, exact.factors, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-2 if dtype == torch.float32 else 1e-8, atol=1e-3)


@pytest.mark.parametrize("penalty", [0.0, 1e-3, 0.1])
def test_the_objective_is_that_of_its_definition(penalty):
    tensor, parts = unit((5, 6, 7)), factors((5, 6, 7), 4)
    for found in (measured_exactly(tensor, parts, penalty, 0.0), Sweeper(tensor, 4, 2**20).sweep(parts, penalty)):
        assert found.objective == pytest.approx(objective(tensor, found.factors, penalty), rel=1e-9)
        assert found.residual == pytest.approx(objective(tensor, found.factors, 0.0), rel=1e-9)
        model = torch.einsum("ir,jr,kr->ijk", *found.factors)
        assert found.amplification == pytest.approx(math.sqrt(found.sizes) / float(model.norm()), rel=1e-9)


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_a_sweep_ends_where_the_last_factor_cannot_be_bettered(penalty):
    tensor = unit((5, 6, 7))
    found = Sweeper(tensor, 3, 2**20).sweep(factors((5, 6, 7), 3), penalty)
    parts = [part.clone().requires_grad_() for part in found.factors]
    sizes = torch.stack([part.norm(dim=0) for part in parts]).prod(0)
    loss = (tensor - torch.einsum("ir,jr,kr->ijk", *parts)).square().sum() + penalty * sizes.square().sum()
    (gradient,) = torch.autograd.grad(loss, parts[2])
    assert float(gradient.abs().max()) < 1e-9


def test_a_component_that_has_died_stays_dead_and_the_others_live():
    tensor, parts = unit((5, 6, 7)), factors((5, 6, 7), 3)
    parts[0][:, 1] = parts[1][:, 1] = parts[2][:, 1] = 0
    found = Sweeper(tensor, 3, 2**20).sweep(parts, 1e-3)
    assert all(bool(torch.isfinite(part).all()) for part in found.factors)
    assert not bool(found.factors[0][:, 1].any())
    assert bool(found.factors[0][:, 0].any())


def test_equal_components_do_not_break_the_solve():
    tensor, parts = unit((5, 6, 7)), factors((5, 6, 7), 1)
    found = descend(tensor, Iterate([part.repeat(1, 4) for part in parts]), Stage(5, first=0.0, last=0.0), Budget())
    assert math.isfinite(found.objective)


def test_a_descent_never_ends_above_where_a_sweep_begins():
    tensor = unit((13, 8, 4))
    begun = Sweeper(tensor, 5, 2**20).sweep(balanced(factors((13, 8, 4), 5)), PENALTY)
    assert descend(tensor, begun, Stage(50), Budget()).objective <= begun.objective


def test_a_descent_is_done_where_it_is_close_enough():
    tensor = unit((13, 8, 4), noise=0.1)
    reports = []
    budget = Budget(progress=lambda *report: reports.append(report))
    found = descend(tensor, Iterate(factors((13, 8, 4), 5)), Stage(500, enough=0.5), budget)
    assert found.residual <= 0.5
    assert len(reports) < 50


def test_a_penalty_falls_to_its_last_value_and_stays():
    stage = Stage(10, first=0.1, last=1e-3, falling=0.5)
    values = [stage.penalty(k / 10) for k in range(10)]
    assert values[0] == pytest.approx(0.1)
    assert values == sorted(values, reverse=True)
    assert values[5:] == pytest.approx([1e-3] * 5)


def test_balancing_keeps_the_components_and_evens_their_norms():
    parts = factors((5, 6, 7), 3)
    parts[0] *= 1e4
    even = balanced(parts)
    torch.testing.assert_close(
        torch.einsum("ir,jr,kr->ijk", *even), torch.einsum("ir,jr,kr->ijk", *parts), rtol=1e-12, atol=1e-9
    )
    norms = torch.stack([part.norm(dim=0) for part in even])
    torch.testing.assert_close(norms, norms[:1].expand(3, -1), rtol=1e-12, atol=0)
