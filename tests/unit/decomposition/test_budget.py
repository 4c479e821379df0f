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


def test_a_child_has_its_share_of_the_time_that_is_left(now):
    budget = Budget(10)
    now[0] += 2
    assert budget.left() == 8
    child = budget.child(0.25)
    now[0] += 1
    assert (child.elapsed(), child.left(), budget.left()) == (1, 1, 7)
    now[0] += 4  # more than its share: the next child has less
    assert budget.child(0.5).left() == 1.5
    now[0] += 9
    assert 0 < budget.child().left() < 1e-6  # a part that comes too late is over as it begins
    assert 0 < budget.part(1.0, 2.0, lambda done, error: None).left() < 1e-6


def test_without_a_limit_there_is_always_time(now):
    budget = Budget()
    now[0] += 1e9
    assert not budget.limited
    assert not budget.child(0.1).limited
    assert budget.left() == math.inf


def test_a_child_reports_its_part_of_the_work(now):
    seen = []
    budget = Budget(None, lambda done, error: seen.append((done, error)))
    inner = budget.child(span=(0.2, 0.6)).child(span=(0.5, 1.0))
    for done in (0.0, 0.5, 1.0):
        inner.report(done, 0.5)
    assert seen == [(pytest.approx(done), 0.5) for done in (0.4, 0.5, 0.6)]


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
