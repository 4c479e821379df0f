import pytest
import torch
from support import low_rank, normal
from torch import Tensor

from compress_bilinear import decomposition
from compress_bilinear.decomposition import PLAIN, Metric, unwhitened_cp, unwhitened_tucker
from compress_bilinear.errors import CompressionError

SHAPE = (4, 6, 5)


def moment(size: int, rows: int = 400, seed: int = 0) -> Tensor:
    """Of rows whose directions have very different variances."""
    values = normal(rows, size, seed=seed) * torch.logspace(0, 1, size, dtype=torch.float64)
    return values.T @ values / rows


def metric(rows: int = 10**9, output: bool = True) -> Metric:
    out = moment(SHAPE[0], seed=1) if output else None
    return Metric.of_moments((out, moment(SHAPE[1], seed=2), moment(SHAPE[2], seed=3)), rows)


@pytest.mark.parametrize("output", [False, True])
def test_unwhitening_undoes_whitening(output):
    weight, found = normal(*SHAPE), metric(output=output)
    white = found.whiten(weight)
    for mode in range(3):
        flat = white.movedim(mode, 0).flatten(1)
        white = found.unwhiten(mode, flat).view(flat.shape[0], *white.movedim(mode, 0).shape[1:]).movedim(0, mode)
    torch.testing.assert_close(white, weight, rtol=0, atol=1e-10)


def turns(shape=SHAPE) -> list[Tensor]:
    return [torch.linalg.qr(normal(size, size, seed=seed))[0] for seed, size in enumerate(shape)]


@pytest.mark.parametrize("start", [PLAIN, metric(output=False), metric()], ids=["plain", "inputs", "all"])
def test_a_turned_metric_whitens_into_turned_coordinates_and_back(start):
    weight, found = normal(*SHAPE), start.turned(turns())
    expected = torch.einsum("oij,oa,ib,jc->abc", start.whiten(weight), *turns())
    torch.testing.assert_close(found.whiten(weight), expected)
    torch.testing.assert_close(torch.einsum("oij,ao,bi,cj->abc", weight, *found.roots), expected)
    torch.testing.assert_close(torch.einsum("oij,ao,bi,cj->abc", expected, *found.inverses), weight)
    input1, input2 = normal(7, SHAPE[1], seed=6), normal(7, SHAPE[2], seed=7)
    rows = found.whitened_rows(1, input1), found.whitened_rows(2, input2)
    outputs = torch.einsum("oij,ni,nj->no", weight, input1, input2)
    torch.testing.assert_close(torch.einsum("oij,ni,nj->no", expected, *rows), outputs @ found.roots[0].T)


