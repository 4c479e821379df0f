"""What the commands have in common, and `compare`: formats, quiet, dry runs, configuration files, limits."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import click
import pytest
import torch
from click.shell_completion import BashComplete
from records import kept, replaced, report
from support import assert_refused, bilinear, low_rank, timed_at_once
from torch import nn

import compress_bilinear as cb
from compress_bilinear.cli._main import app
from compress_bilinear.planning import _offline as state_dicts
from compress_bilinear.planning import _verdict as selection

IN1, IN2, OUT = 18, 17, 7
BATCH = torch.randn(5, IN1), torch.randn(5, IN2)


def net(dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    model = nn.ModuleDict({name: bilinear(IN1, IN2, OUT, dtype=dtype) for name in ("rel", "head")})
    with torch.no_grad():
        for seed, layer in enumerate(model.values()):
            layer.weight.copy_(low_rank((OUT, IN1, IN2), 2, noise=0.1, seed=seed))
    return model


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.save(net().state_dict(), "net.pt")
    Path("layers.toml").write_text(
        'max_seconds = 50\n[layers.rel]\nmethod = "cp"\nrank = 3\n[layers."*"]\nmethod = "tucker"\nrank = [2, 3, 3]\n'
    )
    one, two = (
        report(replaced("a"), replaced("b", output_error=0.3)),
        report(replaced("a", bytes_after=7000), kept("b")),
    )
    Path("one.json").write_text(one.to_json())
    Path("two.json").write_text(two.to_json())
    timed_at_once(monkeypatch)
    return tmp_path


TO = ("-o", "small.safetensors", "--no-latency")
REL = ("--layers", "rel", "--rank", "2,3,3")
CONFIG = ("--config", "layers.toml")

MISTAKES = {
    "config and a rank": (
        ("compress", "net.pt", *TO, *CONFIG, "--rank", "3"),
        "say how to compress. Found --rank too",
    ),
    "config and a seed": (("compress", "net.pt", *TO, *CONFIG, "--seed", "0"), "how to compress. Found --seed too"),
    "no config file": (("compress", "net.pt", *TO, "--config", "none.toml"), "No such file"),
    "wrong config": (
        ("compress", "net.pt", *TO, "--config", "wrong.toml"),
        "wrong.toml: layers.rel.rank: Input should",
    ),
    "config with a key mistyped": (
        ("compress", "net.pt", *TO, "--config", "typing.toml"),
        "typing.toml: layers.rel.method: is required. Found only methd, rank",
    ),
    "config and no layer of it": (
        ("compress", "net.pt", *TO, "--config", "rel.toml", "--layers", "head"),
        "--layers should leave a layer that --config is about. Found globs rel",
    ),
    "no such device": (("compress", "net.pt", *TO, *REL, "--device", "abacus"), "--device should be a device of this"),
    "a device without values": (("compress", "net.pt", *TO, *REL, "--device", "meta"), "Found 'meta'"),
    "no such dtype": (("compress", "net.pt", *TO, *REL, "--dtype", "int8"), "'int8' is not one of 'float16'"),
    "no output": (("compress", "net.pt", *REL), "Missing option '-o' / '--output'; only --dry-run goes without"),
    "report over the checkpoint": (("compress", "net.pt", *TO, *REL, "--report", "net.pt"), "should end in .json"),
    "report's output": (("report", "net.pt", "net.pt", "-o", "a.txt"), "--output should end in .json, .md or .html"),
    "compare nothing": (("compare",), "Missing argument 'REPORT.json...'"),
    "compare a checkpoint": (
        ("compare", "net.pt"),
        "'net.pt' should be a report that --report wrote as .json. Found: 'utf-8' codec",
    ),
    "compare what is not there": (
        ("compare", "none.json"),
        "wrote as .json. Found: [Errno 2] No such file",
    ),
    "compare a folder": (("compare", "folder.json"), "wrote as .json. Found: [Errno 21]"),
    "compare what may not be read": (("compare", "secret.json"), "Found: [Errno 13] Permission denied"),
    "compare a list": (
        ("compare", "list.json"),
        "'list.json' should be a report that --report wrote as .json. `schema_version` of",
    ),
    "compare what is nested for ever": (("compare", "deep.json"), "A report in JSON is required"),
    "compare twice the same": (("compare", "one.json", "one.json"), "Each report should be given once"),
    "compare into a report": (("compare", "one.json", "-o", "one.json"), "another file than those that are read"),
    "compare into a picture": (("compare", "one.json", "-o", "a.png"), "--output should end in .json"),
    "compare as a page": (("compare", "one.json", "--format", "html"), "'html' is not one of 'table', 'json'"),
    "compare no figure": (("compare", "one.json", "--figure", "rank"), "A figure to compare should name one of"),
    "limit without a field": (("compare", "one.json", "--fail-above", "0.05"), "should be FIELD=NUMBER"),
    "limit on an unknown field": (("compare", "one.json", "--fail-below", "sped=1"), "Did you mean speedup?"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_users_mistake_is_one_line_and_status_2(run, folder, case, monkeypatch):
    (folder / "wrong.toml").write_text('[layers.rel]\nmethod = "cp"\nrank = "many"\n')
    (folder / "rel.toml").write_text('[layers.rel]\nmethod = "cp"\nrank = 3\n')
    (folder / "folder.json").mkdir()
    (folder / "list.json").write_text("[]")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "typing.toml").write_text('[layers.rel]\nmethd = "cp"\nrank = 3\n')
    args, problem = MISTAKES[case]
    if "secret.json" in args:  # nobody forbids root to read
        denied = PermissionError(13, "Permission denied")
        monkeypatch.setattr(Path, "exists", lambda path: True)
        monkeypatch.setattr(Path, "read_text", mock.Mock(side_effect=denied))
    assert_refused(run, folder, args, problem)


class TestCompress:
    def test_json_is_all_of_stdout(self, run):
        status, out, err = run("compress", "net.pt", *TO, *REL, "--json")
        assert (status, err) == (0, "")
        assert cb.Report.from_json(out).layers[0].name == "rel"

    def test_quiet_prints_nothing_and_shows_no_bar(self, run, monkeypatch):
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        assert run("compress", "net.pt", *TO, *REL, "--quiet") == (0, "", "")
        assert Path("small.safetensors").exists()

    def test_a_dry_run_writes_no_checkpoint(self, run, folder):
        before = sorted(folder.rglob("*"))
        status, out, _ = run("compress", "net.pt", *REL, "--dry-run")
        assert status == 0
        assert out.startswith("Plan (the model is untouched)")
        assert sorted(folder.rglob("*")) == before
        run("compress", "net.pt", *TO, *REL, "--dry-run", "--report", "plan.html")
        assert sorted(set(folder.rglob("*")) - set(before)) == [folder / "plan.html"]

    def test_a_dry_run_that_would_replace_nothing_is_status_1(self, run):
        status, _, err = run("compress", "net.pt", "--layers", "rel", "--max-error", "0.0001", "--dry-run")
        assert (status, err) == (1, "compress-bilinear: nothing would be replaced\n")

    def test_a_configuration_file_says_what_becomes_of_each_layer(self, run):
        status, out, err = run("compress", "net.pt", *TO, *CONFIG, "--json")
        assert (status, err) == (0, "")
        found = cb.Report.from_json(out)
        assert [(layer.name, layer.method, layer.rank) for layer in found.layers] == [
            ("rel", "cp", 3),
            ("head", "tucker", (2, 3, 3)),
        ]
        assert found.config["max_seconds"] == 50

    def test_layers_narrow_a_configuration_file(self, run):
        _, out, _ = run("compress", "net.pt", *TO, *CONFIG, "--layers", "head", "--json")
        found = cb.Report.from_json(out)
        assert [(layer.name, layer.method) for layer in found.layers] == [("head", "tucker")]
        assert found.config["layers"] == {"head": {"method": "tucker", "rank": [2, 3, 3]}}

    def test_a_layer_that_is_to_be_kept_is_left_alone(self, run):
        Path("keep.json").write_text('{"layers": {"head": {"method": "keep"}, "*": {"method": "cp", "rank": 2}}}')
        _, out, _ = run("compress", "net.pt", *TO, "--config", "keep.json", "--json")
        assert [layer.name for layer in cb.Report.from_json(out).layers] == ["rel"]

    def test_the_reports_config_does_the_same_again(self, run):
        _, first, _ = run("compress", "net.pt", *TO, "--layers", "rel", "--method", "cp", "--rank", "3", "--json")
        made = json.loads(first)
        Path("again.json").write_text(json.dumps(made["config"]))
        _, second, _ = run("compress", "net.pt", *TO, "--config", "again.json", "--json")
        assert json.loads(second)["layers"] == made["layers"]
        assert list(made["config"]["layers"]) == ["rel"]

    def test_an_html_report_is_written_with_the_checkpoint(self, run):
        assert run("compress", "net.pt", *TO, *REL, "--report", "report.html")[0] == 0
        assert Path("report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

    def test_where_the_report_cannot_be_drawn_no_file_is_written(self, run, folder, monkeypatch):
        def interrupted(self, path=None):
            raise KeyboardInterrupt

        before = sorted(folder.rglob("*"))
        monkeypatch.setattr(cb.Report, "to_html", interrupted)
        status, _, err = run("compress", "net.pt", *TO, *REL, "--report", "report.html")
        assert (status, err.strip()) == (130, "compress-bilinear: interrupted")
        assert sorted(folder.rglob("*")) == before

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_another_dtype_is_that_of_the_whole_checkpoint(self, run, dtype):
        name = str(dtype).removeprefix("torch.")
        _, out, _ = run("compress", "net.pt", *TO, *REL, "--dtype", name, "--json")
        found = cb.Report.from_json(out)
        assert found.environment["dtype"] == name
        assert found.environment["converted"] == "from float32 before anything was measured"
        assert found.layers[0].bytes_before == selection.stored_bytes(net(dtype)["rel"])
        assert found.model_bytes_before == selection.stored_bytes(net(dtype))
        loaded = cb.load("small.safetensors", net(dtype))
        assert {value.dtype for value in loaded.state_dict().values()} == {dtype}
        expected, _ = cb.compress(net().to(dtype), {"rel": cb.TuckerConfig(rank=(2, 3, 3))}, measure_latency=False)
        assert torch.equal(loaded["rel"].to_dense(), expected["rel"].to_dense())

    def test_tied_weights_stay_tied_in_another_dtype(self):
        weight = torch.randn(OUT, IN1, IN2)
        state = {"a.weight": weight, "b.weight": weight, "steps": torch.ones((), dtype=torch.int64)}
        cast = state_dicts._cast(state, torch.float64)
        assert cast["a.weight"] is cast["b.weight"]
        assert (cast["a.weight"].dtype, cast["steps"].dtype) == (torch.float64, torch.int64)

    def test_a_device_is_where_the_layers_go(self, run, monkeypatch):
        seen, plan = [], state_dicts.plan
        monkeypatch.setattr(
            state_dicts, "plan", lambda m, *a, **k: seen.append(next(m.parameters()).device) or plan(m, *a, **k)
        )
        assert run("compress", "net.pt", *TO, *REL, "--device", "cpu:0")[0] == 0
        assert seen == [torch.device("cpu")]  # index 0 is what "cpu" is


class TestReport:
    @pytest.fixture
    def small(self, run) -> str:
        run("compress", "net.pt", *TO, *REL)
        return "small.safetensors"

    @pytest.mark.parametrize("suffix", ["html", "md", "json"])
    def test_it_writes_a_file(self, run, small, suffix):
        status, out, _ = run("report", "net.pt", small, "-o", f"report.{suffix}")
        assert (status, out) == (0, f"Wrote report.{suffix}\n")
        text = Path(f"report.{suffix}").read_text(encoding="utf-8")
        assert text.startswith({"html": "<!DOCTYPE", "md": "| Layer", "json": "{"}[suffix])

    def test_json_is_short_for_the_format(self, run, small):
        assert run("report", "net.pt", small, "--json")[1] == run("report", "net.pt", small, "--format", "json")[1]

    def test_another_dtype_than_the_originals_is_named(self, run):
        run("compress", "net.pt", *TO, *REL, "--dtype", "float64")
        status, _, err = run("report", "net.pt", "small.safetensors")
        assert status == 2
        assert "in torch.float64, as 'small.safetensors' does. Found torch.float32: --dtype converts it" in err
        assert run("report", "net.pt", "small.safetensors", "--dtype", "float64")[0] == 0


class TestCompare:
    def test_runs_are_columns_by_their_files_names(self, run):
        status, out, err = run("compare", "one.json", "two.json")
        assert (status, err) == (0, "")
        assert "one" in out.splitlines()[2]
        assert "7 kB*" in out

    def test_files_of_one_name_are_told_apart(self, run, folder):
        (folder / "new").mkdir()
        (folder / "new" / "one.json").write_text(Path("one.json").read_text())
        _, out, _ = run("compare", "one.json", "new/one.json", "--json")
        assert json.loads(out)["runs"] == ["one.json", "new/one.json"]

    def test_a_file_has_what_is_printed(self, run):
        _, printed, _ = run("compare", "one.json", "two.json", "--format", "json")
        assert run("compare", "one.json", "two.json", "-o", "all.json") == (0, "Wrote all.json\n", "")
        assert Path("all.json").read_text(encoding="utf-8").strip() == printed.strip()

    def test_figures_are_chosen(self, run):
        _, out, _ = run("compare", "one.json", "--figure", "params_after", "--json")
        assert [figure["figure"] for figure in json.loads(out)["figures"]] == ["params_after"]

    def test_limits_that_hold_are_status_0(self, run):
        assert run("compare", "one.json", "-q", "--fail-above", "output_error=0.4", "--fail-below", "speedup=2") == (
            0,
            "",
            "",
        )

    def test_a_broken_limit_is_status_1_and_a_line_for_each_layer(self, run):
        limits = ("--fail-above", "output_error=0.25", "--fail-below", "speedup=2")
        status, out, err = run("compare", "one.json", "two.json", "--quiet", *limits)
        assert (status, out) == (1, "")
        assert err.splitlines() == [
            "one: b: output_error 0.3 is above 0.25",
            "two: b: speedup 1 is below 2",
            "compress-bilinear: 2 failed",
        ]

    def test_what_is_not_known_fails(self, run):
        Path("bare.json").write_text(report(replaced(output_error=None)).to_json())
        status, _, err = run("compare", "bare.json", "-q", "--fail-above", "output_error=0.25")
        assert status == 1
        assert "bare: rel: output_error is not known, which counts as above 0.25" in err

    def test_numbers_that_are_none_are_refused(self, run):
        data = json.loads(Path("one.json").read_text())
        data["layers"][0]["bytes_after"] = "few"
        Path("odd.json").write_text(json.dumps(data))
        status, _, err = run("compare", "odd.json")
        assert status == 2
        assert "layers[0].bytes_after: Input should be a valid integer. Found 'few'" in err


class TestInspect:
    def test_json_has_both_kinds_of_layers(self, run):
        run("compress", "net.pt", *TO, *REL)
        _, out, _ = run("inspect", "small.safetensors", "--json")
        found = json.loads(out)
        assert [layer["names"] for layer in found["compressed"]] == [["rel"]]
        assert [(layer["name"], layer["shape"], layer["bytes"]) for layer in found["layers"]] == [
            ("head", [OUT, IN1, IN2], 4 * OUT * IN1 * IN2)
        ]


@pytest.mark.parametrize("name", ["", *app.commands])
def test_help_has_examples_that_name_real_options(run, name):
    status, out, err = run(*filter(None, [name]), "--help")
    assert (status, err) == (0, "")
    shown = out.split("Examples:")[1].replace("\\\n", " ").splitlines()
    examples = [line.split() for line in shown if "compress-bilinear " in line]
    assert examples
    assert max(map(len, out.splitlines())) <= 100
    for _, *words in (line for line in examples if line[0] == "compress-bilinear"):
        command = app.commands[words[0]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known


def test_every_command_that_solves_or_measures_takes_the_common_options():
    for name, options in {
        "compress": {"--json", "--quiet", "--device", "--dtype", "--seed", "--dry-run", "--config", "--report"},
        "report": {"--json", "--quiet", "--device", "--dtype"},
        "compare": {"--json", "--quiet", "--fail-above", "--fail-below"},
        "demo": {"--json", "--quiet", "--seed"},
        "inspect": {"--json"},
    }.items():
        known = {option for parameter in app.commands[name].params for option in parameter.opts}
        assert options <= known
        for parameter in app.commands[name].params:
            assert not isinstance(parameter, click.Option) or parameter.help or parameter.name in ("method", "style")


def in_a_process(*command: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], **pipes, **options)


def test_the_shell_completes_commands():
    found = BashComplete(app, {}, "compress-bilinear", "_COMPRESS_BILINEAR_COMPLETE").get_completions([], "com")
    assert {one.value for one in found} == {"compress", "compare"}


SOLVING = """
import signal, sys
from compress_bilinear import cli
from compress_bilinear.planning import _offline

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
plan = _offline.plan
_offline.plan = lambda *args, **options: print("solving", flush=True) or plan(*args, **options)
sys.argv = ["compress-bilinear", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written(folder):
    torch.save({"rel.weight": torch.randn(60, 150, 150)}, "large.pt")
    (folder / "small.safetensors").write_text("old")
    before = sorted(folder.rglob("*"))
    asked = ("--method", "cp", "--max-error", "0.2", "--report", "report.html")
    with in_a_process("-c", SOLVING, "compress", "large.pt", *TO, *asked) as process:
        assert process.stdout.readline() == "solving\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err.strip()) == (130, "", "compress-bilinear: interrupted")
    assert sorted(folder.rglob("*")) == before
    assert (folder / "small.safetensors").read_text() == "old"


LOADING = """
import runpy, sys

class Interrupted:
    def find_spec(self, name, *args):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
sys.argv = ["compress-bilinear", "inspect", "net.pt"]
"""


@pytest.mark.parametrize(
    "start",
    ["runpy.run_module('compress_bilinear', run_name='__main__')", "from compress_bilinear.cli import main; main()"],
    ids=["module", "script"],
)
def test_ctrl_c_while_pytorch_is_loaded_is_no_traceback(start):
    with in_a_process("-c", LOADING + start) as process:
        out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "compress-bilinear: interrupted\n")


@pytest.mark.slow
def test_files_are_written_although_nobody_reads_what_is_printed(folder):
    with in_a_process("-m", "compress_bilinear", "compress", "net.pt", *TO, *REL, "--report", "a.json") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert cb.Report.from_json((folder / "a.json").read_text()).layers[0].decision == "replaced"
    assert isinstance(cb.load("small.safetensors", net())["rel"], cb.TuckerBilinear)


@pytest.mark.slow
def test_a_reader_that_stops_causes_no_error():
    with in_a_process("-m", "compress_bilinear", "compare", "one.json", "two.json") as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
