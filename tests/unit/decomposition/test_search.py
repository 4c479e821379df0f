import math

import pytest

from compress_bilinear.decomposition import Budget, best_within, smallest, tightened


def power(size):
    return size, size**-0.5


@pytest.mark.parametrize("limit", [0.9, 0.5, 0.11, 0.0123])
@pytest.mark.parametrize("first", [None, 40, 9000])
def test_the_least_whole_size_is_bracketed(limit, first):
    trials = smallest(power, limit, 1, 10_000, first=first, close=1.0, whole=True)
    assert best_within(trials, limit).size == math.ceil(limit**-2)
    assert all(isinstance(trial.size, int) for trial in trials)
    assert len({trial.size for trial in trials}) == len(trials)


@pytest.mark.parametrize("exponent", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("first", [1e-3, 0.125, 0.9])
def test_the_least_fraction_is_within_the_ratio_asked_for(exponent, first):
    limit, exact = 0.2 ** (-exponent), 0.2
    trials = smallest(lambda size: (size, size**-exponent), limit, 1e-4, 0.97, first=first, close=1.04)
    assert exact * (1 - 1e-12) <= best_within(trials, limit).size <= 1.04 * exact
    assert len(trials) <= 14


def test_steps_of_the_error_are_no_obstacle():
    # nothing below 30, a cliff at 37
    def attempt(size):
        return None if size < 30 else (size, 0.3 if size < 37 else 1e-9)

    trials = smallest(attempt, 0.1, 1, 1000, close=1.0, whole=True)
    assert trials[0].error == math.inf
    assert best_within(trials, 0.1).result == 37


def test_a_limit_that_no_size_meets_gives_the_trials_up_to_the_largest():
    trials = smallest(power, 0.01, 1, 500, whole=True)
    assert best_within(trials, 0.01) is None
    assert trials[-1].size == 500


def test_a_limit_that_the_least_size_meets_needs_one_trial():
    assert [trial.size for trial in smallest(power, 1.0, 1, 500, whole=True)] == [1]


def test_no_attempt_begins_when_the_time_is_up():
    assert len(smallest(power, 0.01, 1, 500, budget=Budget(1e-9))) == 1
    assert len(smallest(power, 0.01, 1, 500, tries=3)) == 3


@pytest.mark.parametrize("rounding", [0.0, 1e-9, 0.02, 0.08])
@pytest.mark.parametrize("expected", [0.0, 0.02])
def test_a_target_is_tightened_until_rounding_fits(rounding, expected):
    found, error = tightened(lambda target: (target, math.hypot(target, rounding)), 0.1, expected=expected)
    assert error <= 0.1
    assert found >= 0.05


def test_a_rounding_above_the_limit_gives_the_last_error():
    found, error = tightened(lambda target: (target, math.hypot(target, 0.2)), 0.1, tries=4)
    assert (found, error) == (0.05, pytest.approx(math.hypot(0.05, 0.2)))
