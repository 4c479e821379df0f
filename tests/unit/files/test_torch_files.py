"""State dicts are read from whatever file holds one, and nothing in a file is run."""

import json
import os
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
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
        lambda state: {"net": state, "normalizer": {"mean": torch.zeros(3), "std": torch.ones(3)}},
        lambda state: {"net": {**state, "_extra_state": None, "version": 2}, "normalizer": {"mean": torch.zeros(3)}},
        lambda state: {"checkpoint": {"epoch": 2, "model": state}},
        lambda state: {**state, "config": {"lr": 0.1}, "_extra_state": None},
    ],
    ids=[
        *("bare", "ordered", "under model", "beside numbers", "beside a tensor", "beside an optimizer"),
        *("beside moments", "beside other tensors", "with other entries", "nested", "beside a table"),
    ],
)
def test_a_pt_file_may_hold_the_state_or_have_it_under_a_key(tmp_path, wrap):
    torch.save(wrap(STATE), tmp_path / "net.pt")
    assert same(read_state(tmp_path / "net.pt")[0], STATE)


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
    with pytest.raises(CheckpointError, match=r"a state dict under 'run'. Found 'ema' .*, 'run.model'"):
        read_state(tmp_path / "net.pt", "run")


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
        (nn.Linear(2, 2), r"pickled Python objects \(torch.nn.modules.linear.Linear\), which are not loaded"),
        (
            {"a": {"w": torch.ones(1)}, "b": {"c": {"w": torch.ones(1)}}},
            r"Found 'a' \(1 tensors\), 'b.c' \(1 tensors\): choose one by --key",
        ),
        ({"a": STATE, "b": STATE}, r"Found 'a' \(3 tensors\), 'b' \(3 tensors\): choose one by --key"),
        ({}, "should hold one state dict. Found none"),
        ({"epoch": 3}, "Found none under the keys 'epoch'"),
        ({"model": {**STATE, "norm._extra_state": {"scale": 2}}}, "Found norm._extra_state, which would be lost"),
        ([torch.ones(1)], "should hold a state dict. Found a list"),
        (torch.ones(1), "should hold a state dict. Found a Tensor"),
    ],
    ids=["module", "two states", "two networks", "empty", "no state", "more than tensors", "list", "tensor"],
)
def test_what_is_no_state_is_refused(tmp_path, content, problem):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=problem):
        read_state(tmp_path / "net.pt")


def test_code_in_a_file_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"model": STATE, "args": Evil()}, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="which are not loaded because that runs code"):
        read_state(tmp_path / "net.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"hello", lambda data: data[: len(data) // 2]])
def test_damaged_files_are_refused(tmp_path, name, damage):
    path = tmp_path / name
    torch.save(STATE, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError):
        read_state(path)


@pytest.mark.parametrize(("name", "found"), [("missing.pt", "none"), ("", "a folder")])
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
