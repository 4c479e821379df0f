"""A network in several files with an index is written and read as one in a single file is."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import assert_same_state, bilinear, state_of
from torch import nn

import compress_bilinear as cb
from compress_bilinear.errors import CheckpointError
from compress_bilinear.files import _container, read_state

INDEX = "model.safetensors.index.json"


class Net(nn.Module):
    """Layers of some kilobytes each, tied parameters and extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.rel = bilinear(18, 17, 7)
        self.layers = nn.ModuleList([nn.Linear(30, 30) for _ in range(5)])
        self.words, self.logits = nn.Embedding(9, 7), nn.Linear(7, 9, bias=False)
        self.logits.weight = self.words.weight
        self.step = 0

    def get_extra_state(self):
        return {"step": self.step}

    def set_extra_state(self, state):
        self.step = state["step"]

    def forward(self, x, y):
        return self.logits(self.rel(x, y))


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = cb.CPConfig(rank=3, quantize="int8")
    net = cb.compress(Net(), config, force=True, measure_latency=False)[0]
    net.step = 17
    return net


@pytest.mark.parametrize("most", [1, 5000, 10**9])
@pytest.mark.parametrize("name", ["", INDEX])
def test_a_network_comes_back_from_several_files(tmp_path, most, name):
    net = small()
    cb.save(net, tmp_path / INDEX, max_shard_bytes=most)
    files = sorted(tmp_path.glob("*.safetensors"))
    tensors = [load_file(file) for file in files]
    assert len(files) == {1: 16, 5000: 5, 10**9: 1}[most]
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(len(part) == 1 or sum(value.nbytes for value in part.values()) <= most for part in tensors)
    loaded = cb.load(tmp_path / name, Net())
    assert loaded.step == 17
    assert loaded.words.weight is loaded.logits.weight
    x, y = torch.randn(4, 18), torch.randn(4, 17)
    assert torch.equal(loaded(x, y), net(x, y))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), net.parameters(), strict=True))


def test_other_programs_read_the_files(tmp_path):
    net = small()
    cb.save(net, tmp_path / INDEX, max_shard_bytes=5000)
    index = json.loads((tmp_path / INDEX).read_text())
    state = {name: value for name, value in net.state_dict().items() if name != "_extra_state"}
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(state[name].nbytes for name in state.keys() - {"logits.weight"})
    for name, file in index["weight_map"].items():
        if name != "logits.weight":  # it is another name of words.weight
            with safe_open(tmp_path / file, framework="pt") as opened:
                assert torch.equal(opened.get_tensor(name), state[name])


def test_new_files_take_the_place_of_old_ones(tmp_path):
    cb.save(small(), tmp_path / INDEX, max_shard_bytes=5000)
    net = small(1)
    cb.save(net, tmp_path / INDEX, max_shard_bytes=5000)
    assert torch.equal(cb.load(tmp_path, Net()).words.weight, net.words.weight)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("most", [1, 10**9])
def test_old_files_that_the_new_index_does_not_name_are_removed_and_no_others(tmp_path, most):
    cb.save(small(), tmp_path / INDEX, max_shard_bytes=5000)
    old = {path.name for path in tmp_path.glob("*.safetensors")}
    others = {"model-00009-of-00009.safetensors", "model.fp16.safetensors", "config.json", "optimizer.pt"}
    for name in others:
        (tmp_path / name).write_bytes(b"mine")
    net = cb.load(tmp_path, Net())
    cb.save(net, tmp_path / INDEX, max_shard_bytes=most)
    named = {*json.loads((tmp_path / INDEX).read_text())["weight_map"].values()}
    assert old.isdisjoint(named)
    assert {path.name for path in tmp_path.iterdir()} == others | named | {INDEX}
    x, y = torch.randn(4, 18), torch.randn(4, 17)
    assert torch.equal(cb.load(tmp_path, Net())(x, y), net(x, y))


@pytest.mark.parametrize("text", ["{}", "none", '{"weight_map": {"a": "../mine.safetensors"}}'])
def test_nothing_is_removed_for_an_index_that_names_no_files_of_its_folder(tmp_path, text):
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / INDEX).write_text(text)
    cb.save(small(), tmp_path / "new" / INDEX)
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"
    cb.load(tmp_path / "new", Net())


def test_a_failure_to_write_leaves_the_old_files(tmp_path, monkeypatch):
    net, written = small(), []
    cb.save(net, tmp_path / INDEX, max_shard_bytes=5000)

    def third_fails(tensors, path, metadata):
        written.append(path)
        if len(written) % 3 == 0:
            raise OSError("disk full")
        save_file(tensors, path, metadata)

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(_container, "save_file", third_fails)
    with pytest.raises(OSError, match="disk full"):
        cb.save(small(1), tmp_path / INDEX, max_shard_bytes=5000)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(OSError, match="disk full"):
        cb.save(small(1), tmp_path / INDEX, max_shard_bytes=1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_old_and_new_files_are_never_mixed(tmp_path, monkeypatch):
    """Where files cannot all get their names, there is no index that names some of each."""
    cb.save(small(), tmp_path / INDEX, max_shard_bytes=5000)
    renamed, replace = [], os.replace

    def third_fails(source, target):
        renamed.append(target)
        if len(renamed) == 3:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", third_fails)
    with pytest.raises(OSError, match="disk full"):
        cb.save(small(1), tmp_path / INDEX, max_shard_bytes=5000)
    with pytest.raises(CheckpointError, match="should be a file"):
        cb.load(tmp_path, Net())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (Path.unlink, "should be a file. Found none"),
        (flip, "damaged or edited"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "as its index says. Found none"),
    ],
)
def test_a_damaged_file_is_refused_and_the_model_untouched(tmp_path, damage, problem):
    cb.save(small(), tmp_path / INDEX, max_shard_bytes=5000)
    damage(sorted(tmp_path.glob("*.safetensors"))[2])
    model = Net()
    before = state_of(model.layers), model.rel.weight.clone(), model.step
    with pytest.raises(CheckpointError, match=problem):
        cb.load(tmp_path, model)
    assert_same_state(model.layers, before[0])
    assert torch.equal(model.rel.weight, before[1])
    assert model.step == before[2]
    with pytest.raises(CheckpointError, match=problem):
        read_state(tmp_path)


