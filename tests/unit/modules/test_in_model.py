import functools
import re

import pytest
import torch
from support import bilinear
from torch import nn
from torch.nn.utils import parametrize, prune

from compress_bilinear.config import CPConfig, DenseConfig, TuckerConfig
from compress_bilinear.errors import CompressionError, MatchError
from compress_bilinear.modules import DenseBilinear, FoundLayer, find, reason_against, reference, select
from compress_bilinear.modules import _in_model as discovery

CP, TUCKER, DENSE = CPConfig(rank=2), TuckerConfig(rank=(1, 1, 1)), DenseConfig()


def network() -> nn.Module:
    """Bilinear layers a, blocks.0, blocks.1, deep.b, with deep.again another name of a."""
    model = nn.Module()
    model.a = bilinear(4, 3, 2)
    model.blocks = nn.ModuleList([bilinear(4, 3, 2), bilinear(5, 3, 2), nn.Linear(2, 2)])
    model.deep = nn.ModuleDict({"b": bilinear(4, 3, 2), "again": model.a})
    return model


def chosen(configs=None, model=None) -> dict[str, object]:
    return {found.label: config for found, config in select(model or network(), configs or {"*": CP})[0]}


class TestFind:
    def test_layers_come_in_the_models_order_with_all_their_names(self):
        assert [found.names for found in find(network())] == [
            ("a", "deep.again"),
            ("blocks.0",),
            ("blocks.1",),
            ("deep.b",),
        ]

    def test_a_layer_itself_is_the_root(self):
        layer = bilinear(4, 3, 2)
        (found,) = find(layer)
        assert (found.names, found.label, found.layer) == (("",), "(root)", layer)

    def test_compressed_layers_are_not_found(self):
        assert find(DenseBilinear.from_bilinear(bilinear(4, 3, 2))) == []


class TestSelect:
    @pytest.mark.parametrize(
        ("configs", "expected"),
        [
            ({"*": CP}, ["a", "blocks.0", "blocks.1", "deep.b"]),
            ({"blocks.*": CP}, ["blocks.0", "blocks.1"]),
            ({"a": CP, "deep.b": CP}, ["a", "deep.b"]),
            ({"deep.*": CP}, ["a", "deep.b"]),  # a is deep.again too
            ({"blocks.*": None, "*": CP}, ["a", "deep.b"]),
            ({"deep.again": None, "*": CP}, ["blocks.0", "blocks.1", "deep.b"]),
            ({"*1": None, "*[0-9]": CP}, ["blocks.0"]),
        ],
        ids=str,
    )
    def test_globs_choose_and_none_leaves_alone(self, configs, expected):
        assert list(chosen(configs)) == expected

    def test_the_first_config_that_matches_holds(self):
        found = chosen({"blocks.0": CP, "blocks.*": TUCKER, "*": DENSE})
        assert found == {"a": DENSE, "blocks.0": CP, "blocks.1": TUCKER, "deep.b": DENSE}

    def test_layers_without_a_config_are_left_out(self):
        assert list(chosen({"deep.b": CP})) == ["deep.b"]

    def test_the_root_is_matched_by_a_star(self):
        assert list(chosen(model=bilinear(4, 3, 2))) == ["(root)"]

    @pytest.mark.parametrize(
        ("configs", "what"),
        [
            ({"rel.*": CP}, r"`config` pattern 'rel\.\*'"),
            ({"*": CP, "decoder": CP}, "`config` pattern 'decoder'"),
            ({"nothing": None, "*": CP}, "`config` pattern 'nothing'"),
            ({"*": None}, "should be for at least one"),
        ],
        ids=str,
    )
    def test_matching_nothing_lists_what_there_is(self, configs, what):
        listing = r".*Found: a = deep\.again \(2x4x3\), blocks\.0 \(2x4x3\), blocks\.1 \(2x5x3\), deep\.b \(2x4x3\)"
        with pytest.raises(MatchError, match=what + listing):
            chosen(configs)

    @pytest.mark.parametrize(
        ("configs", "glob", "hiding"),
        [
            ({"*": CP, "a": None}, "a", "'*'"),
            ({"*": CP, "deep.b": TUCKER}, "deep.b", "'*'"),
            ({"blocks.*": CP, "*0": TUCKER}, "*0", "'blocks.*'"),
            ({"blocks.0": CP, "*1": TUCKER, "b*": DENSE}, "b*", "'blocks.0', '*1'"),
            ({"a": CP, "deep.again": DENSE}, "deep.again", "'a'"),  # two names of one layer
        ],
        ids=str,
    )
    def test_a_glob_that_others_hide_is_an_error(self, configs, glob, hiding):
        what = f"pattern {glob!r} should be the first .* taken by {hiding} before it: put the narrower"
        with pytest.raises(MatchError, match=what.replace("*", r"\*").replace(r" .\*", " .*")):
            chosen(configs)

    @pytest.mark.parametrize("last", [{"*": DENSE}, {"deep.again": CP}], ids=str)
    def test_a_wider_glob_may_be_left_with_nothing_and_a_second_name_may_repeat_the_first(self, last):
        assert len(chosen({"a": CP, "blocks.*": TUCKER, "d*": CP} | last)) == 4

    def test_lazy_layers_are_listed_too(self):
        model = network()
        model.a.weight = nn.parameter.UninitializedParameter()
        with pytest.raises(MatchError, match=r"a = deep\.again \(lazy\)"):
            chosen({"x": CP}, model=model)

    def test_a_model_without_such_layers_is_an_error(self):
        with pytest.raises(MatchError, match="Found none in Linear"):
            chosen(model=nn.Linear(2, 2))

    def test_a_compressed_model_is_told_so(self):
        with pytest.raises(MatchError, match=r"compressed already: 0\."):
            chosen(model=nn.Sequential(DenseBilinear.from_bilinear(bilinear(4, 3, 2))))

    def test_parallel_wrappers_are_refused(self):
        with pytest.raises(CompressionError, match=r"DataParallel: compress its `\.module`"):
            chosen(model=nn.DataParallel(network()))


