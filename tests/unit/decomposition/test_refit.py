import pytest
import torch
from support import low_rank
from torch import Tensor

from compress_bilinear import decomposition
from compress_bilinear.decomposition import Budget, CPDecomposition, TuckerDecomposition, refit_cp, refit_tucker

SHAPES = ((6, 8, 7), (1, 9, 5), (5, 1, 6), (6, 5, 1), (1, 1, 1), (9, 4, 12))


def rows_for(weight: Tensor, count: int = 200, seed: int = 0) -> decomposition.Rows:
    """Correlated inputs of a nonzero mean, and what the weight makes of them."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    inputs = []
    for size in weight.shape[1:]:
        mixing = torch.randn(3, size, generator=generator, dtype=torch.float64)
        noise = torch.randn(count, size, generator=generator, dtype=torch.float64)
        inputs.append((hidden @ mixing + 0.3 * noise + 0.2).to(weight.dtype))
    wanted = torch.einsum("oij,ni,nj->no", weight.double(), *(x.double() for x in inputs)).to(weight.dtype)
    weights = torch.linspace(0.3, 1, count).to(weight.dtype)
    return inputs[0], inputs[1], wanted, weights


def objective(found: CPDecomposition | TuckerDecomposition, rows: decomposition.Rows) -> float:
    """Weighted squared error with the best constant offset, in float64."""
    input1, input2, wanted, weights = (value.double() for value in rows)
    lost = torch.einsum("oij,ni,nj->no", found.to_tensor().double(), input1, input2) - wanted
    lost = lost - (weights @ lost) / weights.sum()
    return float(weights @ lost.square().sum(1))


def start(weight: Tensor, kind: str, rank) -> CPDecomposition | TuckerDecomposition:
    return decomposition.cp(weight, rank) if kind == "cp" else decomposition.tucker(weight, rank)


def refit(found, rows):
    return (refit_cp if isinstance(found, CPDecomposition) else refit_tucker)(found, rows, Budget(None, None))


CASES = [
    ("cp", lambda o, i, j: min(2, o * i, o * j, i * j)),
    ("cp", lambda o, i, j: min(o + i + j, o * i, o * j, i * j)),
]
CASES += [("tucker", lambda o, i, j: tuple(max(1, size // 2) for size in (o, i, j)))]
CASES += [("tucker", lambda o, i, j: (o, max(1, i - 1), j)), ("tucker", lambda o, i, j: (o, i, j))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "rank"), CASES, ids=["cp2", "cp_large", "tucker_half", "tucker_absorbed", "full"])
def test_it_never_raises_the_error_on_its_own_rows(shape, kind, rank):
    weight = low_rank(shape, 4, noise=0.3)
    rows, found = rows_for(weight), start(weight, kind, rank(*shape))
    again = refit(found, rows)
    assert again.rank == found.rank
    assert objective(again, rows) <= objective(found, rows) * (1 + 1e-9) + 1e-12 * float(rows[2].square().sum())


@pytest.mark.parametrize(("kind", "rank"), [("cp", 3), ("tucker", (2, 3, 3)), ("tucker", (6, 3, 3))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_lowers_the_error_of_correlated_rows_by_far(kind, rank, dtype):
    weight = low_rank((6, 8, 7), 20).to(dtype)
    rows, found = rows_for(weight), start(weight, kind, rank)
    assert objective(refit(found, rows), rows) < 0.5 * objective(found, rows)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize(("kind", "rank"), [("cp", 3), ("tucker", (2, 3, 3))])
def test_scales_do_not_matter(scale, kind, rank):
    weight = low_rank((6, 8, 7), 20)
    rows, found = rows_for(weight), start(weight, kind, rank)
    expected = objective(refit(found, rows), rows)
    scaled = rows_for(weight * scale)
    assert objective(refit(start(weight * scale, kind, rank), scaled), scaled) == pytest.approx(
        expected * scale**2, rel=0.1
    )


@pytest.mark.parametrize(("kind", "rank"), [("cp", 3), ("tucker", (2, 3, 3))])
def test_absorbed_modes_stay_identities(kind, rank):
    weight = low_rank((6, 8, 7), 20)
    again = refit(decomposition.tucker(weight, (6, 3, 7)), rows_for(weight))
    for mode in (0, 2):
        size = weight.shape[mode]
        torch.testing.assert_close(again.factors[mode].double(), torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("make", ["zero inputs", "one row", "constant rows"])
@pytest.mark.parametrize(("kind", "rank"), [("cp", 3), ("tucker", (2, 3, 3))])
def test_rows_that_say_little_leave_it_finite(make, kind, rank):
    weight = low_rank((6, 8, 7), 20)
    input1, input2, wanted, weights = rows_for(weight)
    if make == "zero inputs":
        rows = (input1 * 0, input2, wanted * 0, weights)
    elif make == "one row":
        rows = (input1[:1], input2[:1], wanted[:1], weights[:1])
    else:
        rows = tuple(value[:1].expand(50, *value.shape[1:]).contiguous() for value in (input1, input2, wanted, weights))
    again = refit(start(weight, kind, rank), rows)
    assert bool(torch.isfinite(again.to_tensor()).all())


def test_a_time_limit_is_kept_and_gives_no_worse():
    weight = low_rank((6, 8, 7), 20)
    rows, found = rows_for(weight), decomposition.cp(weight, 3)
    again = refit_cp(found, rows, Budget(1e-9, None))
    assert objective(again, rows) <= objective(found, rows) * (1 + 1e-9)
