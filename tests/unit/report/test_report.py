import dataclasses
import json
import math
import re

import pytest
import torch
from support import bilinear, low_rank
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.fitting import Latency, Timing, stored_bytes
from compress_bilinear.report import (
    AS_CONFIGURED,
    SCHEMA_VERSION,
    ComputeMode,
    FrontPoint,
    LayerReport,
    Note,
    Report,
    error,
    size,
    size_change,
    speedup,
)

# what the design asks of every layer's record
FIELDS = {
    "name", "method", "rank", "decision", "reason", "weight_error", "output_error", "params_before", "params_after",
    "bytes_before", "bytes_after", "flops_before", "flops_after", "latency_before_ms", "latency_after_ms", "speedup",
    "speedup_vs_dense", "batch_size", "amplification",
}  # fmt: skip


class Network(nn.ModuleDict):
    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self["up_a"](x1, x2) + self["b"](x1, x2)


def network() -> nn.Module:
    model = Network({"up_a": bilinear(9, 8, 7), "b": bilinear(9, 8, 7, seed=1), "c|d": bilinear(2, 2, 1)})
    model["again"] = model["b"]
    with torch.no_grad():
        for name in ("up_a", "b"):
            model[name].weight.copy_(low_rank((7, 9, 8), 2, noise=0.1))
    return model


CONFIG = {"up_a": cb.CPConfig(rank=2, quantize="int8"), "*": cb.TuckerConfig(rank=(1, 2, 2))}


@pytest.fixture(scope="module")
def applied():
    """A compressed network and its report: one layer faster, one slower, one kept."""
    with pytest.MonkeyPatch.context() as patch:
        after = iter([1.0, 4.0])

        def timed(layer, module, rows, seconds):
            median = next(after)
            return Timing(Latency(2, 1, 3), Latency(median, 0.5, 5), Latency(0.5, 0.25, 0.75), "one_gemm", rows)

        patch.setattr("compress_bilinear.planning._verdict.time_replacement", timed)
        generator = torch.Generator().manual_seed(0)
        batch = (torch.randn(20, 9, generator=generator), torch.randn(20, 8, generator=generator))
        return cb.compress(network(), CONFIG, calibration=[batch])


@pytest.fixture(scope="module")
def report(applied) -> Report:
    return applied[1]


def layer(**changes) -> LayerReport:
    plain = {
        "name": "rel", "shape": (2, 3, 4), "method": "cp", "decision": "replaced", "notes": (AS_CONFIGURED,),
        "params_before": 24, "params_after": 9, "bytes_before": 96, "bytes_after": 36,
    }  # fmt: skip
    return LayerReport(**plain | changes)


def holding(*layers: LayerReport) -> Report:
    return Report(layers=layers, model_bytes_before=1000, model_bytes_after=940, environment={"device": "cpu"})


def front(data) -> dict:
    point = {"method": "cp", "rank": 2, "quantize": None, "bytes": 9, "flops": 9, "weight_error": 0.5}
    data["layers"][0]["front"] = [point]
    return point


