"""State dicts are read from whatever file holds one, and nothing in a file is run."""

import json
import os
import re
from collections import OrderedDict
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from safetensors.torch import save, save_file
from support import bilinear
from torch import nn

from compress_bilinear.errors import CheckpointError
from compress_bilinear.files import read_state

STATE = nn.ModuleDict({"rel": bilinear(18, 17, 7), "other": bilinear(5, 4, 3, bias=False)}).state_dict()


def same(state, expected) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "wrap",
    [
        dict,
        OrderedDict,
        lambda state: {"model": state},
        lambda state: {"model": state, "epoch": 3, "args": {"lr": 0.1}},
        lambda state: {"epoch": torch.tensor(3), "state_dict": state},
        lambda state: {"optimizer": {"state": {}, "groups": []}, "net": state},
        lambda state: {"optimizer": {"state": {0: {"exp_avg": torch.ones(3, 2, 2)}}}, "net": state},
        lambda state: {"optimizer": {"state": {"0": {"exp_avg": torch.ones(3, 2, 2)}}}, "net": state},
        lambda state: {"net": state, "masks": {"rel.weight": torch.ones(7, 18, 17, dtype=torch.bool)}},
        lambda state: {"net": state, "normalizer": {"mean": torch.zeros(3), "std": torch.ones(3)}},
        lambda state: {"net": {**state, "_extra_state": None, "version": 2}, "normalizer": {"mean": torch.zeros(3)}},
        lambda state: {"checkpoint": {"epoch": 2, "model": state}},
        lambda state: {**state, "config": {"lr": 0.1}, "_extra_state": None},
    ],
    ids=[
        *("bare", "ordered", "under model", "beside numbers", "beside a tensor", "beside an optimizer"),
        *(
            "beside an optimizer with names",
            "beside masks",
            "beside moments",
            "beside other tensors",
            "with other entries",
            "nested",
            "beside a table",
        ),
    ],
)
def test_a_pt_file_may_hold_the_state_or_have_it_under_a_key(tmp_path, wrap):
    torch.save(wrap(STATE), tmp_path / "net.pt")
    assert same(read_state(tmp_path / "net.pt")[0], STATE)


def test_extra_state_that_is_a_tensor_is_kept(tmp_path):
    state = {**STATE, "rel._extra_state": torch.arange(5)}
    torch.save(state, tmp_path / "net.pt")
    assert same(read_state(tmp_path / "net.pt")[0], state)


def test_a_dict_that_holds_itself_is_refused(tmp_path):
    around = {"a": torch.ones(2)}
    around["self"] = around
    torch.save(around, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="one that holds itself"):
        read_state(tmp_path / "net.pt")


@pytest.mark.parametrize("key", ["ema", "run.model"])
def test_of_several_states_a_key_chooses(tmp_path, key):
    other = {name: value + 1 for name, value in STATE.items()}
    torch.save({"ema": other, "run": {"model": STATE}}, tmp_path / "net.pt")
    assert same(read_state(tmp_path / "net.pt", key)[0], {"ema": other, "run.model": STATE}[key])
    with pytest.raises(CheckpointError, match=r"one state dict under 'run'. Found 'ema' .*, 'run.model'"):
        read_state(tmp_path / "net.pt", "run")


@pytest.mark.parametrize("key", ["state_dict.model", "model", "state_dict.ema.net"])
def test_a_key_chooses_a_part_of_a_state_by_its_names(tmp_path, key):
    beside = {"loss.weight": torch.ones(3), "model_2.w": torch.ones(1)}
    mean = {f"ema.net.{name}": value + 1 for name, value in STATE.items()}
    state = {f"model.{name}": value for name, value in STATE.items()} | beside | mean
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "net.ckpt")
    expected = {name: value + key.endswith("net") for name, value in STATE.items()}
    assert same(read_state(tmp_path / "net.ckpt", key)[0], expected)
    with pytest.raises(CheckpointError, match="one state dict under 'mode'"):
        read_state(tmp_path / "net.ckpt", "mode")