class OwnForward(nn.Bilinear):
    def forward(self, input1, input2):
        return 2 * super().forward(input1, input2)


class OwnCall(nn.Bilinear):
    def __call__(self, *args):
        return 2 * super().__call__(*args)


class Renamed(nn.Bilinear):
    """The same layer under another name."""


class Marked(torch.Tensor):
    """A tensor subclass."""


def replaced_by(kind):
    def change(layer):
        layer.__class__ = kind

    return change


def weight_as(convert):
    def change(layer):
        layer.weight = nn.Parameter(convert(layer.weight.detach()), requires_grad=False)

    return change


def with_value(value, name="weight"):
    def change(layer):
        with torch.no_grad():
            getattr(layer, name).view(-1)[1] = value

    return change


def twice(module, *args):
    return None


REFUSED = {
    "own forward": (replaced_by(OwnForward), "OwnForward has its own forward"),
    "own call": (replaced_by(OwnCall), "OwnCall has its own __call__"),
    "instance forward": (lambda layer: setattr(layer, "forward", twice), "forward was replaced on the instance"),
    "parametrized": (
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
        "parametrized: call .*remove_parametrizations",
    ),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "holds weight_mask, weight_orig"),
    "extra buffer": (lambda layer: layer.register_buffer("mask", torch.ones(1)), "holds mask"),
    "extra parameter": (lambda layer: setattr(layer, "gain", nn.Parameter(torch.ones(1))), "holds gain"),
    "submodule": (lambda layer: layer.add_module("inner", nn.Identity()), "holds inner"),
    "no bias entry": (lambda layer: delattr(layer, "bias"), "has no parameter bias"),
    "forward hook": (lambda layer: layer.register_forward_hook(twice), "has forward hooks"),
    "forward pre-hook": (lambda layer: layer.register_forward_pre_hook(twice), "has forward pre-hooks"),
    "backward hook": (lambda layer: layer.register_full_backward_hook(twice), "has backward hooks"),
    "backward pre-hook": (lambda layer: layer.register_full_backward_pre_hook(twice), "has backward pre-hooks"),
    "state hook": (lambda layer: layer.register_state_dict_post_hook(twice), "has state_dict hooks"),
    "state pre-hook": (lambda layer: layer.register_state_dict_pre_hook(twice), "has state_dict pre-hooks"),
    "load pre-hook": (lambda layer: layer.register_load_state_dict_pre_hook(twice), "has load_state_dict pre-hooks"),
    "load hook": (lambda layer: layer.register_load_state_dict_post_hook(twice), "has load_state_dict post-hooks"),
    "gradient hook": (lambda layer: layer.weight.register_hook(twice), "its weight has gradient hooks"),
    "bias gradient hook": (
        lambda layer: layer.bias.register_post_accumulate_grad_hook(twice),
        "its bias has gradient hooks",
    ),
    "lazy": (
        lambda layer: setattr(layer, "weight", nn.parameter.UninitializedParameter()),
        "not initialised yet: run the model once",
    ),
    "meta": (lambda layer: layer.to("meta"), "weight is on the meta device"),
    "integer": (weight_as(lambda weight: weight.to(torch.int8)), "weight is torch.int8: float32, float64"),
    "float8": (weight_as(lambda weight: weight.to(torch.float8_e4m3fn)), "weight is torch.float8_e4m3fn"),
    "subclass": (
        weight_as(lambda weight: weight.as_subclass(Marked)),
        "is a Marked, torch.strided: a plain dense tensor",
    ),
    "sparse": (weight_as(lambda weight: weight.to_sparse()), "weight is a Tensor, torch.sparse_coo"),
    "nan": (with_value(torch.nan), "weight has 1 values that are NaN or infinite"),
    "infinite": (with_value(-torch.inf), "weight has 1 values that are NaN or infinite"),
    "infinite bias": (with_value(torch.inf, "bias"), "bias has 1 values that are NaN or infinite"),
    "other shape": (weight_as(lambda weight: weight[:1]), r"weight has shape \(1, 4, 3\), where its features say \(2"),
}


