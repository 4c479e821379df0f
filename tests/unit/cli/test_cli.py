import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import assert_refused, bilinear, low_rank, timed_at_once
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.planning import _offline as offline

IN1, IN2, OUT = 18, 17, 7


class Net(nn.Module):
    """Two bilinear layers and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.rel = bilinear(IN1, IN2, OUT)
        self.blocks = nn.ModuleList([bilinear(IN1, IN2, OUT, seed=1)])
        self.conv = nn.Conv1d(OUT, 8, 3)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.rel(x1, x2) + self.blocks[0](x1, x2)


def trained() -> Net:
    model = Net()
    with torch.no_grad():
        for seed, layer in enumerate((model.rel, model.blocks[0])):
            layer.weight.copy_(low_rank((OUT, IN1, IN2), 2, noise=0.1, seed=seed))
        for parameter in model.conv.parameters():
            parameter.fill_(0.5)
    return model.eval()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The folder that the command runs in, with the checkpoints that it may be given; timing takes no time."""
    monkeypatch.chdir(tmp_path)
    state = trained().state_dict()
    save_file(state, "net.safetensors")
    torch.save(state, "net.pt")
    torch.save({"model": state, "epoch": 3}, "wrapped.pt")
    torch.save(bilinear(IN1, IN2, OUT).state_dict(), "layer.pt")
    torch.save({"conv.weight": torch.ones(8, 7, 3)}, "conv.pt")
    torch.save(nn.Linear(2, 2), "module.pt")
    Path("folder").mkdir()
    timed_at_once(monkeypatch)
    return tmp_path


TO = ("-o", "small.safetensors", "--no-latency")
TUCKER = ("--rank", "2,3,3")
BOTH = ("--layers", "rel", "--layers", "blocks.*")

MISTAKES = {
    "missing file": (("compress", "none.pt", *TO, *TUCKER), "'none.pt' should be a file. Found none"),
    "folder": (("compress", "folder", *TO, *TUCKER), "should be a file. Found a folder"),
    "not a checkpoint": (("compress", "notes.txt", *TO, *TUCKER), "should be a .safetensors file"),
    "pickled module": (
        ("compress", "module.pt", *TO, *TUCKER),
        "Found a pickled torch.nn.modules.linear.Linear, which is not loaded because that runs code",
    ),
    "no time": (
        ("compress", "layer.pt", *TO, *TUCKER, "--max-seconds", "0"),
        "`max_seconds` should be a positive number or None. Found 0.0",
    ),
    "no rank": (("compress", "layer.pt", *TO), "tucker takes one of rank, max_error, max_size. Found none"),
    "two targets": (
        ("compress", "layer.pt", *TO, *TUCKER, "--max-size", "0.1"),
        "tucker takes one of rank, max_error, max_size. Found rank, max_size",
    ),
    "rank is no number": (("compress", "layer.pt", *TO, "--rank", "a,b,c"), "or three for Tucker: 16,32,32. Found"),
    "rank is a single": (("compress", "layer.pt", *TO, "--rank", "4"), "tucker: rank: Input should be a valid array"),
    "rank is empty": (("compress", "layer.pt", *TO, "--rank", ""), "three for Tucker"),
    "rank is negative": (("compress", "layer.pt", *TO, "--rank", "2,-3,3"), "three for Tucker"),
    "rank is zero": (("compress", "layer.pt", *TO, "--rank", "0,3,3"), "`rank[0]` of a TuckerConfig should be"),
    "rank is too large": (
        ("compress", "layer.pt", *TO, "--rank", "2,3,18"),
        "`rank[2]` should be at most 17, in2_features of layer '(root)'. Found 18",
    ),
    "rank of CP": (
        ("compress", "layer.pt", *TO, "--method", "cp", *TUCKER),
        "cp: rank: Input should be a valid int",
    ),
    "error too large": (("compress", "layer.pt", *TO, "--max-error", "2"), "above 0 and below 1. Found 2.0"),
    "size is nan": (
        ("compress", "layer.pt", *TO, "--max-size", "nan"),
        "max_size: Input should be a finite number. Found nan",
    ),
    "dense with a rank": (
        ("compress", "layer.pt", *TO, "--method", "dense", "--quantize", "int8", *TUCKER),
        "--method dense: rank: unknown here",
    ),
    "unknown pattern": (
        ("compress", "net.pt", *TO, *TUCKER, "--layers", "decoder.*"),
        "'decoder.*' should match a three-dimensional weight. Found: rel (7x18x17), blocks.0 (7x18x17), conv (8x7x3",
    ),
    "several layers": (("compress", "net.pt", *TO, *TUCKER), "--layers PATTERN is needed"),
    "a convolution": (("compress", "conv.pt", *TO, *TUCKER), "conv (8x7x3, conv1d?)"),
    "same file": (
        ("compress", "layer.pt", "-o", "layer.pt", *TUCKER),
        "should be another file than those that are read",
    ),
    "same file, other spelling": (
        ("compress", "layer.pt", "-o", "folder/../layer.pt", *TUCKER),
        "should be another file than those that are read",
    ),
    "no output folder": (
        ("compress", "layer.pt", "-o", "missing/small.safetensors", "--no-latency", *TUCKER),
        "Found no folder 'missing'",
    ),
    "output is a folder": (("compress", "layer.pt", "-o", "folder", "--no-latency", *TUCKER), "Found a folder"),
    "report's suffix": (
        ("compress", "layer.pt", *TO, *TUCKER, "--report", "report.txt"),
        "should end in .json, .md or .html",
    ),
    "no report folder": (("compress", "layer.pt", *TO, *TUCKER, "--report", "missing/a.md"), "Found no folder"),
    "unknown command": (("frobnicate",), "No such command 'frobnicate'"),
    "unknown option": (("inspect", "net.pt", "--fast"), "No such option"),
    "no output": (("compress", "layer.pt", *TUCKER), "Missing option '-o'"),
    "no compressed file": (("report", "net.pt"), "Missing argument 'COMPRESSED'"),
    "error is no number": (("compress", "layer.pt", *TO, "--max-error", "small"), "'small' is not a valid float"),
    "unknown method": (("compress", "layer.pt", *TO, "--method", "svd"), "'svd' is not one of 'cp', 'tucker', 'dense'"),
    "unknown quantize": (("compress", "layer.pt", *TO, *TUCKER, "--quantize", "int4"), "'int4' is not"),
    "no rows": (("compress", "layer.pt", *TO, *TUCKER, "--batch-size", "0"), "0 is not in the range x>=1"),
    "unknown style": (("report", "net.pt", "net.pt", "--format", "svg"), "'svg' is not one of"),
    "inspect nothing": (("inspect", "none.pt"), "should be a file"),
    "inspect a module": (("inspect", "module.pt"), "Found a pickled torch.nn.modules.linear.Linear"),
    "report on an original": (("report", "net.pt", "net.safetensors"), "should hold replaced layers"),
    "report without files": (("report", "none.pt", "net.safetensors"), "should be a file"),
}