class TestData:
    def test_every_field_of_the_design_is_there(self, report):
        for record in report.to_dict()["layers"]:
            assert set(record) >= FIELDS
            assert any("quartiles" in field for field in record)

    def test_every_field_is_documented(self):
        documented = re.findall(r"\w+", LayerReport.__doc__)
        for field in dataclasses.fields(LayerReport):
            stem = re.sub(r"(_ms|_quartiles_ms)$", "", field.name)
            assert field.name in documented or f"{stem}_ms" in documented

    def test_the_example_has_one_of_each(self, report):
        fast, slow, kept = report.layers
        assert (fast.decision, slow.decision, kept.decision) == ("replaced", "replaced", "kept")
        assert (fast.speedup, slow.speedup, kept.speedup) == (2, 0.5, None)
        assert (fast.speedup_vs_dense, slow.speedup_vs_dense) == (0.5, 0.125)
        assert (fast.amplification is None, slow.amplification is None) == (False, True)
        assert fast.batch_size == 20
        assert 0 < fast.output_error < 1

    def test_bytes_are_those_that_the_module_stores(self, applied):
        model, report = applied
        for record in report.layers:
            assert record.bytes_after == stored_bytes(model[record.name])
            own = {value.data_ptr(): value for value in model[record.name].state_dict().values()}
            assert record.bytes_after == sum(value.numel() * value.element_size() for value in own.values())

    def test_model_bytes_are_the_sum_of_its_state(self, applied):
        model, report = applied
        unique = {value.data_ptr(): value for value in model.state_dict().values()}
        assert report.model_bytes_after == sum(value.numel() * value.element_size() for value in unique.values())
        assert report.model_bytes_before == stored_bytes(network())

    def test_the_config_is_told_as_a_file_has_it(self, report):
        assert report.config == {
            "layers": {
                "up_a": {"method": "cp", "rank": 2, "quantize": "int8"},
                "*": {"method": "tucker", "rank": [1, 2, 2]},
            }
        }

    def test_the_spectra_are_those_of_the_weight(self, report):
        for record in report.layers[:2]:
            assert [one.indices[-1] for one in record.spectra] == list(record.shape)
            for one in record.spectra:
                assert sum(value**2 for value in one.values) == pytest.approx(1, abs=1e-3)

    def test_the_environment_is_told(self, report):
        assert {"device", "dtype", "threads", "torch", "compress_bilinear", "processor"} <= set(report.environment)