def test_what_is_offered_are_the_states_that_may_be_meant(tmp_path):
    scores = {"best_model_score": torch.tensor(0.3), "best_k_models": {"a": torch.tensor(0.3)}}
    torch.save(
        {"state_dict": STATE, "callbacks": {"check{'a.b': 1}": scores}, "ema": {"net": STATE}}, tmp_path / "a.pt"
    )
    with pytest.raises(CheckpointError, match=r"Found 'state_dict' \(3 tensors\), 'ema.net' \(3 tensors\): choose one"):
        read_state(tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"under 'ema'. Found 'state_dict' .* 'ema.net' \(3 tensors\): choose one"
    ):
        read_state(tmp_path / "a.pt", "ema")


def test_a_key_that_means_two_states_chooses_neither(tmp_path):
    torch.save({"a.b": STATE, "a": {"b": STATE}}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"should hold one state dict under 'a.b'"):
        read_state(tmp_path / "net.pt", "a.b")


def test_a_key_is_refused_for_safetensors(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"--key should be one of a .pt file with several state dicts"):
            read_state(path, "model")


def resident() -> int:
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "small.safetensors"])
def test_values_that_nobody_asks_for_are_not_read(tmp_path, name):
    numel = 2**26  # 256 MB, of which neither file has any on the disk
    if name == "net.pt":
        with torch.serialization.skip_data():
            torch.save({"words.weight": torch.empty(numel)}, tmp_path / name)
    else:
        described = {"words.weight": {"dtype": "F32", "shape": [numel], "data_offsets": [0, 4 * numel]}}
        if name == "small.safetensors":  # as `save` writes it
            content = json.dumps({"version": 4, "layers": [], "aliases": {}})
            described["__metadata__"] = {"compress_bilinear": content, "digest": "0"}
        header = json.dumps(described).encode().ljust(256)
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(tmp_path / name, 8 + len(header) + 4 * numel)
    before = resident()
    state, _ = read_state(tmp_path / name, verify=False)
    assert resident() - before < numel
    assert state["words.weight"].shape == (numel,)


