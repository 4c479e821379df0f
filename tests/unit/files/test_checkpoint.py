import json
import pickle
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import assert_same_state, bilinear, low_rank, state_of
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

import compress_bilinear as cb
from compress_bilinear.errors import CheckpointError
from compress_bilinear.files import _container, describe, read_state

IN1, IN2, OUT = 9, 8, 7

CONFIGS = {
    "cp": cb.CPConfig(rank=2),
    "cp int8": cb.CPConfig(rank=2, quantize="int8"),
    "tucker": cb.TuckerConfig(rank=(2, 3, 2)),
    "tucker int8": cb.TuckerConfig(rank=(2, 3, 2), quantize="int8"),
    "tucker near full": cb.TuckerConfig(rank=(6, 3, 7)),
    "tucker near full int8": cb.TuckerConfig(rank=(5, 7, 2), quantize="int8"),
    "dense": cb.DenseConfig(),
    "dense int8": cb.DenseConfig(quantize="int8"),
    "dense bf16": cb.DenseConfig(quantize="bf16"),
    "tucker near full bf16": cb.TuckerConfig(rank=(5, 7, 2), quantize="bf16"),
}


class Net(nn.Module):
    """Shared and plain bilinear layers, tied parameters, and other kinds of modules and buffers."""

    def __init__(self, out: int = OUT, bias: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rel = bilinear(IN1, IN2, out, bias=bias, seed=1)
        self.one = self.other = bilinear(IN1, IN2, out, seed=2)
        self.norm = nn.BatchNorm1d(out)
        self.words = nn.Embedding(5, out)
        self.logits = nn.Linear(out, 5, bias=False)
        self.logits.weight = self.words.weight
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.to(dtype)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.logits(self.norm(self.rel(x1, x2) + self.one(x1, x2) + self.other(x1, x2)))


class Extra(nn.BatchNorm1d):
    """A module that keeps more than tensors."""

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def with_extra(extra: object) -> Net:
    model = Net()
    model.norm = Extra(OUT)
    model.norm.extra = extra
    return model


def trained(**options) -> Net:
    """A network whose every tensor differs from a fresh one's."""
    model = Net(**options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.rand(value.shape, generator=generator) if value.is_floating_point() else 17)
        for seed, layer in enumerate((model.rel, model.one)):
            layer.weight.copy_(low_rank(tuple(layer.weight.shape), 2, noise=0.1, seed=seed))
    return model.eval()


def rows(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(6, size, generator=generator).to(dtype) for size in (IN1, IN2))


def small(model: nn.Module, config: object, **options) -> nn.Module:
    return cb.compress(model, config, measure_latency=False, force=True, **options)[0]


def on_meta() -> Net:
    with torch.device("meta"):
        return Net()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "small.safetensors"


@cache
def compressed(way: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A trained network with all its bilinear layers compressed in one way; not to be changed."""
    return small(trained(dtype=dtype), CONFIGS[way])


# every way once, into a fresh network or one on the meta device; and the one with most parts into both
WAYS = [(way, (Net, on_meta)[k % 2]) for k, way in enumerate(CONFIGS)] + [("tucker near full int8", Net)]


@cache
def mixed() -> nn.Module:
    """`rel` as Tucker and `one` = `other` as int8 CP; not to be changed."""
    return small(trained(), {"rel": CONFIGS["tucker near full"], "*": CONFIGS["cp int8"]})


@pytest.fixture
def saved(path) -> Path:
    """A file with `mixed()`."""
    cb.save(mixed(), path)
    return path


def stored(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and its metadata."""
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def assert_same_file(found: Path, expected: Path) -> None:
    """The same tensors and metadata; safetensors orders the metadata at random."""
    (tensors, metadata), (others, other) = (stored(path) for path in (found, expected))
    assert metadata == other
    assert tensors.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in tensors.items())


class TestRoundTrip:
    @pytest.mark.parametrize(("way", "fresh"), WAYS)
    def test_a_network_comes_back_bit_for_bit(self, path, way, fresh):
        model = compressed(way)
        cb.save(model, path)
        target = fresh().eval()
        loaded = cb.load(path, target)
        assert loaded is target
        assert_same_state(loaded, state_of(model))
        assert not any(value.is_meta for value in loaded.state_dict().values())
        assert torch.equal(loaded(*rows()), model(*rows()))
        assert loaded.one is loaded.other
        assert (type(loaded.rel), loaded.rel.rank, loaded.rel.quantize) == (
            type(model.rel),
            model.rel.rank,
            model.rel.quantize,
        )

    @pytest.mark.parametrize(
        ("way", "device"), [("cp", "meta"), ("tucker near full int8", "cpu"), ("dense", "cpu"), ("dense int8", "meta")]
    )
    def test_a_layer_that_is_the_network_comes_back(self, path, way, device):
        model = compressed(way).rel
        cb.save(model, path)
        loaded = cb.load(path, nn.Bilinear(IN1, IN2, OUT, device=device))
        assert type(loaded) is type(model)
        assert_same_state(loaded, state_of(model))
        assert torch.equal(loaded(*rows()), model(*rows()))

    @pytest.mark.parametrize("way", ["cp", "tucker int8", "dense int8"])
    def test_bfloat16_networks_come_back(self, path, way):
        model = compressed(way, torch.bfloat16)
        cb.save(model, path)
        loaded = cb.load(path, Net(dtype=torch.bfloat16).eval())
        assert_same_state(loaded, state_of(model))
        assert torch.equal(loaded(*rows(torch.bfloat16)), model(*rows(torch.bfloat16)))

    def test_layers_without_bias_come_back(self, path):
        model = small(trained(bias=False), CONFIGS["tucker"])
        cb.save(model, path)
        assert cb.load(path, Net(bias=False)).rel.bias is None

    def test_partly_compressed_networks_come_back(self, path):
        model = small(trained(), {"rel": CONFIGS["cp"]})
        cb.save(model, path)
        loaded = cb.load(path, Net().eval())
        assert isinstance(loaded.one, nn.Bilinear)
        assert torch.equal(loaded(*rows()), model(*rows()))

    def test_networks_without_replaced_layers_come_back(self, path):
        cb.save(trained(), path)
        assert_same_state(cb.load(path, Net()), state_of(trained()))

    def test_what_is_loaded_can_be_saved_again(self, saved, tmp_path):
        again = tmp_path / "again.safetensors"
        cb.save(cb.load(saved, Net()), again)
        assert_same_file(again, saved)

    def test_shared_and_tied_tensors_are_stored_once(self, saved):
        names = set(load_file(saved))
        assert len({"words.weight", "logits.weight"} & names) == 1
        assert not any(name.startswith("other.") for name in names)

    def test_flags_are_those_of_the_fresh_network(self, saved):
        model = Net()
        model.rel.requires_grad_(False).eval()
        loaded = cb.load(saved, model)
        assert not any(parameter.requires_grad for parameter in loaded.rel.parameters())
        assert not loaded.rel.core.training
        assert loaded.one.training
        assert loaded.one.bias.requires_grad

    def test_what_is_loaded_trains(self, saved):
        loaded = cb.load(saved, Net())
        loaded(*rows()).sum().backward()
        assert all(parameter.grad is not None for parameter in loaded.rel.parameters())

    @pytest.mark.parametrize("fresh", [Net, on_meta], ids=["fresh", "meta"])
    def test_tied_parameters_stay_tied(self, saved, fresh):
        loaded = cb.load(saved, fresh())
        assert loaded.words.weight is loaded.logits.weight

    @pytest.mark.parametrize("fresh", [Net, on_meta], ids=["fresh", "meta"])
    @pytest.mark.parametrize("kept", ["words.weight", "logits.weight"])
    def test_a_tied_parameter_may_have_one_of_its_names(self, path, kept, fresh):
        """As transformers writes it, whose file the command line then compressed."""
        model = mixed()
        state = {name: value for name, value in model.state_dict().items() if name[:5] not in ("words", "logit")}
        with _container.written({**state, kept: model.words.weight}, describe(model), path):
            pass
        loaded = cb.load(path, fresh())
        assert loaded.words.weight is loaded.logits.weight
        assert_same_state(loaded, model.state_dict())
        del state["norm.weight"]  # which nothing else is
        with _container.written({**state, kept: model.words.weight}, describe(model), path):
            pass
        with pytest.raises(CheckpointError, match=r"Found missing norm.weight: build the network that was saved"):
            cb.load(path, fresh())

    def test_a_bias_that_is_tied_elsewhere_stays_tied(self, path):
        def net() -> nn.Module:
            model = nn.ModuleDict({"rel": bilinear(IN1, IN2, OUT), "head": nn.Linear(3, OUT)})
            model["head"].bias = model["rel"].bias
            return model

        cb.save(small(net(), CONFIGS["tucker"]), path)
        loaded = cb.load(path, net())
        assert loaded["rel"].bias is loaded["head"].bias

    def test_views_into_one_storage_are_saved_apart(self, path):
        model = nn.Module()
        model.register_buffer("whole", torch.arange(12.0).view(3, 4))
        model.register_buffer("column", model.whole[:, 1])
        model.register_buffer("row", model.whole[1])
        model.register_buffer("spread", torch.ones(1).expand(5))
        cb.save(model, path)
        found = load_file(path)
        assert found["column"].tolist() == [1, 5, 9]
        assert found["row"].tolist() == [4, 5, 6, 7]
        assert found["spread"].tolist() == [1] * 5
        assert torch.equal(found["whole"], model.whole)


def edited(change: Callable[[dict, dict], None], signed: bool) -> Callable[[Path], None]:
    """Change the description and the tensors of a file; `signed` also renews the digest, as a forger would."""

    def rewrite(path: Path) -> None:
        tensors, metadata = stored(path)
        description = json.loads(metadata["compress_bilinear"])
        change(description, tensors)
        text = json.dumps(description, sort_keys=True)
        metadata["compress_bilinear"] = text
        if signed:
            metadata["digest"] = _container._digest(text, tensors)
        save_file(tensors, path, metadata)

    return rewrite


def layer_with(**changes) -> Callable[[dict, dict], None]:
    return lambda description, tensors: description["layers"][0].update(changes)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def rename(description, tensors) -> None:
    tensors["rel.core.weights"] = tensors.pop("rel.core.weight")


def cast(description, tensors) -> None:
    tensors["rel.core.weight"] = tensors["rel.core.weight"].double()


def cast_scale(description, tensors) -> None:
    tensors["one.out_proj.sigma"] = tensors["one.out_proj.sigma"].double()


def cast_index(description, tensors) -> None:
    tensors["rel.out_proj.index"] = tensors["rel.out_proj.index"].long()


def misplaced(place: str) -> Callable[[dict, dict], None]:
    def change(description, tensors) -> None:
        description["extra"] = {"norm._extra_state": {"a": 1}}
        tensors[f"norm._extra_state[{place}"] = torch.ones(1)

    return change


DAMAGE = {
    "missing": (Path.unlink, "should be a file. Found none"),
    "empty": (lambda path: path.write_bytes(b""), "should be a whole safetensors file"),
    "garbage": (lambda path: path.write_bytes(b"garbage " * 99), "should be a whole safetensors file"),
    "truncated header": (lambda path: path.write_bytes(path.read_bytes()[:99]), "should be a whole safetensors file"),
    "truncated data": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "should be a whole safetensors file"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "should be a whole safetensors file"),
    "pickle": (lambda path: torch.save(Net(), path), "should be a whole safetensors file"),
    "foreign": (lambda path: save_file({"a": torch.ones(2)}, path), "safetensors without its description"),
    "flipped byte": (flip, "damaged or edited"),
    "edited description": (edited(layer_with(rank=[2, 2, 2]), False), "damaged or edited"),
    "edited tensor": (edited(lambda d, t: t["rel.core.weight"].zero_(), False), "damaged or edited"),
    "version": (edited(lambda d, t: d.update(version=1), True), "format version 4. Found 1"),
    "no version": (edited(lambda d, t: d.pop("version"), True), "damaged or edited"),
    "no layers": (edited(lambda d, t: d.pop("layers"), True), "layers: is required. Found none"),
    "unknown field": (edited(layer_with(colour="red"), True), r"layers\[0\].colour: unknown"),
    "no name": (edited(layer_with(names=[]), True), r"layers\[0\].names: .*at least 1 item"),
    "a size as text": (edited(layer_with(in1_features="9"), True), r"layers\[0\].in1_features: .*integer. Found '9'"),
    "a size as truth": (
        edited(layer_with(in1_features=True), True),
        "in1_features: .*integer. Found True",
    ),
    "two ranks": (edited(layer_with(rank=[2, 3]), True), r"layers\[0\].rank"),
    "unknown mode": (edited(layer_with(compute="slow"), True), r"layers\[0\].compute: .*'on_the_fly', .*Found 'slow'"),
    "no rank": (edited(layer_with(rank=None), True), "not valid: .*'rank'"),
    "other alias": (edited(lambda d, t: d["aliases"].update(x="y"), True), "should hold tensor 'y', which 'x' is"),
    "unknown method": (edited(layer_with(method="tt"), True), "one of dense, tucker, cp. Found 'tt'"),
    "unknown format": (edited(layer_with(quantize="int4"), True), "not valid"),
    "forged rank": (edited(layer_with(rank=[99, 2, 2]), True), "not valid"),
    "forged size": (edited(layer_with(in1_features=2**62), True), "`in1_features` of layer 'rel' should be"),
    "missing tensor": (edited(lambda d, t: t.pop("rel.core.weight"), True), "missing core.weight"),
    "renamed tensor": (edited(rename, True), "missing core.weight; unexpected core.weights"),
    "reshaped tensor": (
        edited(lambda d, t: t.update({"norm.bias": torch.ones(1)}), True),
        "'norm.bias' of the net",
    ),
    "mixed dtypes": (edited(cast, True), r"of layer 'rel' should be .* torch.float"),
    "integers": (
        edited(lambda d, t: t.update({k: t[k].int() for k in t if k[:3] == "rel"}), True),
        "Found .*int32",
    ),
    "other scale": (edited(cast_scale, True), "should be .* torch.float32"),
    "other index": (edited(cast_index, True), "should be .* torch.int32"),
    "repeated index": (edited(lambda d, t: t["rel.out_proj.index"].zero_(), True), "each of 0..6 once"),
    "extra tensor": (edited(lambda d, t: t.update(extra=torch.ones(1)), True), "unexpected extra"),
    "misplaced tensor": (edited(misplaced('"a", 0]'), True), "should have a place in the extra state"),
    "empty place": (edited(misplaced("]"), True), "should have a place in the extra state"),
    "no place": (edited(misplaced('"a"'), True), "should have a place in the extra state"),
}