class TestRefusal:
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_a_replacement_would_change_is_refused(self, case):
        change, reason = REFUSED[case]
        layer = bilinear(4, 3, 2)
        change(layer)
        model = nn.ModuleDict({"rel": layer})
        found = reason_against(FoundLayer(("rel",), layer), discovery.parameter_owners(model))
        assert re.search(reason, found)

    @pytest.mark.parametrize("owner", [nn.Linear(4, 3), bilinear(4, 3, 2, seed=1)], ids=["another kind", "same kind"])
    def test_tied_weights_are_refused(self, owner):
        layer = bilinear(4, 3, 2)
        owner.weight = layer.weight
        model = nn.ModuleDict({"rel": layer, "other": owner})
        reason = reason_against(FoundLayer(("rel",), layer), discovery.parameter_owners(model))
        assert reason.startswith("its weight is tied (rel.weight = other.weight)")

    @pytest.mark.parametrize(
        "layer",
        [
            bilinear(4, 3, 2),
            bilinear(4, 3, 2, bias=False),
            bilinear(1, 1, 1, dtype=torch.bfloat16),
            Renamed(4, 3, 2),
            bilinear(4, 3, 2).requires_grad_(False).eval(),
        ],
    )
    def test_plain_layers_are_not(self, layer):
        model = nn.ModuleDict({"rel": layer, "again": layer})  # two names are one owner
        assert reason_against(FoundLayer(("rel", "again"), layer), discovery.parameter_owners(model)) is None

    def test_tied_biases_are_not(self):
        layer, other = bilinear(4, 3, 2), nn.Linear(2, 2)
        other.bias = layer.bias
        owners = discovery.parameter_owners(nn.ModuleDict({"rel": layer, "other": other}))
        assert reason_against(FoundLayer(("rel",), layer), owners) is None

    def test_values_can_be_left_out_of_account(self):
        layer = bilinear(4, 3, 2).to("meta")
        assert reason_against(FoundLayer(("rel",), layer), {}, values=False) is None


def test_a_subclass_with_more_methods_is_refused():
    class Scored(nn.Bilinear):
        def score(self, x1, x2):
            return self(x1, x2).sum()

    layer = Scored(4, 3, 2)
    assert "own score" in reason_against(FoundLayer(("rel",), layer), {})


def test_a_subclass_with_a_constructor_of_its_own_is_not():
    class Square(nn.Bilinear):
        def __init__(self, size):
            super().__init__(size, size, size)

    assert reason_against(FoundLayer(("rel",), Square(4)), {}) is None


class TestPlainReference:
    @pytest.mark.parametrize(
        "held",
        [
            lambda layer: [layer],
            lambda layer: (1, layer),
            lambda layer: {"it": layer},
            lambda layer: {layer},
            lambda layer: [[layer]],
            lambda layer: {"all": [layer]},
        ],
        ids=["list", "tuple", "dict", "set", "list of lists", "dict of lists"],
    )
    def test_containers_that_hold_the_layer_are_found(self, held):
        model = nn.Sequential(nn.Module())
        model[0].rel = bilinear(4, 3, 2)
        model[0].kept = held(model[0].rel)
        assert reference(model, {id(model[0].rel)}) == "the attribute '0.kept'"

    def test_an_attribute_is_found(self):
        model = network()
        object.__setattr__(model, "first", model.a)
        assert reference(model, {id(model.a)}) == "the attribute 'first'"

    def test_registered_submodules_are_none(self):
        model = network()
        model.numbers = [1, 2]
        assert reference(model, {id(model.a)}) is None


def test_a_layer_that_a_partial_holds_is_a_plain_reference():
    model = nn.Module()
    model.rel = nn.Bilinear(4, 3, 2)
    model.score = functools.partial(torch.vmap, model.rel)
    assert "'score'" in reference(model, {id(model.rel)})
