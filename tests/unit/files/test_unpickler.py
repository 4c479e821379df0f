"""Files with objects beside their tensors are read, and nothing that they hold is looked up, called or changed."""

import argparse
import builtins
import collections
import copyreg
import enum
import functools
import io
import os
import pickle
import pickletools
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support import bilinear
from torch import nn

from compress_bilinear.errors import CheckpointError
from compress_bilinear.files import read_state

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:'torch.load' received a zip")

STATE = nn.ModuleDict({"rel": bilinear(18, 17, 7), "other": bilinear(5, 4, 3, bias=False)}).state_dict()


class Table(dict):
    """A dict with attributes, as many configurations are."""


class Kind(enum.Enum):
    BIG = 1


@dataclass
class Arguments:
    path: Path
    table: Table


class Slots:
    __slots__ = ("value",)

    def __init__(self):
        self.value = 3


def objects():
    table = Table(lr=0.1)
    table.extra = [Table(a=1)]
    counts = collections.defaultdict(list, {"a": [1]})
    return {
        "namespace": argparse.Namespace(lr=0.1, inner=argparse.Namespace(a=1)),
        "dict with attributes": table,
        "dataclass": Arguments(Path("a/b"), table),
        "enum": Kind.BIG,
        "partial": functools.partial(print, 3, end=""),
        "numpy": [np.ones(3), np.float64(2), np.dtype("float32"), np.random.default_rng(0)],
        "containers": [counts, collections.deque([1, 2]), collections.Counter("aab"), {1, 2}, frozenset([3])],
        "slots": Slots(),
        "keys": {Kind.BIG: 1, Path("a"): {frozenset([Path("b")])}},
        "classes": [nn.Linear, dict, print, torch.optim.Adam],
        "module": nn.Linear(2, 3),
        "generator state": torch.random.get_rng_state(),
    }


def same(state, expected) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("what", objects())
def test_objects_beside_a_state_dict_are_no_hindrance(tmp_path, what, protocol):
    content = {
        "epoch": 3,
        "hyper_parameters": {"own": objects()[what]},
        "state_dict": STATE,
        "loops": [objects()[what]],
    }
    torch.save(content, tmp_path / "last.ckpt", pickle_protocol=protocol)
    assert same(read_state(tmp_path / "last.ckpt")[0], STATE)


def test_the_state_dict_of_an_odd_class_is_a_state_dict(tmp_path):
    class_of_torch = nn.Linear(3, 2).state_dict()
    assert class_of_torch._metadata
    parameters = {name: nn.Parameter(value) for name, value in STATE.items()}
    parameters["rel.weight"].tag = "an attribute of its own"
    for state in (class_of_torch, parameters):
        torch.save({"state_dict": state, "args": argparse.Namespace()}, tmp_path / "last.ckpt")
        assert same(read_state(tmp_path / "last.ckpt")[0], state)


def test_a_state_dict_in_dicts_of_other_classes_is_found(tmp_path):
    nested = Table(epoch=3, model=collections.defaultdict(list, STATE))
    nested.path = Path("a")
    for content in (nested, {"checkpoint": nested}):
        torch.save(content, tmp_path / "last.ckpt")
        assert same(read_state(tmp_path / "last.ckpt")[0], STATE)


def test_tensors_of_every_dtype_come_as_they_are(tmp_path):
    dtypes = (
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.bool,
        torch.complex64,
        torch.uint16,
        torch.float8_e4m3fn,
    )
    state = STATE | {str(dtype): torch.arange(6).view(2, 3).mT.to(dtype) for dtype in dtypes}
    torch.save({"state_dict": state, "args": argparse.Namespace()}, tmp_path / "last.ckpt")
    found, _ = read_state(tmp_path / "last.ckpt")
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert found[name].tolist() == value.tolist()


def test_tensors_that_share_their_values_do_so_after(tmp_path):
    state = {"one.weight": STATE["rel.weight"], "two.weight": STATE["rel.weight"], "part": STATE["rel.weight"][1:, ::2]}
    torch.save({"state_dict": state, "args": argparse.Namespace()}, tmp_path / "last.ckpt")
    found, _ = read_state(tmp_path / "last.ckpt")
    assert same(found, state)
    assert found["one.weight"].data_ptr() == found["two.weight"].data_ptr()


@pytest.mark.parametrize("value", [Slots(), argparse.Namespace(), torch.eye(3).to_sparse()])
def test_an_object_in_the_state_dict_itself_is_named(tmp_path, value):
    torch.save({"model": {**STATE, "b.weight": value}, "args": argparse.Namespace()}, tmp_path / "net.pt")
    with pytest.raises(
        CheckpointError, match=r"Entry 'b.weight' of .* should be a tensor. Found a pickled .*\.\w+, which"
    ):
        read_state(tmp_path / "net.pt")


