"""Networks of transformers and huggingface_hub keep their compressed layers, or refuse to be saved."""

import copy
import json
import pickle

import pytest
import torch
from layers import FEW, for_kinds, rank_of
from torch import nn

import compress_bilinear as cb
from compress_bilinear.errors import CheckpointError, CompressionError
from compress_bilinear.modules import METHODS

transformers = pytest.importorskip("transformers", reason="pip install transformers")
SIZES = (7, 6, 5)


class Config(transformers.PretrainedConfig):
    model_type = "small"


class Biaffine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8, 7))

    def forward(self, x, y):
        x, y = (torch.cat([v, torch.ones_like(v[..., :1])], -1) for v in (x, y))
        return torch.einsum("bxi,oij,byj->boxy", x, self.weight, y)


class Kept(cb.PretrainedMixin, transformers.PreTrainedModel):
    config_class = Config
    base_model_prefix = "inner"

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Bilinear | Biaffine):
            module.weight.data.normal_()


class Inner(Kept):
    def __init__(self, config):
        super().__init__(config)
        self.fusion = nn.Bilinear(*SIZES)
        self.post_init()

    def forward(self, x, y):
        return self.fusion(x, y)


class Outer(Kept):
    def __init__(self, config):
        super().__init__(config)
        self.inner = Inner(config)
        self.arc = Biaffine()
        self.head = nn.Linear(5, 3)
        self.post_init()

    def forward(self, x, y):
        return self.head(self.inner(x, y)), self.arc(x, y)


class Unaware(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.fusion = nn.Bilinear(*SIZES)
        self.post_init()

    def _init_weights(self, module):
        """Nothing: what is missing keeps the memory's values."""

    forward = Inner.forward


def compressed(kind, method="cp", quantize="int8", **options):
    config = METHODS[method].configure(rank_of(method, SIZES), quantize, 0)
    return cb.compress(kind(Config()).eval(), config, force=True, progress=False, **options)[0]


def rows(dtype=torch.float32):
    return tuple(torch.randn(2, 4, size, generator=torch.Generator().manual_seed(size)).to(dtype) for size in SIZES[:2])


def all_equal(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@for_kinds(fast=FEW)
@pytest.mark.slow
def test_layers_and_other_forms_come_back_as_they_were(method, quantize, tmp_path):
    model = compressed(Outer, method, quantize)
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    again, told = Outer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert all_equal(again(*rows()), model(*rows()))
    for layer in (again.inner.fusion, again.arc.compressed):
        assert (layer.method, layer.quantize) == (method, quantize)
    assert {name: value.dtype for name, value in again.state_dict().items()} == {
        name: value.dtype for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize("method", ["cp", "dense"])
def test_from_pretrained_gives_another_dtype_and_keeps_what_is_stored(method, tmp_path):
    model = compressed(Inner, method)
    model.save_pretrained(tmp_path)
    half = Inner.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all_equal([half.fusion.to_dense()], [model.fusion.to_dense()])
    assert half(*rows(torch.bfloat16)).dtype == half.fusion.bias.dtype == torch.bfloat16


def test_the_compute_mode_comes_back(tmp_path):
    model = compressed(Inner, "dense")
    model.fusion.set_compute("int8")
    model.save_pretrained(tmp_path)
    again = Inner.from_pretrained(tmp_path)
    assert again.fusion.compute == "int8"
    assert all_equal([again(*rows())], [model(*rows())])


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_new_network_of_the_config_has_the_layers_and_takes_the_state(quantize, tmp_path):
    model = compressed(Outer, "tucker", quantize)
    model.save_pretrained(tmp_path)
    new = Outer(Config.from_pretrained(tmp_path)).eval()
    assert not any(value.is_meta for value in new.state_dict().values())
    new.load_state_dict(model.state_dict())
    assert all_equal(new(*rows()), model(*rows()))


class Late(Inner):
    def __init__(self, config):
        super().__init__(config)
        self.late = nn.Bilinear(*SIZES)

    def forward(self, x, y):
        return self.late(x, y)


@pytest.mark.parametrize(
    ("saved", "loaded", "layer"), [(Outer, Inner, "inner.fusion"), (Inner, Outer, "fusion"), (Late, Late, "late")]
)
@pytest.mark.slow
def test_another_class_and_layers_that_come_too_late_are_refused(saved, loaded, layer, tmp_path):
    compressed(saved).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=f"should have layer '{layer}'.* Found (none|Bilinear): load by the class"
    ):
        loaded.from_pretrained(tmp_path)


class Plain(transformers.PreTrainedModel):
    """What `Outer` is without the mixin."""

    config_class = Config
    base_model_prefix = "inner"

    def __init__(self, config):
        super().__init__(config)
        self.inner = Unaware(config)
        self.arc = Biaffine()
        self.head = nn.Linear(5, 3)
        self.post_init()

    forward, _init_weights = Outer.forward, Kept._init_weights


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "1KB"}])
def test_a_class_without_the_mixin_refuses_what_it_would_make_anew(given, options, tmp_path):
    model = compressed(Outer)
    model.save_pretrained(save_directory=tmp_path, **options)
    # as AutoModel does it, a config may be given
    config = {"config": Config.from_pretrained(tmp_path)} if given else {}
    for kind in (Plain, Unaware):
        with pytest.raises(ValueError, match=r"derived from compress_bilinear.PretrainedMixin"):
            kind.from_pretrained(tmp_path, **config)
    again = Outer.from_pretrained(tmp_path, **config)
    assert all_equal(again(*rows()), model(*rows()))
    assert getattr(again.config, "transformers_weights", None) is None
    again.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="PretrainedMixin"):
        Plain.from_pretrained(tmp_path / "again")
    again = Outer.from_pretrained(tmp_path / "again")
    assert all_equal(again(*rows()), model(*rows()))


