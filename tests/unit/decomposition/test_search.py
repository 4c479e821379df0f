import math

import pytest

from compress_bilinear.decomposition import tightened


@pytest.mark.parametrize("rounding", [0.0, 1e-9, 0.02, 0.08])
@pytest.mark.parametrize("expected", [0.0, 0.02])
def test_a_target_is_tightened_until_rounding_fits(rounding, expected):
    found, error = tightened(lambda target: (target, math.hypot(target, rounding)), 0.1, expected=expected)
    assert error <= 0.1
    assert found >= 0.05


def test_a_rounding_above_the_limit_gives_the_last_error():
    found, error = tightened(lambda target: (target, math.hypot(target, 0.2)), 0.1, tries=4)
    assert (found, error) == (0.05, pytest.approx(math.hypot(0.05, 0.2)))