def without_head() -> Net:
    model = Net()
    del model.norm
    return model


def unshared() -> Net:
    model = Net()
    model.other = nn.Bilinear(IN1, IN2, OUT)
    return model


def hooked() -> Net:
    model = Net()
    model.rel.register_forward_hook(lambda *args: None)
    return model


OTHER_NETWORKS = {
    "another kind": (lambda: nn.Linear(3, 3), "'rel' should be an nn.Bilinear .* Found no such layer"),
    "other sizes": (lambda: Net(out=OUT + 1), "`out_features` of layer 'rel' should be 7. Found 8"),
    "no bias": (lambda: Net(bias=False), "`bias` of layer 'rel' should be True. Found False"),
    "float64": (lambda: Net(dtype=torch.float64), "should be torch.float64, as the network's are. Found torch.float32"),
    "compressed": (lambda: small(Net(), CONFIGS["tucker"]), "Found a TuckerBilinear"),
    "without a part": (without_head, "unexpected norm.bias"),
    "unshared": (unshared, "should be shared under the names one, other. Found it under one"),
    "hooked": (hooked, "should be a plain nn.Bilinear. Found that it has forward hooks"),
}


def test_an_expanded_buffer_is_refused_and_the_model_is_untouched(path):
    def build():
        model = Net()
        model.register_buffer("expanded", torch.full((1,), float(torch.rand(()))).expand(4))
        return model

    cb.save(small(build(), CONFIGS["dense int8"]), path)
    model = build()
    before = state_of(model)
    with pytest.raises(CheckpointError, match="Found an expanded one"):
        cb.load(path, model)
    assert_same_state(model, before)
    assert type(model.rel) is nn.Bilinear


