import pytest
import torch
from support import low_rank

from compress_bilinear.decomposition._hosvd import start
from compress_bilinear.decomposition._source import Source

CASES = [
    ((9, 40, 37), (4, 8, 8)),
    ((9, 40, 37), (9, 8, 8)),  # one mode stays as it is
    ((40, 9, 37), (8, 4, 9)),
    ((37, 40, 9), (8, 8, 4)),
    ((3, 40, 37), (3, 19, 18)),  # as many columns as the size, with those to spare
    ((2, 40, 37), (1, 15, 15)),  # more than the other modes can span
]


@pytest.mark.parametrize(("shape", "sizes"), CASES, ids=str)
@pytest.mark.parametrize("kind", ["noise", "deficient", "zero"])
def test_the_bases_are_orthonormal_and_their_core_is_the_projection(shape, sizes, kind):
    weight = low_rank(shape, 3, noise=0.5 if kind == "noise" else 0.0) * (kind != "zero")
    source = Source(weight)
    basis, core = start(source, sizes)
    assert core.shape == sizes
    for u, size, kept in zip(basis, shape, sizes, strict=True):
        assert (u is None) == (size == kept)
        if u is not None:
            torch.testing.assert_close(u.T @ u, torch.eye(kept, dtype=u.dtype), rtol=0, atol=1e-10)
    torch.testing.assert_close(core, source.project(basis), rtol=0, atol=1e-9 * max(1.0, float(weight.norm())))
