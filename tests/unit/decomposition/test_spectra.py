import pytest
import torch
from support import low_rank

from compress_bilinear import decomposition


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 9, 7), (1, 4, 6), (3, 1, 1), (40, 33, 90)], ids=str)
def test_they_are_the_singular_values_of_the_unfoldings(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for mode, found in enumerate(decomposition.spectra(weight)):
        unfolded = weight.double().movedim(mode, 0).flatten(1)
        exact = torch.zeros(shape[mode], dtype=torch.float64)
        values = torch.linalg.svdvals(unfolded) / unfolded.norm()
        exact[: len(values)] = values
        assert found.indices[0] == 1
        assert found.indices[-1] == shape[mode]
        assert list(found.indices) == sorted(set(found.indices))
        kept = torch.tensor(found.values, dtype=torch.float64)
        torch.testing.assert_close(kept, exact[torch.tensor(found.indices) - 1], rtol=1e-3, atol=1e-6)
        assert not found.sampled


def test_long_modes_are_thinned_out():
    found = decomposition.spectra(low_rank((2, 500, 3), 2))[1]
    assert 32 <= len(found.indices) <= 48
    assert found.indices[:3] == (1, 2, 3)


def test_a_large_weight_is_sampled_and_near():
    weight = low_rank((60, 50, 40), 5, noise=0.3)
    exact = decomposition.spectra(weight)
    for one, other in zip(exact, decomposition.spectra(weight, most_flops=3e6), strict=True):
        assert other.sampled
        for index in range(5):
            assert other.values[index] == pytest.approx(one.values[index], rel=0.35)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_are_relative_to_the_norm(scale):
    weight = low_rank((6, 5, 4), 2)
    for one, other in zip(decomposition.spectra(weight), decomposition.spectra(weight * scale), strict=True):
        assert other.values[:2] == pytest.approx(one.values[:2], rel=1e-3)


def test_zero_infinite_and_too_long_ones_have_none():
    assert decomposition.spectra(torch.zeros(3, 4, 5)) == ()
    assert decomposition.spectra(torch.full((3, 4, 5), torch.nan)) == ()
    assert decomposition.spectra(torch.full((3, 4, 5), torch.inf)) == ()
    assert decomposition.spectra(torch.ones(3, 4, 5), longest=4) == ()