def test_a_bias_keeps_its_flag_where_the_weight_is_frozen(path):
    cb.save(small(trained(), CONFIGS["dense int8"]), path)
    model = Net()
    model.rel.weight.requires_grad_(False)
    assert cb.load(path, model).rel.bias.requires_grad


def test_a_deeply_nested_description_is_a_clear_error(path):
    save_file({"a": torch.ones(1)}, path, {"compress_bilinear": "[" * 100_000})
    with pytest.raises(CheckpointError):
        cb.load(path, Net())


class TestFailures:
    def refuse(self, path: Path, model: nn.Module, problem: str) -> None:
        before, parts, random = state_of(model), dict(model.named_modules()), torch.get_rng_state()
        with pytest.raises(CheckpointError, match=problem):
            cb.load(path, model)
        assert_same_state(model, before)
        assert dict(model.named_modules()) == parts
        assert torch.equal(torch.get_rng_state(), random)

    @pytest.mark.parametrize("case", DAMAGE)
    def test_a_damaged_file_is_refused_and_the_model_untouched(self, saved, case):
        damage, problem = DAMAGE[case]
        damage(saved)
        self.refuse(saved, Net(), problem)

    @pytest.mark.parametrize("case", OTHER_NETWORKS)
    def test_another_network_is_refused_and_untouched(self, saved, case):
        make, problem = OTHER_NETWORKS[case]
        self.refuse(saved, make(), problem)

    def test_a_mode_that_is_gone_or_not_to_be_had_computes_on_the_fly(self, saved):
        edited(layer_with(compute="int8"), True)(saved)  # of a layer in floating point
        with pytest.warns(UserWarning, match="Layer 'rel' of the file computes on the fly: the layer is in floating"):
            assert cb.load(saved, Net()).rel.compute == "on_the_fly"
        edited(layer_with(compute="resident"), True)(saved)  # of an earlier version
        assert cb.load(saved, Net()).rel.compute == "on_the_fly"

    def test_the_layers_of_other_files_are_none(self, tmp_path):
        save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
        torch.save({"a": torch.ones(2)}, tmp_path / "net.pt")
        assert read_state(tmp_path / "foreign.safetensors")[1] == ()
        assert read_state(tmp_path / "net.pt")[1] == ()

    def test_the_state_of_a_file_is_verified_and_has_all_names(self, saved):
        state, _ = read_state(saved)
        assert state.keys() == mixed().state_dict().keys()
        flip(saved)
        with pytest.raises(CheckpointError, match="damaged or edited"):
            read_state(saved)

    def test_a_folder_is_refused(self, tmp_path):
        self.refuse(tmp_path, Net(), "Found a folder")

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    def test_a_distributed_checkpoint_is_refused_with_the_way_out(self, tmp_path):
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        state = Net().state_dict()
        checkpoint.save({"model": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)
        self.refuse(tmp_path / "dcp", Net(), "a folder of torch.distributed.checkpoint: .*dcp_to_torch_save")
        with pytest.raises(CheckpointError, match=r"dcp_to_torch_save\(folder, file\) makes one file of it"):
            read_state(tmp_path / "dcp")
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "net.pt")
        found, _ = read_state(tmp_path / "net.pt")
        assert found.keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in found.items())

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_filling_that_fails_half_way_is_undone(self, saved, device):
        class Failing(Net):
            def load_state_dict(self, *args, **options):
                super().load_state_dict(*args, **options)
                raise MemoryError

        with torch.device(device):
            model = Failing()
        before, parts = state_of(model), dict(model.named_modules())
        with pytest.raises(MemoryError):
            cb.load(saved, model)
        assert {value.device.type for value in model.state_dict().values()} == {device}
        assert list(model.state_dict()) == list(before)
        assert dict(model.named_modules()) == parts
        if device == "cpu":
            assert_same_state(model, before)

    def test_nothing_is_ever_unpickled(self, saved, monkeypatch):
        def refuse(*args, **options):
            raise AssertionError("this would run code")

        for module, name in [(torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")]:
            monkeypatch.setattr(module, name, refuse)
        assert isinstance(cb.load(saved, Net()).rel, cb.TuckerBilinear)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class TestSaving:
    def fail_half_way(self, monkeypatch, error) -> None:
        def half(tensors, path, metadata):
            Path(path).write_bytes(b"half of the n")
            raise error

        monkeypatch.setattr(_container, "save_file", half)

    @pytest.mark.parametrize(
        ("error", "seen"),
        [
            (OSError("disk full"), OSError),
            (RuntimeError("broken"), CheckpointError),
            (KeyboardInterrupt(), KeyboardInterrupt),
        ],
    )
    def test_a_failure_leaves_the_old_file(self, saved, monkeypatch, error, seen):
        before = saved.read_bytes()
        self.fail_half_way(monkeypatch, error)
        with pytest.raises(seen):
            cb.save(Net(), saved)
        assert saved.read_bytes() == before
        assert list(saved.parent.iterdir()) == [saved]

    def test_the_file_is_as_readable_as_others(self, saved):
        other = saved.parent / "other"
        other.touch()
        assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)

    def test_saving_changes_nothing(self, path):
        model = compressed("tucker int8")
        before = state_of(model)
        cb.save(model, path)
        assert_same_state(model, before)

    def test_the_description_names_the_layers(self, saved):
        layers = read_state(saved)[1]
        assert [(layer.names, layer.method, layer.rank) for layer in layers] == [
            (("rel",), "tucker", (6, 3, 7)),
            (("one", "other"), "cp", 2),
        ]

    @pytest.mark.parametrize(
        ("model", "problem"),
        [
            (on_meta, "Found a tensor without values"),
            (lambda: nn.LazyLinear(3), "Found a tensor without values"),
        ],
        ids=["meta", "lazy"],
    )
    def test_a_state_without_values_is_refused(self, path, model, problem):
        with pytest.raises(CheckpointError, match=problem):
            cb.save(model(), path)
        assert not path.exists()

    @pytest.mark.parametrize(
        "value",
        [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex128), torch.ones(2, dtype=torch.complex64).conj()],
        ids=["sparse", "complex128", "conjugate view"],
    )
    def test_what_safetensors_cannot_hold_is_refused_or_kept_exactly(self, path, value):
        def net(value: Tensor) -> nn.Module:
            model = nn.Module()
            model.register_buffer("value", value)
            return model

        try:
            cb.save(net(value), path)
        except CheckpointError:
            assert not path.exists()
        else:
            assert torch.equal(cb.load(path, net(torch.zeros_like(value))).value, value)

    @pytest.mark.parametrize(
        "extra",
        [
            {"step": 3, "names": ["a", None], "scale": 0.1, "on": True, "deep": {"x": []}},
            None,
            "text",
            float("inf"),
            torch.arange(3),
        ],
        ids=["dict", "none", "text", "infinity", "tensor"],
    )
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_extra_state_comes_back(self, path, extra, device):
        cb.save(small(with_extra(extra), CONFIGS["cp int8"]), path)
        with torch.device(device):
            fresh = with_extra(torch.zeros(7, device="cpu"))
        found = cb.load(path, fresh).norm.extra
        assert torch.equal(found, extra) if isinstance(extra, Tensor) else found == extra
        if isinstance(extra, Tensor):
            path.write_bytes(bytes(path.stat().st_size))
            assert found.tolist() == [0, 1, 2]  # it is no view of the file

    @pytest.mark.parametrize(
        "extra",
        [(1, 2), {1: 2}, {1: torch.ones(2)}, {"a": (torch.ones(2),)}, {1, 2}, object(), float("nan")],
        ids=["tuple", "numbers as keys", "a tensor by a number", "a tensor in a tuple", "set", "object", "nan"],
    )
    def test_extra_state_that_would_change_is_refused(self, path, extra):
        with pytest.raises(
            CheckpointError, match=r"State 'norm._extra_state' should be a tensor or plain data: .*Found"
        ):
            cb.save(with_extra(extra), path)
        assert not path.exists()

    @pytest.mark.parametrize("name", ["small.safetensors", "model.safetensors.index.json"])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_tensors_in_extra_state_come_back_in_their_places(self, tmp_path, name, device):
        model = small(with_extra(None), CONFIGS["cp int8"])
        scale = torch.randn(2, 3).bfloat16()
        state = {"scale": scale, 'a "key"[0]': [3, {"": torch.tensor(7)}, None], "again": scale, "n": 3, "none": None}
        state |= {"tied": model.logits.weight, "empty": torch.zeros(0, 2), "deep": {"scale": torch.zeros(2).bool()}}
        model.norm.extra = state
        cb.save(model, tmp_path / name, max_shard_bytes=1)
        with torch.device(device):
            fresh = with_extra(None)
        expected, found = (
            dict(tree_flatten_with_path(each)[0]) for each in (state, cb.load(tmp_path / name, fresh).norm.extra)
        )
        assert found.keys() == expected.keys()
        for place, value in expected.items():
            if isinstance(value, Tensor):
                assert found[place].dtype == value.dtype
                assert torch.equal(found[place], value)
            else:
                assert found[place] == value
        for file in tmp_path.glob("*.safetensors"):
            file.write_bytes(bytes(file.stat().st_size))
        assert all(torch.equal(found[place], scale) for place, value in expected.items() if value is scale)  # no view

    @pytest.mark.parametrize(
        "inside", [torch.ones(2).to_sparse(), torch.ones(2, device="meta"), nn.UninitializedParameter()]
    )
    def test_tensors_in_extra_state_that_a_file_cannot_hold_are_refused(self, path, inside):
        with pytest.raises(CheckpointError, match=r"norm\._extra_state\[\"a\", 0\]' should be a (dense )?tensor"):
            cb.save(with_extra({"a": [inside]}), path)
        assert not path.exists()

    def test_a_network_without_the_extra_state_is_another(self, path):
        cb.save(with_extra({"step": 3}), path)
        with pytest.raises(CheckpointError, match=r"unexpected norm._extra_state"):
            cb.load(path, Net())

    def test_a_layer_that_was_changed_from_the_inside_is_refused(self, path):
        model = small(trained(), CONFIGS["tucker"])
        model.rel.in1_proj = Wrapped(model.rel.in1_proj)
        with pytest.raises(CheckpointError, match=r"Layer 'rel' should hold .* Found .*in1_proj.inner.weight"):
            cb.save(model, path)

    def test_a_folder_that_is_not_there_is_an_error(self, tmp_path):
        with pytest.raises(cb.CompressionError, match="Found no folder"):
            cb.save(Net(), tmp_path / "missing" / "file")
