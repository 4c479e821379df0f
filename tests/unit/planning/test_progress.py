import re

import pytest

from compress_bilinear.planning import ProgressBars


@pytest.mark.parametrize("shown", [False, None])
def test_nothing_is_shown_where_nobody_looks(shown, capsys):
    with ProgressBars(shown) as bars:
        assert list(bars.track([1, 2], description="Calibrating")) == [1, 2]
        bars.parts("Solving", 2)(0, "rel")(0.5, 0.1)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_shown_bar_names_the_layer_and_its_error_on_stderr(capsys):
    with ProgressBars(True) as bars:
        bars.parts("Solving", 2)(1, "rel[0]")(0.5, 0.1234)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Solving rel[0]" in captured.err
    assert "error 0.1234" in captured.err
    assert "75%" in captured.err
    assert re.search(r"left -:--:--|left \d:\d\d:\d\d", captured.err)


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
