import math
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from support import low_rank

from compress_bilinear import MaxError, MaxSize
from compress_bilinear.decomposition import ordered
from compress_bilinear.decomposition._sizes import tucker_bytes, tucker_flops, tucker_parameters
from compress_bilinear.decomposition._tucker_ranks import BlockEnergies
from compress_bilinear.ops import dense_flops

SHAPE = (4, 6, 5)
CORE = low_rank(SHAPE, 40)
TOTAL = float(CORE.square().sum())


def power_law(shape):
    weight = low_rank(shape, 2000)
    for mode, size in enumerate(shape):
        weight = weight * torch.arange(1, size + 1).pow(-0.6).view([-1 if m == mode else 1 for m in range(3)])
    return weight


def lost(rank, core=CORE):
    kept = core[: rank[0], : rank[1], : rank[2]]
    return float(core.square().sum() - kept.square().sum())


def triples(sizes=SHAPE):
    return list(product(*(range(1, size + 1) for size in sizes)))


@pytest.mark.parametrize("error", [0.95, 0.7, 0.4, 0.1])
def test_the_cheapest_triple_within_an_error_of_all_triples(error):
    rank, nbytes, found = BlockEnergies(CORE).best(
        partial(tucker_bytes, shape=SHAPE, itemsize=8, quantize=None), error=error
    )
    assert found == pytest.approx((lost(rank) / TOTAL) ** 0.5, rel=1e-9)
    allowed = [r for r in triples() if lost(r) <= error**2 * TOTAL * (1 + 1e-12)]
    assert tucker_bytes(rank, SHAPE, 8, None) == min(tucker_bytes(r, SHAPE, 8, None) for r in allowed) == nbytes
    assert rank in allowed


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_the_least_error_of_all_triples_within_a_size(fraction, quantize):
    prices = partial(tucker_bytes, shape=SHAPE, itemsize=8, quantize=quantize)
    rank, _, _ = BlockEnergies(CORE).best(prices, fraction * 960)
    allowed = [r for r in triples() if tucker_bytes(r, SHAPE, 8, quantize) <= fraction * 960]
    assert rank in allowed
    assert lost(rank) == pytest.approx(min(lost(r) for r in allowed), rel=1e-9)


def test_no_ranks_may_be_within_a_size():
    prices = partial(tucker_bytes, shape=SHAPE, itemsize=8, quantize=None)
    assert BlockEnergies(CORE).best(prices, 8) is None


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
        prices = partial(tucker_bytes, shape=(40, 1, 1), itemsize=8, quantize=None)
        assert BlockEnergies(core).best(prices, error=error)[0][0] == rank


LARGE = (30, 41, 37)
KINDS = {
    "power": ordered(power_law(LARGE))[0],
    "noise": ordered(low_rank(LARGE, 2000))[0],
    "low rank": ordered(low_rank(LARGE, 9, noise=0.1))[0],
}


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [MaxError(0.5), MaxError(0.15), MaxSize(1 / 8), MaxSize(0.02)], ids=repr)
def test_a_grid_finds_nearly_the_best(wanted, kind, quantize):
    # of so few ranks that one is the cheapest by far, the grid of twelve must still find a neighbour
    prices, whole = partial(tucker_bytes, shape=LARGE, itemsize=4, quantize=quantize), 4 * 30 * 41 * 37
    asked = {"error": wanted.error} if isinstance(wanted, MaxError) else {"size": wanted.fraction * whole}
    rank, *found = BlockEnergies(KINDS[kind], most=12).best(prices, **asked)
    _, *best = BlockEnergies(KINDS[kind]).best(prices, **asked)
    which = 0 if isinstance(wanted, MaxError) else 1  # bytes or errors
    assert best[which] * (1 - 1e-12) <= found[which] <= 1.03 * best[which]
    if isinstance(wanted, MaxError):
        assert lost(rank, KINDS[kind]) <= wanted.error**2 * float(KINDS[kind].square().sum())
    else:
        assert tucker_bytes(rank, LARGE, 4, quantize) <= wanted.fraction * whole


@pytest.mark.parametrize("most", [64, 12], ids=["all ranks", "a grid"])
def test_the_front_has_the_best_ranks_of_each_size(most):
    core, anchor = KINDS["power"], 20_000
    energies = BlockEnergies(core, most=most)
    front = energies.front(lambda rank: tucker_bytes(rank, LARGE, 4, None), anchor)
    total = float(core.square().sum())
    for rank, nbytes, loss in front:
        assert nbytes == tucker_bytes(rank, LARGE, 4, None)
        assert loss == pytest.approx(lost(rank, core) / total, rel=1e-9, abs=1e-14)
    for (_, smaller, more), (_, larger, less) in pairwise(front):
        assert (smaller < larger, more > less) == (True, True)
    assert front[-1][2] == pytest.approx(0, abs=1e-14)  # the whole
    # the largest within the anchor is what a search for that size finds, to the grid
    _, nbytes, loss = max((point for point in front if point[1] <= anchor), key=lambda point: point[1])
    _, _, least = BlockEnergies(core).best(partial(tucker_bytes, shape=LARGE, itemsize=4, quantize=None), anchor)
    assert nbytes > 0.97 * anchor
    assert least**2 <= loss * (1 + 1e-12)
    assert loss <= least**2 * (1 + 1e-9 if most == 64 else 1.1)


def test_sizes_of_a_front_grow_by_its_step():
    front = BlockEnergies(KINDS["noise"]).front(lambda rank: tucker_bytes(rank, LARGE, 4, None), step=1.5)
    sizes = [nbytes for _, nbytes, _ in front]
    # each size asked for gives one point at most, of bytes within a step below it
    assert len(front) <= 1 + math.log(sizes[-1] / sizes[0], 1.5) + 2
    assert all(larger > 1.2 * smaller for smaller, larger in pairwise(sizes[5:]))


def test_a_core_of_zeros_has_a_front():
    front = BlockEnergies(torch.zeros(3, 4, 5)).front(lambda rank: tucker_bytes(rank, (3, 4, 5), 4, None))
    assert [loss for _, _, loss in front] == [0.0]


def test_autocast_does_not_matter():
    core = KINDS["noise"].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = BlockEnergies(core)
    assert found.total == BlockEnergies(core).total