def test_values_are_those_of_the_file_wherever_they_lie_in_it(tmp_path):
    tensors = {"a.weight": torch.randn(3, 18, 17), "b.weight": torch.randn(5)}
    data = save(tensors)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    header += b" " * (1 + len(header) % 2)  # the values begin at an odd address
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    state, _ = read_state(tmp_path / "odd.safetensors")
    assert same(state, tensors)
    assert all(value.data_ptr() % 4 == 0 for value in state.values())
    torch.save(tensors, tmp_path / "net.pt")
    with ZipFile(tmp_path / "net.pt") as old, ZipFile(tmp_path / "small.pt", "w", ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    assert same(read_state(tmp_path / "small.pt")[0], tensors)


@pytest.mark.parametrize("name", ["net.safetensors", "net.bin", "net"])
def test_safetensors_are_known_by_their_content(tmp_path, name):
    save_file(STATE, tmp_path / name)
    assert same(read_state(str(tmp_path / name))[0], STATE)


def test_tensors_from_an_older_torch_format(tmp_path):
    torch.save(STATE, tmp_path / "net.pth", _use_new_zipfile_serialization=False)
    assert same(read_state(tmp_path / "net.pth")[0], STATE)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            nn.Linear(2, 2),
            r"Found a pickled torch.nn.modules.linear.Linear, which is not loaded because that runs code",
        ),
        (
            {"a": {"w": torch.ones(1)}, "b": {"c": {"w": torch.ones(1)}}},
            r"Found 'a' \(1 tensors\), 'b.c' \(1 tensors\): choose one by --key",
        ),
        ({"a": STATE, "b": STATE}, r"Found 'a' \(3 tensors\), 'b' \(3 tensors\): choose one by --key"),
        ({}, "should hold one state dict. Found none"),
        ({"epoch": 3}, "Found none, but under 'epoch' an int."),
        (
            {"net": nn.Linear(2, 2), "ema": nn.Linear(2, 2), "epoch": 3},
            "none, but under 'net' a pickled torch.nn.modules.linear.Linear, .*: save .* alone; under 'epoch' an int",
        ),
        ({"nets": [STATE, STATE]}, "Found none, but under 'nets' a list: save the one of them that is meant by itself"),
        ({"model": {**STATE, "norm._extra_state": {"scale": 2}}}, "Found norm._extra_state, which would be lost"),
        (
            {"w": torch.eye(3).to_sparse()},
            r"'w' .* should be dense, with values. Found torch.sparse_coo: save its to_dense\(\)",
        ),
        ({"w": torch.empty(3, device="meta")}, "Tensor 'w' .* should be dense, with values. Found none"),
        ([STATE], "should hold a state dict. Found a list: save the one of them that is meant by itself"),
        ({"a.b": STATE, "a": {"b": STATE}}, r"Found 'a.b' \(3 tensors\), 'a.b' \(3 tensors\)"),
        (torch.ones(1), "should hold a state dict. Found a Tensor"),
    ],
    ids=[
        "module",
        "two states",
        "two networks",
        "empty",
        "no state",
        "modules",
        "states in a list",
        "more than tensors",
        "sparse",
        "meta",
        "list",
        "one name",
        "tensor",
    ],
)
def test_what_is_no_state_is_refused(tmp_path, content, problem):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=problem):
        read_state(tmp_path / "net.pt")


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"hello", lambda data: data[: len(data) // 2]])
def test_damaged_files_are_refused(tmp_path, name, damage):
    path = tmp_path / name
    torch.save(STATE, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError):
        read_state(path)


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net"])
@pytest.mark.parametrize("data", [b"", b"version https://git-lfs.github.com/spec/v1\nsize 12", b"\x1f\x8b\x08packed"])
def test_what_was_not_downloaded_or_unpacked_is_shown(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    found = re.escape(f"Found {len(data)} bytes that begin with {data[:24]!r}: unpack, download or save it again")
    with pytest.raises(CheckpointError, match=found):
        read_state(tmp_path / name)


@pytest.mark.parametrize("name", ["net.ckpt", "net"])
def test_files_of_torch_are_known_by_their_content(tmp_path, name):
    torch.save(STATE, tmp_path / name)
    assert same(read_state(tmp_path / name)[0], STATE)


@pytest.mark.parametrize(
    ("name", "found"), [("missing.pt", "none"), ("", "a folder without model.safetensors or .*: name a file of it")]
)
def test_what_is_no_file_is_refused(tmp_path, name, found):
    with pytest.raises(CheckpointError, match=f"should be a file. Found {found}"):
        read_state(tmp_path / name)


class TestNetworksInSeveralFiles:
    @pytest.fixture
    def folder(self, tmp_path):
        names = {name: f"model-{number + 1:05}-of-00003.safetensors" for number, name in enumerate(STATE)}
        for name, file in names.items():
            save_file({name: STATE[name]}, tmp_path / file)
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        return tmp_path

    @pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
    def test_a_folder_or_its_index_is_read(self, folder, name):
        state, layers = read_state(folder / name)
        assert same(state, STATE)
        assert layers == ()

    def test_each_tensor_is_that_of_the_file_which_the_index_names(self, folder):
        last = sorted(folder.glob("*.safetensors"))[-1]
        first, name = next(iter(STATE)), list(STATE)[-1]
        save_file({name: STATE[name], first: STATE[first] + 1, "stray": torch.ones(2)}, last)
        assert same(read_state(folder)[0], STATE)
        save_file({"stray": torch.ones(2)}, last)
        with pytest.raises(CheckpointError, match=f"should hold '{name}', as its index says. Found none"):
            read_state(folder)

    def test_a_folder_with_one_file_is_read(self, tmp_path):
        save_file(STATE, tmp_path / "model.safetensors")
        assert same(read_state(tmp_path)[0], STATE)

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("{", "should map names of tensors to files"),
            ("[]", "should map names of tensors to files"),
            ('{"weight_map": 3}', "should map names of tensors to files"),
            ('{"weight_map": {"a": "../secret.safetensors"}}', "should name files of its own folder"),
            ('{"weight_map": {"a": "/etc/passwd"}}', "should name files of its own folder"),
            ('{"weight_map": {"a": "gone.safetensors"}}', "should be a file. Found none"),
        ],
    )
    def test_an_index_that_is_wrong_is_an_error(self, folder, text, problem):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=problem):
            read_state(folder)