class TestMistakes:
    @pytest.mark.parametrize("case", MISTAKES)
    def test_a_users_mistake_is_one_line_and_status_2(self, run, folder, case):
        (folder / "notes.txt").write_text("nothing here")
        assert_refused(run, folder, *MISTAKES[case])

    def test_ctrl_c_is_status_130(self, run, monkeypatch):
        def interrupted(path, key, verify):
            raise KeyboardInterrupt

        monkeypatch.setattr("compress_bilinear.cli._look.read_state", interrupted)
        status, _, err = run("inspect", "net.pt")
        assert status == 130
        assert "Traceback" not in err


class TestCompress:
    @pytest.mark.parametrize("source", ["net.safetensors", "net.pt", "wrapped.pt"])
    def test_the_file_loads_into_the_original_network(self, run, source):
        status, out, err = run("compress", source, *TO, *TUCKER, *BOTH)
        assert (status, err) == (0, "")
        assert "Wrote small.safetensors" in out
        batch = torch.randn(5, IN1), torch.randn(5, IN2)
        expected, _ = cb.compress(trained(), cb.TuckerConfig(rank=(2, 3, 3)), measure_latency=False)
        loaded = cb.load("small.safetensors", Net().eval())
        assert isinstance(loaded.rel, cb.TuckerBilinear)
        assert torch.equal(loaded(*batch), expected(*batch))
        assert torch.equal(loaded.conv.weight, expected.conv.weight)

    @pytest.mark.parametrize(
        ("args", "config"),
        [
            (("--rank", " 2, 3,3"), cb.TuckerConfig(rank=(2, 3, 3))),
            (("--max-error", "0.2"), cb.TuckerConfig(rank=cb.MaxError(0.2))),
            (("--max-size", "0.2", "--quantize", "int8"), cb.TuckerConfig(rank=cb.MaxSize(0.2), quantize="int8")),
            (("--method", "cp", "--rank", "2", "--seed", "3"), cb.CPConfig(rank=2, seed=3)),
            (("--method", "dense", "--quantize", "int8"), cb.DenseConfig(quantize="int8")),
        ],
        ids=str,
    )
    def test_options_are_the_configs(self, run, args, config):
        assert run("compress", "net.pt", *TO, *args, "--layers", "rel")[0] == 0
        loaded = cb.load("small.safetensors", Net())
        expected, _ = cb.compress(trained(), {"rel": config}, measure_latency=False)
        assert loaded.rel.rank == expected.rel.rank
        assert torch.equal(loaded.rel.to_dense(), expected.rel.to_dense())
        assert isinstance(loaded.blocks[0], nn.Bilinear)

    @pytest.mark.parametrize("method", [("--method", "cp", "--rank", "4"), TUCKER], ids=["cp", "tucker"])
    def test_a_time_limit_reaches_the_solver(self, run, monkeypatch, method):
        limits, plan = [], offline.plan
        monkeypatch.setattr(offline, "plan", lambda *a, **k: limits.append(k["max_seconds"]) or plan(*a, **k))
        assert run("compress", "net.pt", *TO, *method, "--layers", "rel", "--max-seconds", "5")[0] == 0
        assert limits == [5]

    def test_ctrl_c_in_a_solve_writes_nothing_and_keeps_an_old_output(self, run, folder, monkeypatch):
        def interrupted(*args, **options):
            raise KeyboardInterrupt

        (folder / "small.safetensors").write_text("old")
        before = sorted(folder.rglob("*"))
        monkeypatch.setattr(offline, "plan", interrupted)
        status, _, err = run("compress", "net.pt", *TO, *TUCKER, "--layers", "rel", "--report", "report.json")
        assert (status, err.strip()) == (130, "compress-bilinear: interrupted")
        assert sorted(folder.rglob("*")) == before
        assert (folder / "small.safetensors").read_text() == "old"

    def test_a_layer_that_is_the_whole_file_needs_no_pattern(self, run):
        assert run("compress", "layer.pt", *TO, *TUCKER)[0] == 0
        assert isinstance(cb.load("small.safetensors", bilinear(IN1, IN2, OUT)), cb.TuckerBilinear)

    def test_the_report_is_printed_and_written(self, run, folder):
        args = ("compress", "net.pt", "-o", "small.safetensors", *TUCKER, "--layers", "rel", "--batch-size", "33")
        for name in ("report.json", "report.md"):
            status, out, _ = run(*args, "--report", name)
            assert status == 0
            assert "2.00x" not in out
            assert "0.50x" in out
        report = cb.Report.from_json((folder / "report.json").read_text())
        assert (report.layers[0].name, report.layers[0].speedup, report.layers[0].batch_size) == ("rel", 0.5, 33)
        assert (folder / "report.md").read_text().startswith("| Layer |")

    def test_no_latency_measures_none(self, run, folder):
        run("compress", "net.pt", *TO, *TUCKER, "--layers", "rel", "--report", "report.json")
        assert json.loads((folder / "report.json").read_text())["layers"][0]["speedup"] is None

    def test_where_nothing_is_replaced_nothing_is_written(self, run, folder):
        status, out, err = run("compress", "layer.pt", *TO, "--max-error", "0.0001")
        assert status == 1
        assert err == "compress-bilinear: nothing was replaced, so 'small.safetensors' was not written\n"
        assert "not smaller" in out
        assert not (folder / "small.safetensors").exists()

    def test_force_replaces_what_is_not_smaller(self, run):
        assert run("compress", "layer.pt", *TO, "--max-error", "0.0001", "--force")[0] == 0
        assert cb.load("small.safetensors", bilinear(IN1, IN2, OUT)).rank == (7, 18, 17)

    def test_an_old_output_survives_a_failure(self, run, folder):
        (folder / "small.safetensors").write_text("old")
        run("compress", "layer.pt", *TO, "--rank", "2,3,99")
        assert (folder / "small.safetensors").read_text() == "old"


