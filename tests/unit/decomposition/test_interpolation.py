import pytest
import torch
from support import normal

from compress_bilinear.decomposition import interpolation


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (9, 6), (37, 36), (63, 17), (64, 49)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "orthonormal", "deficient", "zero"])
def test_a_factor_is_an_identity_beside_small_coefficients(shape, kind):
    factor = normal(*shape)
    if kind == "orthonormal":
        factor = torch.linalg.qr(factor)[0]
    elif kind == "deficient":
        factor[:, -1] = factor[:, 0]
        factor[0] = 0
    elif kind == "zero":
        factor = torch.zeros_like(factor)
    order, coefficients, turn = interpolation(factor)
    size, rank = shape
    assert sorted(order.tolist()) == list(range(size))
    assert coefficients.shape == (size - rank, rank)
    assert not coefficients.numel() or float(coefficients.abs().max()) < 1.2
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(torch.cat([identity, coefficients]) @ turn, factor[order], rtol=0, atol=1e-12)


def test_rows_keep_their_order_among_the_kept_and_among_the_others():
    order, _, _ = interpolation(normal(20, 12))
    assert order[:12].tolist() == sorted(order[:12].tolist())
    assert order[12:].tolist() == sorted(order[12:].tolist())


def test_the_part_for_the_core_is_well_conditioned():
    for seed in range(5):
        _, _, turn = interpolation(torch.linalg.qr(normal(64, 40, seed=seed))[0])
        assert torch.linalg.cond(turn) < 30


def test_a_square_factor_is_all_for_the_core():
    factor = normal(7, 7)
    order, coefficients, turn = interpolation(factor)
    assert order.tolist() == list(range(7))
    assert not coefficients.numel()
    assert torch.equal(turn, factor)
