import re

import pytest

from compress_bilinear.planning import ProgressBars


@pytest.mark.parametrize("shown", [False, None])
def test_nothing_is_shown_where_nobody_looks(shown, capsys):
    with ProgressBars(shown) as bars:
        assert list(bars.track([1, 2], description="Calibrating")) == [1, 2]
        bars.parts("Solving", [1.0, 1.0])(0, "rel")(0.5, 0.1)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_shown_bar_names_the_layer_and_its_error_on_stderr(capsys):
    with ProgressBars(True) as bars:
        bars.parts("Solving", [1.0, 1.0])(1, "rel[0]")(0.5, 0.1234)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Solving rel[0]" in captured.err
    assert "error 0.1234" in captured.err
    assert "75%" in captured.err
    assert re.search(r"left -:--:--|left \d:\d\d:\d\d", captured.err)


def test_a_stage_that_ends_sooner_than_it_might_have_is_done():
    with ProgressBars(False) as bars:
        with bars.stage("fit"):
            bars.parts("Solving", [3.0, 2.0])(0, "rel")(0.5, 0.1)
        with bars.stage("choose"):
            bars.parts("Choosing", [3.0], later=1.0)(0, "rel")(0.5, 0.1)
        assert [(task.completed, task.total) for task in bars.tasks] == [(5.0, 5.0), (3.0, 4.0)]
        with bars.stage("judge"):
            bars.parts("Judging", [1.0], later=0.0)(0, "rel")
    assert bars.finished


def test_no_time_is_told_where_it_is_not_known_what_follows(capsys):
    with ProgressBars(True) as bars:
        bars.parts("Predicting", [1.0], known=False)(0, "rel")(0.5, 0.1)
    assert "Predicting rel: error 0.1000" in (shown := capsys.readouterr().err)
    assert "left" not in shown


def test_it_passes_on_what_is_raised_inside():
    with pytest.raises(KeyboardInterrupt), ProgressBars(False):
        raise KeyboardInterrupt


def test_items_of_unknown_number_are_tracked():
    with ProgressBars(False) as bars:
        assert list(bars.track((k for k in range(3)), description="Calibrating")) == [0, 1, 2]


def test_stages_are_timed_one_by_one(monkeypatch):
    now = iter([10.0, 12.5, 20.0, 20.25])
    monkeypatch.setattr("compress_bilinear.planning._progress.time.perf_counter", lambda: next(now))
    bars = ProgressBars(False)
    with bars.stage("calibrate"):
        pass
    with bars.stage("fit"):
        pass
    assert bars.seconds == {"calibrate": 2.5, "fit": 0.25}


def test_stages_that_share_a_bar_have_one_time_left():
    now, speed = 0.0, 2.5
    with ProgressBars(False) as bars:
        bars.disable, bars.get_time = False, lambda: now
        left = 8.0
        choosing = bars.parts("Choosing", [1.0, 3.0, 2.0], later=2.0)
        judging = None
        for number, size in enumerate([1.0, 3.0, 2.0, 2.0]):
            if number == 3:
                judging = bars.parts("Judging", [size], later=0.0)
            report = choosing(number, "rel") if judging is None else judging(0, "rel")
            for done in (0.25, 0.5, 0.75, 1.0):
                now += 0.25 * size / speed
                left -= 0.25 * size
                report(done, 0.5)
                (task,) = bars.tasks
                if number > 0 and left > 0:
                    assert task.time_remaining == pytest.approx(left / speed, abs=1.0)  # whole seconds, rounded up
        assert task.finished
