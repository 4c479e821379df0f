import pytest
import torch
from support import low_rank

from compress_bilinear.decomposition._als import PENALTY
from compress_bilinear.decomposition._budget import Budget
from compress_bilinear.decomposition._exact import anneal_penalty, measured_exactly

SHAPE, RANK = (4, 3, 5), 3


def near_an_exact_one():
    tensor = low_rank(SHAPE, RANK)
    generator = torch.Generator().manual_seed(0)  # the factors that `low_rank` drew
    exact = [torch.randn(size, RANK, generator=generator, dtype=torch.float64) for size in SHAPE]
    scale = tensor.norm() ** (-1 / 3)
    return tensor / tensor.norm(), [part * scale + 0.003 * torch.ones_like(part) for part in exact]


def test_it_converges_to_rounding_on_an_exact_tensor():
    tensor, near = near_an_exact_one()
    begun = measured_exactly(tensor, near, PENALTY, 0.0)
    found = anneal_penalty(tensor, begun, Budget())
    assert begun.residual > 1e-6
    assert abs(found.residual) < 1e-14


def test_a_residual_that_stays_is_left_as_it_is():
    tensor, near = near_an_exact_one()
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    begun = measured_exactly(tensor + 0.3 * noise / noise.norm(), near, PENALTY, 0.0)
    assert anneal_penalty(tensor, begun, Budget()) is begun


@pytest.mark.parametrize("outside", [0.0, 4e-4])
def test_what_the_core_leaves_out_counts(outside):
    tensor, near = near_an_exact_one()
    begun = measured_exactly(tensor, near, PENALTY, outside)
    found = anneal_penalty(tensor, begun, Budget(), outside)
    assert found.residual <= begun.residual
    assert begun.residual >= outside
