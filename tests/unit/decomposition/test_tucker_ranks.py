from itertools import product

import pytest
import torch
from support import low_rank

from compress_bilinear import MaxError, MaxSize
from compress_bilinear.decomposition._sizes import tucker_bytes, tucker_flops, tucker_parameters
from compress_bilinear.decomposition._tucker_ranks import Target, best_block
from compress_bilinear.ops import dense_flops

SHAPE = (4, 6, 5)
CORE = low_rank(SHAPE, 40)
TOTAL = float(CORE.square().sum())


def lost(rank, core=CORE):
    kept = core[: rank[0], : rank[1], : rank[2]]
    return float(core.square().sum() - kept.square().sum())


def triples(sizes=SHAPE):
    return list(product(*(range(1, size + 1) for size in sizes)))


@pytest.mark.parametrize("error", [0.95, 0.7, 0.4, 0.1])
@pytest.mark.parametrize("slab", [2**20, 1], ids=["usual slabs", "row by row"])
def test_the_cheapest_triple_within_an_error_of_all_triples(error, slab):
    target = Target(MaxError(error), SHAPE, 8, None)
    key, rank = best_block(CORE, 0.0, TOTAL, target, slab)
    allowed = [r for r in triples() if lost(r) <= error**2 * TOTAL * (1 + 1e-12)]
    assert tucker_bytes(rank, SHAPE, 8, None) == min(tucker_bytes(r, SHAPE, 8, None) for r in allowed) == key[0]
    assert rank in allowed


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_the_least_error_of_all_triples_within_a_size(fraction, quantize):
    target = Target(MaxSize(fraction), SHAPE, 8, quantize)
    _, rank = best_block(CORE, 0.0, TOTAL, target)
    allowed = [r for r in triples() if tucker_bytes(r, SHAPE, 8, quantize) <= fraction * 960]
    assert rank in allowed
    assert lost(rank) == pytest.approx(min(lost(r) for r in allowed), rel=1e-9)


def test_what_lies_outside_the_core_counts():
    block = CORE[:3, :4, :4]
    outside = lost((3, 4, 4))
    target = Target(MaxError(0.9), SHAPE, 8, None)
    _, rank = best_block(block, outside, TOTAL, target)
    allowed = [r for r in triples((3, 4, 4)) if lost(r, block) + outside <= 0.81 * TOTAL]
    assert rank in allowed
    assert best_block(block, 0.82 * TOTAL, TOTAL, target) is None


def test_costs_are_those_of_the_layer_that_stores_them():
    assert tucker_parameters((2, 3, 2), SHAPE) == 2 * 3 * 2 + 2 * 4 + 3 * 6 + 2 * 5
    assert tucker_parameters((2, 3, 4), SHAPE) == 2 * 3 * 4 + 2 * 4 + 3 * 6 + 4 * 1  # one beside an identity
    assert tucker_parameters((4, 3, 5), SHAPE) == 4 * 3 * 5 + 3 * 6  # two modes absorbed
    assert tucker_flops((2, 3, 2), SHAPE) == 2 * (2 * 4 + 3 * 6 + 2 * 5) + dense_flops((2, 3, 2))
    assert tucker_flops((2, 3, 4), SHAPE) == 2 * (2 * 4 + 3 * 6 + 4 * 1) + 4 + dense_flops((2, 3, 4))
    assert tucker_flops(SHAPE, SHAPE) == dense_flops(SHAPE)
    assert tucker_bytes((4, 3, 5), SHAPE, 4, "int8") == 60 + 18 + 2 * 4  # 15 values of the core share a scale
    assert tucker_bytes((2, 3, 4), SHAPE, 4, None) == 4 * (24 + 8 + 18 + 4) + 4 * 5  # and an index for each row


def test_costs_of_many_ranks_at_once_are_those_of_each():
    axes = [torch.arange(1, size + 1) for size in SHAPE]
    ranks = [axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]]
    for cost in (tucker_parameters, tucker_flops, lambda r, s: tucker_bytes(r, s, 2, "int8")):
        together = cost(ranks, SHAPE)
        for rank in triples(SHAPE):
            assert int(together[rank[0] - 1, rank[1] - 1, rank[2] - 1]) == cost(rank, SHAPE)


def test_float64_tails_do_not_cancel():
    # of 1 and 1e-10, a total less what is inside would see only the first
    core = torch.zeros(2, 1, 1, dtype=torch.float64)
    core[0], core[1] = 1.0, 1e-10
    for error, rank in ((2e-10, 1), (0.5e-10, 2)):
        target = Target(MaxError(error), (40, 1, 1), 8, None)
        assert best_block(core, 0.0, 1.0, target)[1][0] == rank
