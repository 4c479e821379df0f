import pytest
import torch
from support import low_rank

from compress_bilinear.decomposition._exact import _normal_equations, finish, measured_exactly

SHAPE, RANK = (4, 3, 5), 3


def example(rank=RANK):
    tensor = low_rank(SHAPE, rank)
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in SHAPE]
    return tensor / tensor.norm(), parts


@pytest.mark.parametrize("penalty", [0.0, 0.05])
def test_the_normal_equations_are_those_of_the_jacobian(penalty):
    tensor, parts = example()

    def residuals(*factors):
        each = torch.einsum("ir,jr,kr->rijk", *factors)
        return torch.cat([(each.sum(0) - tensor).flatten(), penalty**0.5 * each.flatten()])

    blocks = torch.autograd.functional.jacobian(residuals, tuple(parts))
    jacobian = torch.cat([block.flatten(1) for block in blocks], dim=1)
    matrix, gradient = _normal_equations(tensor, parts, penalty)
    torch.testing.assert_close(matrix, jacobian.T @ jacobian, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, jacobian.T @ residuals(*parts), rtol=1e-10, atol=1e-10)


def test_it_converges_to_rounding_on_an_exact_tensor():
    tensor = low_rank(SHAPE, RANK)
    tensor /= tensor.norm()
    generator = torch.Generator().manual_seed(0)  # the factors that `low_rank` drew
    exact = [torch.randn(size, RANK, generator=generator, dtype=torch.float64) for size in SHAPE]
    scale = low_rank(SHAPE, RANK).norm() ** (-1 / 3)
    near = [part * scale + 0.01 * torch.ones_like(part) for part in exact]
    assert finish(tensor, near, 0.0).residual < 1e-26


@pytest.mark.parametrize("penalty", [0.0, 1e-4])
def test_it_never_ends_above_where_it_begins(penalty):
    tensor, parts = example(2)
    begun = measured_exactly(tensor, parts, penalty, 0.0)
    found = finish(tensor, parts, penalty)
    assert found.objective <= begun.objective
    assert all(bool(torch.isfinite(part).all()) for part in found.factors)


def test_what_the_core_leaves_out_counts():
    tensor, parts = example()
    assert finish(tensor, parts, 1e-4, outside=0.25).residual >= 0.25