class TestJson:
    def test_it_comes_back_equal(self, report):
        assert Report.from_json(report.to_json()) == report
        assert Report.from_dict(report.to_dict()) == report

    def test_a_front_and_a_metric_come_back_equal(self):
        points = (
            FrontPoint(method="tucker", rank=(1, 2, 3), quantize="int8", bytes=9, flops=8, output_error=0.5),
            FrontPoint(method="cp", rank=4, bytes=7, flops=6, weight_error=0.25, chosen=True),
        )
        report = dataclasses.replace(holding(layer(front=points)), metric_before=0.75, metric_after=0.5)
        assert Report.from_json(report.to_json()) == report

    def test_seconds_come_back_and_may_be_missing(self, report):
        assert list(report.seconds) == ["calibrate", "fit", "choose", "judge"]
        assert Report.from_json(report.to_json()).seconds == report.seconds
        data = report.to_dict()
        del data["seconds"]  # as in reports of former versions
        assert Report.from_dict(data).seconds == {}

    def test_seconds_are_told_in_one_line(self):
        known = dataclasses.replace(holding(layer()), seconds={"fit": 12.25, "judge": 0.5})
        for text in (str(known), known.to_markdown(), known.to_html()):
            assert "Took 12.8 s: fit 12.2, judge 0.5" in text
            assert "Took" not in holding(layer()).to_markdown()

    def test_it_carries_a_schema_version(self, report):
        assert json.loads(report.to_json())["schema_version"] == SCHEMA_VERSION == 3

    def test_a_report_that_does_not_know_the_groups_is_read(self):
        data = holding(layer()).to_dict()
        del data["layers"][0]["calibration_groups"]
        assert Report.from_dict(data).layers[0].calibration_groups is None

    def test_the_fewest_groups_are_told(self):
        report = holding(layer(calibration_groups=40), layer(calibration_groups=9), layer(calibration_groups=None))
        for shown in (str(report), report.to_markdown()):
            assert "at least 9 independent groups" in shown

    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize(("reason", "code"), [("as configured", "as_configured"), ("it is slow", "text")])
    def test_older_schemas_are_read(self, version, reason, code):
        data = holding(layer()).to_dict() | {"schema_version": version, "call": "cb.compress()"}
        del data["layers"][0]["notes"]
        data["layers"][0] |= {"reason": reason, "backend": "torch", "compared": [], "resident_bytes": 9}
        data["layers"][0]["compute_modes"] = [{"mode": "resident", "chosen": True, "resident_bytes": 9}]
        if version == 1:  # which had no metric, config and call
            data = {name: value for name, value in data.items() if name not in ("call", "config", "metric_before")}
        assert Report.from_dict(data) == holding(
            layer(notes=(Note(code, reason),), compute_modes=(ComputeMode(mode="resident", chosen=True),))
        )

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_it_is_strict(self, value):
        broken = layer(weight_error=value, latency_after_quartiles_ms=(value, 1.0))

        def refuse(name):
            raise AssertionError(f"{name} is no JSON")

        (record,) = json.loads(holding(broken).to_json(), parse_constant=refuse)["layers"]
        assert record["weight_error"] is None
        assert record["latency_after_quartiles_ms"] == [None, 1.0]

    def test_the_dict_is_plain(self, report):
        plain = report.to_dict()
        assert json.loads(json.dumps(plain)) == plain

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (lambda data: data.update(schema_version=4), "should be an int from 1 to 3. Found 4"),
            (lambda data: data.pop("schema_version"), "Found None"),
            (lambda data: data.pop("layers"), "layers: is required"),
            (lambda data: data["layers"][0].pop("notes"), "layers[0].notes: is required"),
            (lambda data: data["layers"][0].update(byte_after=3), "layers[0].byte_after: unknown. Did you mean bytes_"),
            (lambda data: data.update(layers=[3]), "layers[0]: Input should be an object. Found 3"),
            (lambda data: data.update(layers=None), "layers: Input should be a valid array. Found None"),
            (
                lambda data: data["layers"][0].update(bytes_after="few"),
                "layers[0].bytes_after: Input should be a valid",
            ),
            (lambda data: data["layers"][0].update(bytes_after=True), "a valid integer. Found True"),
            (lambda data: data["layers"][0].update(bytes_after=2.5), "a valid integer. Found 2.5"),
            (lambda data: data["layers"][0].update(speedup=-1), "speedup: Input should be greater than or equal to 0"),
            (lambda data: data["layers"][0].update(weight_error=math.nan), "a finite number. Found nan"),
            (lambda data: data["layers"][0].update(decision="left"), "'replaced' or 'kept'. Found 'left'"),
            (lambda data: data["layers"][0].update(shape=[1, 2]), "layers[0].shape[2]: is required"),
            (lambda data: data["layers"][0].update(rank=[1, 2.5, 3]), "layers[0].rank[1]: Input should be a valid int"),
            (
                lambda data: data["layers"][0].update(aliases=[3]),
                "layers[0].aliases[0]: Input should be a valid string",
            ),
            (lambda data: front(data).update(bytes=None), "layers[0].front[0].bytes: Input should be a valid integer"),
            (lambda data: front(data).update(output_error=math.inf), "front[0].output_error: Input should be a finite"),
            (lambda data: front(data).update(chosen=1), "front[0].chosen: Input should be a valid boolean. Found 1"),
            (lambda data: data.update(metric_after="good"), "metric_after: Input should be a valid number"),
            (lambda data: data.update(metric_before=True), "metric_before: Input should be a valid number. Found True"),
            (
                lambda data: data.update(model_bytes_after=-1),
                "model_bytes_after: Input should be greater than or equal",
            ),
            (lambda data: data.update(environment=3), "environment: Input should be an object. Found 3"),
            (lambda data: data["environment"].update({"a b": [2]}), 'environment."a b": Input should be a valid'),
        ],
    )
    def test_another_shape_is_an_error(self, report, change, problem):
        data = report.to_dict()
        change(data)
        with pytest.raises(cb.CompressionError, match=re.escape(problem)):
            Report.from_json(json.dumps(data))

    @pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"report"'])
    def test_other_text_is_an_error(self, text):
        with pytest.raises(cb.CompressionError):
            Report.from_json(text)


class TestMarkdown:
    def test_the_table_is_well_formed(self, report):
        table = report.to_markdown().split("\n\n")[0].split("\n")
        assert len(table) == 2 + len(report.layers)
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in table} == {9}
        assert all(row.startswith("| ") and row.endswith(" |") for row in table)
        assert re.fullmatch(r"\| (---:? \| )+", table[1] + " ")

    def test_names_are_shown_and_escaped(self, report):
        text = report.to_markdown()
        for name in (r"up\_a", "b, again", r"c\|d"):
            assert name in text

    def test_notes_are_a_list(self, report):
        notes = report.to_markdown().split("\n\n")[1].strip().split("\n")
        assert all(note.startswith("- ") for note in notes)
        assert any("kept: it is not smaller" in note for note in notes)

    @pytest.mark.parametrize("name", ["a\nb", "*", "_x_", "|"])
    def test_no_name_breaks_the_table(self, name):
        table = (
            holding(layer(name=name, notes=(Note("text", "line\nbreak | bar"),)))
            .to_markdown()
            .split("\n\n")[0]
            .split("\n")
        )
        assert len(table) == 3
        assert len(re.findall(r"(?<!\\)\|", table[2])) == 9


