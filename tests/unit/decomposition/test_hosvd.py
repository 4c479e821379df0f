import pytest
import torch
from support import low_rank

from compress_bilinear.decomposition import Budget
from compress_bilinear.decomposition._hosvd import start
from compress_bilinear.decomposition._source import Source
from compress_bilinear.decomposition._tucker import refine

CASES = [
    ((9, 40, 37), (4, 8, 8)),
    ((9, 40, 37), (9, 8, 8)),  # one mode stays as it is
    ((40, 9, 37), (8, 4, 9)),
    ((37, 40, 9), (8, 8, 4)),
    ((3, 40, 37), (3, 19, 18)),  # as many columns as the size, with those to spare
    ((2, 40, 37), (1, 15, 15)),  # more than the other modes can span
]


def generator():
    return torch.Generator().manual_seed(0)


def energy(source, sizes, **options):
    return float(start(source, sizes, generator(), **options)[1].double().square().sum())


@pytest.mark.parametrize(("shape", "sizes"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["noise", "deficient", "zero"])
def test_sketched_bases_are_orthonormal_and_their_core_is_the_projection(shape, sizes, kind):
    weight = low_rank(shape, 3, noise=0.5 if kind == "noise" else 0.0) * (kind != "zero")
    source = Source(weight)
    basis, core = start(source, sizes, generator(), large=1)
    assert core.shape == sizes
    for u, size, kept in zip(basis, shape, sizes, strict=True):
        assert (u is None) == (size == kept)
        if u is not None:
            torch.testing.assert_close(u.T @ u, torch.eye(kept, dtype=u.dtype), rtol=0, atol=1e-10)
    torch.testing.assert_close(core, source.project(basis), rtol=0, atol=1e-9 * max(1.0, float(weight.norm())))


@pytest.mark.parametrize(("shape", "sizes"), CASES[:4], ids=str)
def test_a_sketch_keeps_nearly_what_the_hosvd_keeps(shape, sizes):
    source = Source(low_rank(shape, 30, noise=0.5))
    exact = energy(source, sizes)
    assert 0.85 * exact < energy(source, sizes, large=1) < 1.05 * exact  # the HOSVD is not optimal either


def test_a_sketch_is_the_same_for_the_same_seed():
    source = Source(low_rank((9, 40, 37), 30))
    first, second = (start(source, (4, 8, 8), generator(), large=1)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_hooi_ends_as_well_from_a_sketch():
    source, sizes = Source(low_rank((9, 60, 57), 40, noise=0.3)), (4, 12, 11)
    cores = [refine(source, start(source, sizes, generator(), large=n)[0], Budget())[1] for n in (10**9, 1)]
    exact, sketched = (source.total - float(core.square().sum()) for core in cores)
    assert sketched < 1.006 * exact