class Reduced:
    """An object that pickles as a call."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments, state)[: 3 if state is not None else 2]

    def __reduce__(self):
        return self.reduced


def raw(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def attacks(made: str) -> dict[str, object]:
    """Pickles that would make a folder, or change what the program has."""
    code = f"__import__('os').mkdir({made!r})"
    return {
        "a call": Reduced(os.mkdir, made),
        "a shell": Reduced(os.system, f"mkdir {made}"),
        "eval": Reduced(eval, code),
        "exec": [{"deep": (Reduced(exec, code),)}],
        "a chain": Reduced(Reduced, Reduced(getattr, Reduced(__import__, "os"), "mkdir"), made),
        "a method of a result": Reduced(getattr, Reduced(__import__, "os"), "mkdir"),
        "map": Reduced(list, Reduced(map, os.mkdir, [made])),
        "a state": Reduced(functools.partial, print, state=(os.mkdir, (made,), {}, None)),
        "another pickle": Reduced(torch.storage._load_from_bytes, pickle.dumps(Reduced(os.mkdir, made))),
        "torch.load": Reduced(torch.load, made),
        "dotted names": raw(text("os"), text("path.os.mkdir"), b"\x93", text(made), b"\x85R."),
        "old calls": raw(b"(", text(made), b"ios\nmkdir\n."),
        "a function's defaults": raw(
            name("torch._utils", "_rebuild_tensor_v2"), b"N}", text("__defaults__"), b"(K\x01ts\x86b."
        ),
        "a class of torch": raw(name("torch.storage", "UntypedStorage"), b"N}", text("pwned"), b"K\x01s\x86b."),
        "attributes of torch": raw(name("torch", "nn"), b"}", text("pwned"), b"K\x01sb."),
    }


def archive(path: Path, pickled: bytes | None, content: object) -> None:
    """A file of torch.save's with these bytes for its pickle, where they are given."""
    torch.save(content, path, pickle_protocol=4)
    if pickled is not None:
        old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
        with zipfile.ZipFile(path, "w") as new:
            for entry in old.namelist():
                new.writestr(entry, pickled if entry.endswith("data.pkl") else old.read(entry))


@pytest.mark.parametrize("attack", attacks(""))
@pytest.mark.parametrize("beside", [True, False], ids=["beside a state dict", "alone"])
def test_code_in_a_file_is_never_run(tmp_path, attack, beside):
    made = str(tmp_path / "pwned")
    evil = attacks(made)[attack]
    if isinstance(evil, bytes):
        pickletools.dis(evil, out=io.StringIO())  # it is a pickle
        archive(tmp_path / "net.pt", evil, STATE)
    else:
        archive(tmp_path / "net.pt", None, {"model": STATE, "args": evil} if beside else evil)
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    if beside and not isinstance(evil, bytes):
        assert same(read_state(tmp_path / "net.pt")[0], STATE)
    else:
        with pytest.raises(CheckpointError):
            read_state(tmp_path / "net.pt")
    assert not Path(made).exists()
    assert not hasattr(torch.UntypedStorage, "pwned")
    assert not hasattr(torch.nn, "pwned")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


def test_what_these_files_hold_would_run(tmp_path):
    """Python's own unpickling makes the folder: the attacks are real."""
    for attack in ("a call", "eval", "map", "dotted names", "old calls"):
        made = tmp_path / attack.replace(" ", "_")
        evil = attacks(str(made))[attack]
        pickle.loads(evil if isinstance(evil, bytes) else pickle.dumps(evil))
        assert made.exists()


def test_classes_that_a_program_registered_by_number_are_not_called(tmp_path):
    copyreg.add_extension("os", "mkdir", 77)
    try:
        evil = raw(b"\x82\x4d", text(str(tmp_path / "pwned")), b"\x85R.")
        pickle.loads(raw(b"\x82\x4d."))  # now it is in the cache of numbers
        archive(tmp_path / "net.pt", evil, STATE)
        with pytest.raises(CheckpointError):
            read_state(tmp_path / "net.pt")
    finally:
        copyreg.remove_extension("os", "mkdir", 77)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_is_not_run(tmp_path, monkeypatch):
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "net.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *args, **options: builtins.exit())
    with pytest.raises(
        CheckpointError, match=r"Found a TorchScript archive: save torch.jit.load\(path\).state_dict\(\)"
    ):
        read_state(tmp_path / "net.pt")


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_objects_in_the_older_format_are_placeholders_too(tmp_path):
    content = {"model": STATE, "args": argparse.Namespace()}
    torch.save(content, tmp_path / "net.pt", _use_new_zipfile_serialization=False)
    assert same(read_state(tmp_path / "net.pt")[0], STATE)
    torch.save(nn.Linear(2, 2), tmp_path / "net.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"Found a pickled torch.nn.modules.linear.Linear, which is not loaded"):
        read_state(tmp_path / "net.pt")


@pytest.mark.parametrize("attack", [name for name, evil in attacks("").items() if not isinstance(evil, bytes)])
def test_code_in_a_file_of_the_older_format_is_never_run(tmp_path, attack):
    content = {"model": STATE, "args": attacks(str(tmp_path / "pwned"))[attack]}
    torch.save(content, tmp_path / "net.pt", _use_new_zipfile_serialization=False)
    assert same(read_state(tmp_path / "net.pt")[0], STATE)
    assert not (tmp_path / "pwned").exists()


def test_an_archive_whose_first_bytes_are_a_pickle_s_is_refused(tmp_path):
    """The oldest format is a tar, from which torch.load extracts files."""
    (tmp_path / "storages").write_bytes(b"")
    with tarfile.open(tmp_path / "net.pt", "w", format=tarfile.GNU_FORMAT) as file:
        file.add(tmp_path / "storages", arcname="\udc80")
        file.add(tmp_path / "storages", arcname="storages")
    assert (tmp_path / "net.pt").read_bytes()[:1] == b"\x80"
    with pytest.raises(CheckpointError, match=r"legacy \.tar format"):
        read_state(tmp_path / "net.pt")


@pytest.mark.parametrize(
    "pickled", [b"", b"\x80\x02", b"\x80\x02}q\x00", b"garbage", raw(name("a", "b"), b"R."), b"\x80\x04K\x01Q."]
)
def test_a_damaged_pickle_is_refused(tmp_path, pickled):
    archive(tmp_path / "net.pt", pickled, STATE)
    with pytest.raises(CheckpointError):
        read_state(tmp_path / "net.pt")
