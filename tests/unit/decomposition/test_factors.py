import math
from dataclasses import FrozenInstanceError

import pytest
import tensorly
import torch
from support import DTYPES, assert_matches_reference, normal
from tensorly.cp_tensor import cp_to_tensor
from tensorly.tucker_tensor import tucker_to_tensor

from compress_bilinear.decomposition import CPDecomposition, TuckerDecomposition, relative, relative_errors, row_slices
from compress_bilinear.errors import CompressionError

SHAPE = (5, 7, 9)


def cp_example(dtype=torch.float64, rank=4):
    return CPDecomposition(normal(rank, dtype=dtype), tuple(normal(size, rank, dtype=dtype) for size in SHAPE), 0.5)


def tucker_example(dtype=torch.float64, rank=(2, 3, 4)):
    factors = tuple(normal(size, r, dtype=dtype) for size, r in zip(SHAPE, rank, strict=True))
    return TuckerDecomposition(normal(*rank, dtype=dtype), factors, 0.5)


EXAMPLES = (cp_example, tucker_example)


def head(found):
    """What a decomposition has beside its factors."""
    return found.weights if isinstance(found, CPDecomposition) else found.core


def reference(found):
    factors = [factor.double() for factor in found.factors]
    if isinstance(found, CPDecomposition):
        return torch.einsum("r,or,ir,jr->oij", found.weights.double(), *factors)
    return torch.einsum("abc,oa,ib,jc->oij", found.core.double(), *factors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("example", EXAMPLES)
def test_to_tensor_is_the_definition(example, dtype):
    found = example(dtype)
    assert found.shape == SHAPE
    assert found.to_tensor().dtype == dtype
    assert_matches_reference(found.to_tensor(), reference(found))


def test_ranks_are_those_of_the_parts():
    assert cp_example(rank=4).rank == 4
    assert tucker_example(rank=(2, 3, 4)).rank == (2, 3, 4)


@pytest.mark.parametrize("most", [1, 100, 2**22])
@pytest.mark.parametrize("example", EXAMPLES)
def test_relative_error_is_that_of_the_residual_in_any_slabs(example, most):
    found = example(torch.float32, rank=4 if example is cp_example else (5, 6, 8))
    weight = normal(*SHAPE)
    expected = float((weight - reference(found)).norm() / weight.norm())
    assert found.relative_error(weight) == pytest.approx(expected, rel=1e-12)
    assert relative_errors(weight, found.dense_rows, most=most)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("most", [1, 63, 64, 126, 1000])
def test_row_slices_cover_the_first_axis_once(most):
    slices = list(row_slices(SHAPE, most))
    assert [row for part in slices for row in range(5)[part]] == list(range(5))
    assert all(part.stop - part.start <= max(1, most // 63) for part in slices)


@pytest.mark.parametrize("example", EXAMPLES)
def test_relative_error_of_another_shape_is_an_error(example):
    with pytest.raises(CompressionError, match=r"\(5, 7, 9\). Found \(5, 9, 7\)"):
        example().relative_error(normal(5, 9, 7))


def test_relative_of_nothing_is_0_and_of_something_over_nothing_infinite():
    assert relative(0.0, 0.0) == 0.0
    assert relative(1.0, 0.0) == math.inf
    assert relative(1.0, 4.0) == 0.5


@pytest.mark.parametrize("example", EXAMPLES)
def test_results_are_frozen(example):
    found = example()
    with pytest.raises(FrozenInstanceError):
        found.factors = ()
    with pytest.raises(FrozenInstanceError):
        found.error = 0.0
    assert isinstance(found.factors, tuple)


@pytest.mark.parametrize(
    ("example", "to_tensor"), [(cp_example, cp_to_tensor), (tucker_example, tucker_to_tensor)], ids=["cp", "tucker"]
)
def test_tensorly_reads_and_returns_the_same_tensor(example, to_tensor):
    found = example()
    theirs = found.to_tensorly()
    with tensorly.backend_context("pytorch"):
        assert_matches_reference(to_tensor(theirs), reference(found))
    back = type(found).from_tensorly(theirs)
    for part, original in zip((head(back), *back.factors), (head(found), *found.factors), strict=True):
        assert torch.equal(part, original)


@pytest.mark.parametrize("example", EXAMPLES)
def test_from_tensorly_takes_numpy_arrays(example):
    found = example()
    arrays = (head(found).numpy(), [factor.numpy() for factor in found.factors])
    back = type(found).from_tensorly(arrays)
    assert torch.equal(back.to_tensor(), found.to_tensor())


def test_from_tensorly_without_weights_has_weights_1():
    found = CPDecomposition.from_tensorly((None, cp_example().factors))
    assert torch.equal(found.weights, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("example", EXAMPLES)
def test_from_tensorly_of_another_order_is_an_error(example):
    found = example()
    with pytest.raises(CompressionError, match="order 3 is required"):
        type(found).from_tensorly((head(found), found.factors[:2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f[:2], "three matrices"),
        (lambda f: (f[0][:, :1], f[1], f[2]), "The out factor should have shape"),
        (lambda f: (f[0], f[1], f[2][:, :, None]), "The in2 factor should have shape"),
        (lambda f: (f[0], f[1].float(), f[2]), "Found torch.float32"),
        (lambda f: (f[0], f[1].long(), f[2]), "floating torch.Tensor. Found torch.int64"),
        (lambda f: (f[0], f[1], f[2].numpy()), "floating torch.Tensor. Found ndarray"),
        (lambda f: (f[0], f[1], f[2].to("meta")), "Found torch.float64 on meta"),
        (lambda f: (f[0], f[1] / 0, f[2]), "finite. Found NaN or infinity"),
    ],
    ids=["two", "rank", "order", "dtype", "integers", "numpy", "device", "infinite"],
)
@pytest.mark.parametrize("example", EXAMPLES)
def test_factors_that_do_not_fit_are_an_error(example, change, message):
    found = example()
    with pytest.raises(CompressionError, match=message):
        type(found)(head(found), change(found.factors))


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_head_of_another_order_is_an_error(example):
    found = example()
    with pytest.raises(CompressionError, match="should have shape"):
        type(found)(head(found).flatten()[:, None], found.factors)


def test_amplification_is_1_for_orthogonal_components_and_large_where_they_cancel():
    eye = torch.eye(3, dtype=torch.float64)
    weights = torch.tensor([3.0, -2.0, 0.5], dtype=torch.float64)
    assert CPDecomposition(weights, (eye, eye, eye)).amplification == pytest.approx(1)
    near = torch.tensor([[1.0, 1.0], [0.0, 1e-3]], dtype=torch.float64)  # 1000 (a b c' - a b c) = a b (0, 1)
    ones = torch.ones(1, 2, dtype=torch.float64)
    cancelling = CPDecomposition(torch.tensor([-1000.0, 1000.0], dtype=torch.float64), (ones, ones, near))
    assert cancelling.amplification == pytest.approx(1000 * math.sqrt(2), rel=1e-5)