@pytest.mark.parametrize("start", [PLAIN, metric()], ids=["plain", "whitened"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_ordered_weight_is_the_core_of_its_hosvd(start, dtype):
    weight = normal(*SHAPE).to(dtype)
    tensor, found = decomposition.ordered(weight, start)
    assert tensor.dtype == torch.float64  # it is small
    torch.testing.assert_close(found.whiten(weight.double()), tensor, rtol=0, atol=1e-12)
    white = torch.einsum(
        "oij,ao,bi,cj->abc", weight.double(), *(eye(r, n) for r, n in zip(start.roots, SHAPE, strict=True))
    )
    for mode in range(3):
        rows = tensor.movedim(mode, 0).flatten(1)
        values = torch.linalg.svdvals(white.movedim(mode, 0).flatten(1))
        torch.testing.assert_close(rows @ rows.T, torch.diag(values.square()), rtol=0, atol=1e-10)


def eye(root, size):
    return torch.eye(size, dtype=torch.float64) if root is None else root


def test_a_large_weight_is_ordered_in_its_own_precision():
    weight = low_rank((40, 50, 60), 20, noise=0.1).float()
    tensor, found = decomposition.ordered(weight)
    assert tensor.dtype == torch.float32
    assert float((found.whiten(weight) - tensor).norm() / weight.norm()) < 1e-5
    for mode in range(3):
        energy = tensor.double().movedim(mode, 0).flatten(1).square().sum(1)
        values = torch.linalg.svdvals(weight.double().movedim(mode, 0).flatten(1)).square()
        torch.testing.assert_close(energy, values, rtol=1e-3, atol=1e-6 * float(values[0]))


def test_a_weight_is_rounded_alike_in_turned_coordinates_of_its_metric():
    # what matters to rounding is the moments RᵀR, not which root of them
    weight, start = normal(*SHAPE), metric(output=False)
    other = start.turned([torch.eye(SHAPE[0], dtype=torch.float64), *turns()[1:]])
    rounded = [decomposition.stored_weight(weight, "int8", found) for found in (start, other)]
    torch.testing.assert_close(*rounded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_whitened_decomposition_of_full_rank_is_the_weight_again(dtype):
    weight, found = low_rank(SHAPE, 3).to(dtype), metric()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for again in (
        unwhitened_cp(decomposition.cp(found.whiten(weight), 3), found, dtype),
        unwhitened_tucker(decomposition.tucker(found.whiten(weight), SHAPE), found, dtype),
    ):
        assert again.factors[0].dtype == dtype
        assert float((again.to_tensor().double() - weight.double()).norm() / weight.double().norm()) < tolerance


def test_a_whitened_error_is_the_expected_error_of_the_outputs():
    first, second, lost = moment(SHAPE[1], seed=2), moment(SHAPE[2], seed=3), normal(*SHAPE, seed=5)
    found = Metric.of_moments((None, first, second), 10**9)
    # E (x1ᵀ D x2)² for independent x1 and x2, summed over outputs, up to the common scale and the damping
    expected = torch.einsum("oij,ik,jl,okl->", lost, first, second, lost)
    scale = float(first.diagonal().mean() * second.diagonal().mean())
    assert float(found.whiten(lost).square().sum()) * scale == pytest.approx(float(expected), rel=0.01)


def test_outputs_count_by_their_gradients():
    gradient = torch.diag(torch.tensor([9.0, 1, 1, 1], dtype=torch.float64))
    white = Metric.of_moments((gradient, None, None), 10**9).whiten(torch.ones(SHAPE, dtype=torch.float64))
    assert float(white[0].norm() / white[1].norm()) == pytest.approx(3, rel=0.01)


def test_whitened_inputs_give_the_outputs_of_the_weight():
    weight, found = normal(*SHAPE), metric(output=False)
    input1, input2 = normal(7, SHAPE[1], seed=6), normal(7, SHAPE[2], seed=7)
    white = (found.whitened_rows(1, input1), found.whitened_rows(2, input2))
    torch.testing.assert_close(
        torch.einsum("oij,ni,nj->no", found.whiten(weight), *white),
        torch.einsum("oij,ni,nj->no", weight, input1, input2),
    )


SINGULAR = {
    "zero": torch.zeros(6, 6),
    "constant input": torch.ones(6, 6) * 4,
    "one row": torch.outer(torch.arange(6.0), torch.arange(6.0)),
    "rank two": normal(6, 2) @ normal(6, 2).T,
    "huge": torch.eye(6, dtype=torch.float64) * 1e200,
    "tiny": torch.eye(6, dtype=torch.float64) * 1e-200,
}


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("rows", [0, 1, 3, 10**6])
def test_singular_moments_have_finite_inverses(name, rows):
    found = Metric.of_moments((None, SINGULAR[name].double(), None), rows)
    root, inverse = found.roots[1], found.inverses[1]
    assert bool(torch.isfinite(root).all())
    torch.testing.assert_close(root @ inverse, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-9)
    assert float(torch.linalg.cond(root)) < 100


def test_few_rows_are_believed_less():
    singular = SINGULAR["one row"].double()
    conditions = [
        float(torch.linalg.cond(Metric.of_moments((None, singular, None), n).roots[1])) for n in (2, 20, 2000)
    ]
    assert conditions == sorted(conditions)
    assert conditions[0] < conditions[-1] / 3


def test_the_scale_of_moments_does_not_matter():
    scaled = Metric.of_moments((None, 1e6 * moment(6), None), 50)
    torch.testing.assert_close(scaled.roots[1], Metric.of_moments((None, moment(6), None), 50).roots[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_no_numbers_are_an_error(value):
    with pytest.raises(CompressionError, match="moments should be finite"):
        Metric.of_moments((None, torch.full((3, 3), value), None), 5)


def test_autocast_does_not_matter():
    weight, found = low_rank((20, 30, 40), 3).float(), Metric.of_moments((None, moment(30), moment(40)), 400)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = found.whiten(weight)
    assert torch.equal(inside, found.whiten(weight))
