import math

import pytest

from compress_bilinear.decomposition import _budget as _clock
from compress_bilinear.decomposition._budget import Budget, check_max_seconds
from compress_bilinear.errors import ConfigError


@pytest.fixture
def now(monkeypatch):
    times = [100.0]
    monkeypatch.setattr(_clock.time, "perf_counter", lambda: times[0])
    return times


def test_fractions_are_of_the_time_left_after_preparing_and_closing(now):
    budget = Budget(10)
    assert budget.left() == 10
    now[0] += 2
    budget.prepared(closing=3)
    assert (budget.left(), budget.left(0.2)) == (5, 1)
    now[0] += 4
    assert (budget.elapsed(), budget.left(), budget.left(0.2)) == (6, 1, -3)


def test_without_a_limit_there_is_always_time(now):
    budget = Budget()
    budget.prepared(closing=3)
    now[0] += 1e9
    assert not budget.limited
    assert budget.left(0.1) == math.inf


def test_neither_progress_nor_the_best_error_goes_back(now):
    seen = []
    budget = Budget(None, lambda done, error: seen.append((done, error)))
    for done, error in ((0.2, 0.9), (0.1, 0.95), (0.5, 0.4), (1.5, 0.6)):
        budget.report(done, error)
    assert seen == [(0.2, 0.9), (0.2, 0.9), (0.5, 0.4), (1.0, 0.4)]


def test_with_a_limit_time_is_progress(now):
    seen = []
    budget = Budget(10, lambda done, error: seen.append(done))
    now[0] += 5
    budget.report(0.1, 1.0)
    assert seen == [0.5]


@pytest.mark.parametrize("value", [0, -1, "1", True, math.nan])
def test_a_limit_is_a_positive_number(value):
    with pytest.raises(ConfigError, match=r"`max_seconds` should be a positive number or None\. Found"):
        check_max_seconds(value)