@pytest.mark.parametrize("path", ["pretrained_model_name_or_path", None])
def test_the_layers_are_those_of_the_folder_whatever_config_is_given(path, tmp_path):
    original, model = Inner(Config()).eval(), compressed(Inner)
    for name, network in (("original", original), ("small", model)):
        network.save_pretrained(tmp_path / name)
        for config in (Config(), original.config, model.config, Config.from_pretrained(tmp_path / name)):
            where = [] if path else [tmp_path / name]
            again = Inner.from_pretrained(*where, config=config, **({path: tmp_path / name} if path else {}))
            assert all_equal(again.state_dict().values(), network.state_dict().values())
            assert all_equal(again(*rows()), network(*rows()))
    assert not hasattr(original.config, "compress_bilinear") or not original.config.compress_bilinear


def test_a_network_of_the_mixin_with_the_state_of_before_is_loaded_by_any_class(tmp_path):
    model = Outer(Config()).eval()
    model.save_pretrained(tmp_path)
    assert all_equal(Plain.from_pretrained(tmp_path).state_dict().values(), model.state_dict().values())
    config = {"*fusion": cb.DenseConfig(), "*": None}
    exact = cb.compress(model, config, force=True, progress=False)[0]
    assert type(exact.inner.fusion) is cb.DenseBilinear
    exact.save_pretrained(tmp_path)
    assert all_equal(Plain.from_pretrained(tmp_path).state_dict().values(), model.state_dict().values())


def test_the_name_of_a_file_of_weights_in_a_config_stays(tmp_path):
    compressed(Inner).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "model.safetensors").rename(tmp_path / "own.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "own.safetensors"}))
    assert isinstance(Inner.from_pretrained(tmp_path).fusion, cb.CPBilinear)
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "own.bin"}))
    with pytest.raises(ValueError, match=r"own\.bin"):
        Inner.from_pretrained(tmp_path)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "changed", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_class_that_would_make_the_layers_anew_refuses_to_be_saved(inplace, changed, tmp_path):
    model = changed(compressed(Unaware, inplace=inplace))
    with pytest.raises(CompressionError, match=r"class Net\(PretrainedMixin, PreTrainedModel\)"):
        model.save_pretrained(tmp_path / "net")
    assert not (tmp_path / "net").exists()
    cb.save(model, tmp_path / "net.safetensors")
    again = cb.load(tmp_path / "net.safetensors", Unaware(Config()).eval())
    assert all_equal([again(*rows())], [model(*rows())])
    with pytest.raises(CompressionError, match="random values"):
        again.save_pretrained(tmp_path / "net")


def test_what_has_the_state_of_before_is_saved_by_any_class(tmp_path):
    plain = Unaware(Config()).eval()
    plain.fusion.reset_parameters()
    model = cb.compress(plain, cb.DenseConfig(), force=True, progress=False)[0]
    assert type(model.fusion) is cb.DenseBilinear
    model.save_pretrained(tmp_path)
    assert all_equal(Unaware.from_pretrained(tmp_path).state_dict().values(), plain.state_dict().values())
    stored = cb.quantize(model, "int8")
    with pytest.raises(CompressionError, match="random values"):
        stored.save_pretrained(tmp_path)
    cb.dequantize(stored).save_pretrained(tmp_path)


def test_a_part_of_a_network_refuses_too_and_so_does_huggingface_hub(tmp_path):
    from huggingface_hub import PyTorchModelHubMixin

    class Shared(nn.Module, PyTorchModelHubMixin):
        def __init__(self):
            super().__init__()
            self.part = Unaware(Config())

    model = Shared().eval()
    model.part.fusion.reset_parameters()
    before = {id(part): set(vars(part)) for part in model.modules()}
    plan = cb.plan(model, cb.CPConfig(rank=3), force=True, progress=False)
    small, _ = plan.apply()
    for part in (small, small.part):
        with pytest.raises(CompressionError, match="random values"):
            part.save_pretrained(tmp_path)
    assert {id(part): set(vars(part)) for part in model.modules()} == before