class TestCommandLine:
    @pytest.fixture
    def large(self, tmp_path, monkeypatch) -> Path:
        """A folder with files of somebody else's."""
        monkeypatch.chdir(tmp_path)
        for name in ("large", "small"):
            Path(name).mkdir()
        state = {
            name: value for name, value in Net().state_dict().items() if name not in ("_extra_state", "logits.weight")
        }
        names = {name: f"part-{count % 3}.safetensors" for count, name in enumerate(state)}
        for file in {*names.values()}:
            save_file({name: state[name] for name in names if names[name] == file}, f"large/{file}")
        Path("large", INDEX).write_text(json.dumps({"weight_map": names}))
        return tmp_path

    @pytest.mark.parametrize("source", ["large", f"large/{INDEX}"])
    def test_several_files_become_several_files(self, run, large, source):
        status, out, err = run("inspect", source)
        assert (status, err) == (0, "")
        assert " rel " in out
        how = ("--layers", "rel", "--method", "dense", "--quantize", "int8", "--no-latency")
        status, out, err = run("compress", source, "-o", f"small/{INDEX}", *how, "--report", "report.json")
        assert (status, err) == (0, "")
        size = sum(path.stat().st_size for path in Path("small").iterdir())
        assert f"Wrote small/{INDEX} ({size / 1000:.3g} kB)" in out
        assert {path.name for path in Path("small").iterdir()} == {INDEX, "model-00001-of-00001.safetensors"}
        state, layers = read_state("small")
        assert [layer.names for layer in layers] == [("rel",)]
        assert torch.equal(state["words.weight"], read_state("large")[0]["words.weight"])
        status, out, err = run("report", source, "small", "--json")
        assert (status, err) == (0, "")
        assert json.loads(out)["layers"][0]["name"] == "rel"
        assert " rel " in run("inspect", "small")[1]

    @pytest.mark.parametrize("source", ["bins", "bins/pytorch_model.bin.index.json"])
    def test_several_files_of_torch_are_read_too(self, run, large, source):
        Path("bins").mkdir()
        names = json.loads(Path("large", INDEX).read_text())["weight_map"]
        names = {name: Path(file).with_suffix(".bin").name for name, file in names.items()}
        state = read_state("large")[0]
        for file in {*names.values()}:
            torch.save({name: state[name] for name in names if names[name] == file}, f"bins/{file}")
        Path("bins/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
        found = read_state(source)[0]
        assert found.keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in found.items())
        assert " rel " in run("inspect", source)[1]
        status, _, err = run(
            "compress", source, "-o", "small.safetensors", "--layers", "rel", "--rank", "3,3,3", "--force"
        )
        assert (status, err) == (0, "")
        found, compressed = read_state("small.safetensors")
        assert [layer.names for layer in compressed] == [("rel",)]
        assert torch.equal(found["words.weight"], state["words.weight"])
        status, _, err = run("compress", source, "-o", "bins/part-1.bin", "--layers", "rel", "--rank", "3,3,3")
        assert "should be another file than those that are read" in err
        with pytest.raises(CheckpointError, match=r"Found one that torch\.save wrote: torch\.load"):
            cb.load(source, Net())

    @pytest.mark.parametrize(
        ("damage", "problem"),
        [
            (lambda path: torch.save({}, path), "should hold one state dict"),
            (lambda path: torch.save({"a": torch.ones(1)}, path), "as its index says. Found none"),
            (Path.unlink, "should be a file. Found none"),
            (lambda path: path.write_bytes(b"?"), r"Found 1 bytes that begin with b'\?'"),
        ],
    )
    def test_a_damaged_file_of_torch_among_several_is_refused(self, tmp_path, damage, problem):
        torch.save({"a.weight": torch.ones(2, 3, 4)}, tmp_path / "one.bin")
        torch.save({"b.weight": torch.ones(2, 3, 4)}, tmp_path / "two.bin")
        names = {"a.weight": "one.bin", "b.weight": "two.bin"}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
        assert read_state(tmp_path)[0].keys() == names.keys()
        damage(tmp_path / "two.bin")
        with pytest.raises(CheckpointError, match=problem):
            read_state(tmp_path)

    def test_a_folder_may_have_one_file_of_torch(self, run, large):
        Path("bins").mkdir()
        torch.save(read_state("large")[0], "bins/pytorch_model.bin")
        assert " rel " in run("inspect", "bins")[1]

    @pytest.mark.parametrize("output", [INDEX, "part-1.safetensors"])
    def test_files_that_are_read_are_not_written(self, run, large, output):
        before = {path: path.read_bytes() for path in Path("large").iterdir()}
        how = ("--layers", "rel", "--method", "dense", "--quantize", "int8", "--no-latency")
        status, _, err = run("compress", "large", "-o", f"large/{output}", *how)
        assert status == 2
        assert "should be another file than those that are read" in err
        assert {path: path.read_bytes() for path in Path("large").iterdir()} == before
