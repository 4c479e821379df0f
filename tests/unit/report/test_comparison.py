import dataclasses
import math
import re

import pytest
from records import NASTY, kept, replaced, report

import compress_bilinear as cb
from compress_bilinear.report import (
    DEFAULT_FIELDS,
    LayerReport,
    Limit,
    Panel,
    better,
    compare,
    failures,
    numeric_fields,
)

ONE = report(replaced("a", bytes_after=9000), replaced("b", output_error=0.3), metric_after=0.5)
TWO = report(replaced("a", bytes_after=7000), kept("b"), replaced("c", speedup=None), metric_after=0.75)
RUNS = {"one": ONE, "two": TWO}


def panel(field: str, runs=RUNS) -> Panel:
    (found,) = compare(runs, (field,)).panels
    return found


class TestCompare:
    def test_rows_are_layers_and_columns_are_runs(self):
        found = panel("bytes_after")
        assert found.rows == ("a", "b", "c")
        assert found.values == ((9000, 7000), (9000, 1_000_000), (None, 9000))
        assert compare(RUNS).runs == ("one", "two")

    def test_the_best_of_each_row_is_marked_in_the_figures_own_direction(self):
        assert [panel("bytes_after").best(k) for k in range(3)] == [(False, True), (True, False), (False, False)]
        assert panel("speedup").best(1) == (True, False)  # 5 against a kept layer's 1

    def test_equal_ones_are_not_marked_but_several_best_are(self):
        values = ((1.0, 1.0, None), (1.0, 1.0, 2.0), (math.nan, 1.0, 2.0))
        found = Panel(field="weight_error", better="lower", rows=("a", "b", "c"), values=values)
        assert [found.best(k) for k in range(3)] == [(False,) * 3, (True, True, False), (False, True, False)]

    def test_what_has_no_direction_has_no_best(self):
        assert better("batch_size") is None
        assert not any(panel("batch_size").best(0))

    @pytest.mark.parametrize("field", numeric_fields())
    def test_every_numeric_field_can_be_compared(self, field):
        assert panel(field).values[0][0] == getattr(ONE.layers[0], field)
        expected = {"speedup": "higher", "speedup_vs_dense": "higher", "weight_error": "lower", "bytes_after": "lower"}
        assert better(field) == expected.get(field, better(field))

    def test_a_kept_layer_counts_as_it_stands_in_the_model(self):
        expected = {
            "weight_error": 0, "output_error": 0, "speedup": 1, "latency_after_ms": 2.5, "speedup_vs_dense": 0.4,
        }  # fmt: skip
        for field, value in expected.items():
            assert panel(field).values[1][1] == value
        assert any("two: kept as they were: b" in note for note in compare(RUNS).notes)

    def test_defaults_leave_out_what_no_run_knows_and_add_the_model(self):
        bare = replaced(output_error=None, latency_after_ms=None, speedup=None, speedup_vs_dense=None)
        shown = [one.field for one in compare({"x": report(bare)}).panels]
        assert shown == ["bytes_after", "weight_error", "model_bytes_after"]
        assert [one.field for one in compare(RUNS).panels] == [*DEFAULT_FIELDS, "model_bytes_after", "metric_after"]

    def test_different_machines_are_said(self):
        other = dataclasses.replace(TWO, environment={**TWO.environment, "threads": 8})
        assert "Measured on different threads: one 2, two 8." in compare({"one": ONE, "two": other}).notes

    def test_without_reports_or_with_an_unknown_figure_it_is_an_error(self):
        with pytest.raises(cb.CompressionError, match="at least one report"):
            compare({})
        with pytest.raises(cb.CompressionError, match=r"Found 'speed'\. Did you mean speedup\?"):
            compare(RUNS, ("speed",))
        for field in ("rank", "front", "reason", "spectra", "latency_after_quartiles_ms", "shape"):
            with pytest.raises(cb.CompressionError, match="should name one of weight_error"):
                compare(RUNS, (field,))


class TestRenderers:
    def test_the_terminal_has_stars(self):
        text = str(compare(RUNS))
        assert re.search(r"a +9 kB +7 kB\*", text)
        assert "higher is better, * marks the best" in text
        assert all(line == line.rstrip() for line in text.split("\n"))

    def test_the_dict_is_plain(self):
        found = compare(RUNS, ("bytes_after",)).to_dict()
        assert found["figures"] == [
            {
                "figure": "bytes_after",
                "better": "lower",
                "layers": ["a", "b", "c"],
                "values": [[9000, 7000], [9000, 1_000_000], [None, 9000]],
                "best": [[False, True], [True, False], [False, False]],
            }
        ]

    @pytest.mark.parametrize("name", NASTY)
    def test_names_move_no_cursor(self, name):
        assert "\x1b" not in str(compare({name: report(replaced(name))}))


class TestLimits:
    def test_each_layer_that_breaks_one_has_a_line(self):
        limits = [Limit.parse("output_error=0.25", True), Limit.parse("speedup = 2", False)]
        assert failures(RUNS, limits) == [
            "one: b: output_error 0.3 is above 0.25",
            "two: b: speedup 1 is below 2",
            "two: c: speedup is not known, which counts as below 2",
        ]

    def test_a_bound_that_is_just_met_holds(self):
        met = [Limit.parse("bytes_after=9000", True), Limit.parse("bytes_after=9000", False)]
        assert failures({"x": report(replaced())}, met) == []

    def test_nothing_to_hold_is_no_failure(self):
        assert failures(RUNS, []) == []

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("output_eror=1", r"--fail-above should name one of .*Found 'output_eror'. Did you mean output_error\?"),
            ("speedup", "should be FIELD=NUMBER, say output_error=0.05. Found 'speedup'"),
            ("speedup=", "--fail-above speedup should be a number. Found ''"),
            ("speedup=fast", "should be a number. Found 'fast'"),
            ("speedup=nan", "should be a number. Found 'nan'"),
            ("=1", "should name one of"),
            ("rank=3", "should name one of"),
        ],
    )
    def test_mistakes_are_named(self, text, problem):
        with pytest.raises(cb.CompressionError, match=problem):
            Limit.parse(text, True)


def test_numeric_fields_are_those_that_hold_one_number():
    layer = replaced()
    for field in dataclasses.fields(LayerReport):
        value = getattr(layer, field.name)
        assert (field.name in numeric_fields()) == isinstance(value, (int, float)) or field.name == "rank"
