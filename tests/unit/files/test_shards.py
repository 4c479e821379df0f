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


def test_a_failure_to_write_leaves_the_old_files(tmp_path, monkeypatch):
    net, written = small(), []
    cb.save(net, tmp_path / INDEX, max_shard_bytes=5000)

    def third_fails(tensors, path, metadata):
        written.append(path)
        if len(written) == 3:
            raise OSError("disk full")
        save_file(tensors, path, metadata)

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(_container, "save_file", third_fails)
    with pytest.raises(OSError, match="disk full"):
        cb.save(small(1), tmp_path / INDEX, max_shard_bytes=5000)
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

    @pytest.mark.parametrize("output", [INDEX, "part-1.safetensors"])
    def test_files_that_are_read_are_not_written(self, run, large, output):
        before = {path: path.read_bytes() for path in Path("large").iterdir()}
        how = ("--layers", "rel", "--method", "dense", "--quantize", "int8", "--no-latency")
        status, _, err = run("compress", "large", "-o", f"large/{output}", *how)
        assert status == 2
        assert "should be another file than those that are read" in err
        assert {path: path.read_bytes() for path in Path("large").iterdir()} == before