def test_an_already_compressed_file_is_refused(run, tmp_path):
    model = cb.compress(Net(), cb.DenseConfig(quantize="int8"), measure_latency=False)[0]
    cb.save(model, tmp_path / "small.safetensors")
    args = ("compress", str(tmp_path / "small.safetensors"), "-o", str(tmp_path / "out"), "--max-size", "0.5")
    assert_refused(run, tmp_path, args, "compressed already")


class TestInspect:
    @pytest.mark.parametrize("source", ["net.safetensors", "net.pt", "wrapped.pt"])
    def test_it_lists_what_may_be_bilinear(self, run, source):
        status, out, err = run("inspect", source)
        assert (status, err) == (0, "")
        (rel,) = (line for line in out.split("\n") if " rel " in line)
        assert all(what in rel for what in ("7x18x17", "float32", "8.57 kB", "yes"))
        (conv,) = (line for line in out.split("\n") if " conv " in line)
        assert "may be a Conv1d's" in conv

    def test_it_lists_what_was_compressed(self, run):
        run("compress", "net.pt", *TO, *TUCKER, "--layers", "rel", "--quantize", "int8")
        status, out, _ = run("inspect", "small.safetensors")
        assert status == 0
        (rel,) = (line for line in out.split("\n") if " rel " in line)
        assert all(what in rel for what in ("7x18x17", "tucker", "2, 3, 3", "int8"))
        assert "blocks.0" in out
        assert "core" not in out

    @pytest.mark.parametrize(("file", "layer"), [("net[v2].pt", "rel"), ("net.pt", "rel[a]"), ("net.pt", "rel[/a]")])
    def test_brackets_in_names_are_no_markup(self, run, file, layer):
        torch.save({f"{layer}.weight": torch.ones(2, 20, 20)}, file)
        status, out, err = run("inspect", file)
        assert (status, err) == (0, "")
        assert file in out
        assert f" {layer} " in out

    def test_a_shared_layer_is_told(self, run, folder):
        weight = torch.ones(7, 18, 17)
        torch.save({"rel.weight": weight, "again.weight": weight}, folder / "shared.pt")
        assert " rel, again " in run("inspect", "shared.pt")[1]
        layers = json.loads(run("inspect", "shared.pt", "--json")[1])["layers"]
        assert [layer["name"] for layer in layers] == ["rel", "again"]
        status, out, _ = run("compress", "shared.pt", *TO, *TUCKER, "--layers", "rel", "--force", "--json")
        assert (status, json.loads(out)["layers"][0]["aliases"]) == (0, ["again"])

    def test_other_forms_are_named_and_sent_to_python(self, run, folder):
        torch.save({"label.U": torch.ones(18, 7, 17)}, folder / "einsum.pt")
        told = "label.U (18x7x17) may be a bilinear weight in another form, which needs the network's code: cb.compress"
        assert told in " ".join(run("inspect", "einsum.pt")[1].split())
        status, _, err = run("compress", "einsum.pt", *TO, *TUCKER)
        assert status == 2
        assert told in err

    def test_it_says_where_there_is_none(self, run, folder):
        torch.save({"a.weight": torch.ones(2, 2)}, folder / "linear.pt")
        status, out, _ = run("inspect", "linear.pt")
        assert status == 0
        assert "No three-dimensional weight" in out