class TestTerminal:
    def test_names_methods_and_decisions_are_shown(self, report):
        text = str(report)
        for what in ("up_a", "b, again", "c|d", "cp 2 int8", "tucker 1,2,2", "kept (tucker)", "7x9x8"):
            assert what in text

    def test_slower_is_said(self, report):
        text = str(report)
        assert "0.50x (slower)" in text
        assert "2.00x (slower)" not in text
        assert "slower here than nn.Bilinear: 0.50x its speed" in text

    def test_the_whole_model_the_timing_and_the_place_are_said(self, report):
        text = str(report)
        assert f"Whole model: {size_change(report.model_bytes_before, report.model_bytes_after)}" in text
        assert "medians of calls of 20 rows" in text
        assert "device cpu" in text

    def test_it_has_no_colour_and_no_trailing_blanks(self, report):
        text = str(report)
        assert "\x1b" not in text
        assert all(line == line.rstrip() for line in text.split("\n"))

    def test_brackets_in_names_are_no_markup(self):
        assert "[bold]x" in str(holding(layer(name="[bold]x", notes=(Note("text", "[red]why"),))))
        assert "[red]why" in str(holding(layer(name="[bold]x", notes=(Note("text", "[red]why"),))))

    def test_unknown_figures_are_dashes(self):
        (row,) = (line for line in str(holding(layer())).split("\n") if "rel" in line)
        assert row.count("–") == 5


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (error(None), "–"),
        (error(0.0), "exact"),
        (error(0.12345), "0.1235"),
        (error(1.5e-7), "1.5e-07"),
        (size(0), "0 B"),
        (size(999), "999 B"),
        (size(1000), "1 kB"),
        (size(999_600), "1 MB"),
        (size(12_345_678), "12.3 MB"),
        (size(4 * 10**13), "40 TB"),
        (size_change(4000, 1000), "4 kB → 1 kB (4x)"),
        (size_change(4000, 0), "4 kB → 0 B"),
        (speedup(None), "–"),
        (speedup(2), "2.00x"),
        (speedup(1), "1.00x"),
        (speedup(0.996), "1.00x"),
        (speedup(0.9), "0.90x (slower)"),
    ],
)
def test_figures_are_readable(shown, text):
    assert shown == text


class TestNotes:
    def test_a_choice_is_shown_with_its_runners_up(self):
        points = (
            FrontPoint(method="tucker", rank=(1, 2, 3), quantize="nf4", bytes=80, flops=1, output_error=0.25),
            FrontPoint(method="cp", rank=4, quantize="int8", bytes=90, flops=1, output_error=0.125, chosen=True),
            FrontPoint(method="cp", rank=3, quantize="int8", bytes=70, flops=1, output_error=0.5),
            FrontPoint(method="dense", quantize="int8", bytes=300, flops=1, output_error=0.001),
        )
        text = str(holding(layer(front=points)))
        assert "chosen of 4: cp 4 int8; runners-up: tucker 1,2,3 nf4 (0.2500 in 80 B)" in text

    def test_storage_and_its_share_of_the_error_are_told(self):
        stored = layer(compute="on_the_fly", truncation_error=0.5, quantization_error=0.25, quantize="int8")
        text = str(holding(stored))
        assert "computes on the fly; weight error 0.5000 by truncation and 0.2500" in text

    def test_a_metric_is_told(self):
        report = dataclasses.replace(holding(layer()), metric_before=0.75, metric_after=0.5)
        assert "Your metric: 0.7500 before, 0.5000 after" in str(report)