class TestReport:
    @pytest.fixture
    def small(self, run) -> str:
        run("compress", "net.pt", *TO, *TUCKER, *BOTH)
        return "small.safetensors"

    @pytest.mark.parametrize("source", ["net.safetensors", "net.pt", "wrapped.pt"])
    def test_it_compares_two_files(self, run, small, source):
        status, out, err = run("report", source, small, "--format", "json", "--batch-size", "9")
        assert (status, err) == (0, "")
        report = cb.Report.from_json(out)
        expected = cb.plan(trained(), cb.TuckerConfig(rank=(2, 3, 3)), measure_latency=False).report
        assert [layer.name for layer in report.layers] == ["rel", "blocks.0"]
        assert {layer.batch_size for layer in report.layers} == {9}
        assert report.model_bytes_after == expected.model_bytes_after
        for layer, other in zip(report.layers, expected.layers, strict=True):
            assert layer.weight_error == pytest.approx(other.weight_error, rel=1e-9)

    @pytest.mark.parametrize(
        ("args", "start"),
        [
            ((), "Compression report"),
            (("--format", "table"), "Compression report"),
            (("--format", "markdown"), "| Lay"),
        ],
        ids=str,
    )
    def test_it_has_formats_for_people(self, run, small, args, start):
        status, out, _ = run("report", "net.pt", small, *args)
        assert status == 0
        assert out.startswith(start)
        assert "0.50x (slower)" in out


def test_the_demo_prints_its_table(run, monkeypatch):
    from compress_bilinear.cli import _demo as demo

    layer = cb.plan(trained(), {"rel": cb.TuckerConfig(rank=(2, 3, 3))}, measure_latency=False).report
    folders = []

    def quick(folder, seed, progress):
        folders.append((folder, seed))
        return [demo.Row("Tucker", layer.layers[0], 0.9876)], layer

    monkeypatch.setattr(demo, "run", quick)
    status, out, _ = run("demo", "-o", "kept", "--seed", "5")
    assert status == 0
    assert folders == [(Path("kept"), 5)]
    assert "0.9876" in out
    assert "bit-equal outputs. They are in kept." in out


@pytest.mark.parametrize("args", [("--help",), ("-h",), ("compress", "--help"), ("--version",)], ids=str)
def test_help_and_version_are_no_errors(run, args):
    status, out, err = run(*args)
    assert (status, err) == (0, "")
    assert "compress-bilinear" in out


def test_without_a_command_there_is_help(run):
    status, out, err = run()
    assert status == 2
    assert "Commands:" in out + err


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "compress_bilinear", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    assert done.stderr == ""
