"""Registered adapters: what an author states, how it is verified, and that a foreign module is replaced as a layer."""

import copy
import pickle

import forms
import pytest
import torch
from support import assert_same_state, state_of
from torch import nn
from torch.nn.utils import parametrize

import compress_bilinear as cb
from compress_bilinear.modules import adapted_module, find
from compress_bilinear.modules.adapters import _adapter

INT8 = cb.DenseConfig(quantize="int8")
SCORER = {"scorer": INT8}
FAST = {"measure_latency": False}


class Scorer(nn.Module):
    """A weight that is normalised, parts that stay, and a bias: (N,), (N,) -> (N,)."""

    def __init__(self):
        super().__init__()
        self.relations = nn.Embedding(6, 25)
        self.entities = nn.Embedding(9, 5)
        self.norm = nn.BatchNorm1d(5)
        self.offset = nn.Parameter(torch.randn(5))

    def forward(self, heads, relations, *, scale=1.0):
        matrices = nn.functional.normalize(self.relations(relations), dim=-1).view(-1, 5, 5)
        head = self.norm(self.entities(heads))
        return scale * (torch.bmm(head.unsqueeze(1), matrices).squeeze(1) + self.offset)


class Gated(nn.Module):
    """A flat weight on an outer product, and an nn.Bilinear of its own."""

    def __init__(self):
        super().__init__()
        self.gate, self.out = nn.Bilinear(16, 16, 16), nn.Linear(16 * 16, 8)

    def forward(self, x, y):
        x = x * self.gate(x, y).sigmoid()
        return self.out((x.unsqueeze(2) * y.unsqueeze(1)).flatten(1))


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(16, 16, 8, bias=False)

    def forward(self, x, y):
        return self.inner(x, y).tanh()


class User(nn.Module):
    """Uses the weight of a table that it may not hold."""

    def __init__(self, held):
        super().__init__()
        self.lin, self.held = nn.Linear(6, 6), held

    def forward(self, x, y):
        table = self.held[0] if isinstance(self.held, list) else self.held
        return torch.einsum("ni,oij,nj->no", self.lin(x), table.weight.view(7, 6, 5), y)


class Both(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.table = nn.Embedding(7, 30)
        self.user = User(held(self.table))

    def forward(self, x, y):
        return self.user(x, y)


class Unregistered(Scorer):
    """A subclass, for which the registration of its base does not hold."""


def scorer_call(module, layer, heads, relations, *, scale=1.0):
    return scale * layer.indexed(module.norm(module.entities(heads)), relations)


def scorer_weight(module):
    return nn.functional.normalize(module.relations.weight, dim=-1).view(-1, 5, 5).permute(2, 1, 0)


def scorer_example(module):
    return torch.arange(4), torch.arange(4)


def register_scorer(**changes):
    stated = {"to_weight": scorer_weight, "call": scorer_call, "to_bias": lambda module: module.offset}
    cb.register_adapter(Scorer, **stated | {"example": scorer_example} | changes)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.scorer = Scorer()
        self.biaffine = forms.Biaffine(5, 5, 4)
        self.plain = nn.Bilinear(5, 5, 4)

    def forward(self, heads, relations):
        queries = self.scorer(heads, relations, scale=2.0)
        return self.plain(queries, queries), self.biaffine(queries[None], queries[None])


def network():
    torch.manual_seed(0)
    return Network().eval()


BATCHES = [(torch.arange(9) % 9, torch.arange(9) % 6)]


def outputs(model, batch=BATCHES[0]):
    with torch.no_grad():
        return model(*batch)


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


class TestAll:
    def test_the_three_kinds_are_found_with_their_shapes(self):
        register_scorer()
        found = {layer.label: (layer.form, tuple(layer.layer.weight.shape)) for layer in find(network())}
        assert found == {
            "scorer": ("Scorer", (5, 5, 6)),
            "biaffine": ("Biaffine", (4, 6, 6)),
            "plain": ("nn.Bilinear", (4, 5, 5)),
        }

    @pytest.mark.parametrize(
        ("config", "inplace"),
        [(INT8, True), (cb.CPConfig(rank=4), False), (cb.TuckerConfig(rank=(4, 4, 5), quantize="int8"), False)],
        ids=["dense", "cp", "tucker"],
    )
    def test_compressing_saving_and_loading(self, config, inplace, tmp_path):
        register_scorer()
        model = network()
        exact, before = outputs(model), state_of(model)
        small, report = cb.compress(
            model, {"plain": None, "*": config}, calibration=BATCHES, inplace=inplace, force=True, **FAST
        )
        assert (small is model) == inplace
        assert [layer.decision for layer in report.layers] == ["replaced", "replaced"]
        assert [layer.form for layer in report.layers] == ["Scorer", "Biaffine"]
        assert isinstance(small.scorer, Scorer)
        assert all(layer.calibration_rows > 0 for layer in report.layers)
        if not inplace:
            assert_same_state(model, before)
            assert_equal(outputs(model), exact)
        for error, one, other in zip((1, 1), outputs(small), exact, strict=True):
            assert float((one - other).norm() / other.norm()) < error
        cb.save(small, tmp_path / "small.safetensors")
        assert_equal(outputs(cb.load(tmp_path / "small.safetensors", network())), outputs(small))
        with torch.device("meta"):
            empty = Network().eval()
        assert_equal(outputs(cb.load(tmp_path / "small.safetensors", empty)), outputs(small))
        assert_equal(outputs(copy.deepcopy(small)), outputs(small))

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_they_are_found_where_no_graph_is_recorded(self, context):
        register_scorer()
        model = network()
        with context():
            assert [layer.label for layer in find(model)] == ["scorer", "biaffine", "plain"]

    def test_exact_layers_give_the_modules_outputs(self):
        register_scorer()
        model = network().double()
        small, report = cb.compress(model, cb.DenseConfig(), calibration=BATCHES, force=True, **FAST)
        assert [layer.decision for layer in report.layers] == ["replaced"] * 3
        for one, other in zip(outputs(small), outputs(model), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

    def test_the_report_measures_the_modules_own_forward(self):
        register_scorer()
        _, report = cb.compress(network(), SCORER, calibration=BATCHES)
        (layer,) = report.layers
        assert layer.batch_size == 9
        assert layer.dense_order in ("Scorer", "DenseBilinear")
        assert 0 < layer.output_error < 0.05
        assert "scorer: is a Scorer" in str(report)
        assert cb.Report.from_json(report.to_json()) == report

    def test_gradients_reach_the_new_factors_and_what_stayed(self):
        register_scorer()
        small, _ = cb.compress(network(), cb.CPConfig(rank=3), calibration=BATCHES, force=True, **FAST)
        sum(output.square().sum() for output in small(*BATCHES[0])).backward()
        assert all(parameter.grad is not None for parameter in small.parameters())
        assert not any("relations" in name or name == "scorer.offset" for name, _ in small.named_parameters())

    def test_a_root_of_another_form_and_its_other_parts(self, tmp_path):
        register_scorer()
        torch.manual_seed(0)
        model = Scorer().eval()
        small, report = cb.compress(model, INT8, **FAST)
        assert report.layers[0].label == "(root)"
        cb.save(small, tmp_path / "root.safetensors")
        assert torch.equal(outputs(cb.load(tmp_path / "root.safetensors", Scorer().eval())), outputs(small))
        with pytest.raises(cb.CompressionError, match="itself"):
            cb.compress(model, INT8, inplace=True, **FAST)

    def test_pickling_and_storing_otherwise(self):
        register_scorer()
        small, _ = cb.compress(network(), INT8, calibration=BATCHES, **FAST)
        assert_equal(outputs(pickle.loads(pickle.dumps(small.biaffine)), [torch.ones(1, 2, 5)] * 2),
                     outputs(small.biaffine, [torch.ones(1, 2, 5)] * 2))  # fmt: skip
        tuned = cb.dequantize(small)
        assert tuned.biaffine.compressed.quantize is None
        for one, other in zip(outputs(tuned), outputs(small), strict=True):
            torch.testing.assert_close(one, other)

    def test_an_adapter_of_lambdas_is_pickled_by_its_class(self, tmp_path, monkeypatch):
        cb.register_adapter(
            Scorer,
            to_weight=lambda module: scorer_weight(module),
            to_bias=lambda module: module.offset,
            call=lambda module, layer, *args, **options: scorer_call(module, layer, *args, **options),
            example=lambda module: scorer_example(module),
        )
        torch.manual_seed(0)
        small, report = cb.compress(nn.ModuleDict({"scorer": Scorer().eval()}), INT8, force=True, **FAST)
        assert report.layers[0].decision == "replaced", report.layers[0].reason
        torch.save(small, tmp_path / "whole.pt")
        loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
        for other in (loaded, copy.deepcopy(small)):
            assert torch.equal(outputs(other["scorer"]), outputs(small["scorer"]))
        monkeypatch.delitem(_adapter.REGISTERED, Scorer)
        with pytest.raises(cb.CompressionError, match="Scorer should be registered by `register_adapter`"):
            torch.load(tmp_path / "whole.pt", weights_only=False)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_a_bilinear_layer_inside_is_replaced_in_its_own_right(self, inplace, tmp_path):
        def net():
            torch.manual_seed(0)
            return nn.ModuleDict({"fusion": Gated()}).eval()

        cb.register_adapter(
            Gated,
            to_weight=lambda module: module.out.weight.view(8, 16, 16),
            to_bias=lambda module: module.out.bias,
            call=lambda module, layer, x, y: layer(x * module.gate(x, y).sigmoid(), y),
            example=lambda module: (torch.randn(9, 16), torch.randn(9, 16)),
        )
        small, report = cb.compress(net(), INT8, inplace=inplace, **FAST)
        assert [layer.decision for layer in report.layers] == ["replaced", "replaced"]
        assert (type(small["fusion"].gate), type(small["fusion"].compressed)) == (cb.DenseBilinear, cb.DenseBilinear)
        x, y = torch.randn(5, 16), torch.randn(5, 16)
        with torch.no_grad():
            torch.testing.assert_close(small["fusion"](x, y), net()["fusion"](x, y), rtol=0.1, atol=0.1)
        cb.save(small, tmp_path / "gated.safetensors")
        loaded = cb.load(tmp_path / "gated.safetensors", net())
        assert torch.equal(loaded["fusion"](x, y), small["fusion"](x, y))

    def test_a_layer_whose_own_weight_the_adapter_reads_is_left_to_one_of_the_two(self):
        cb.register_adapter(
            Wrapped,
            to_weight=lambda module: module.inner.weight,
            call=lambda module, layer, x, y: layer(x, y).tanh(),
            example=lambda module: (torch.randn(9, 16), torch.randn(9, 16)),
        )
        _, report = cb.compress(nn.ModuleDict({"one": Wrapped()}), INT8, **FAST)
        assert "its weight is that of a bilinear layer in it, 'inner'" in report.layers[0].reason

    def test_shared_modules_stay_shared(self, tmp_path):
        def build():
            torch.manual_seed(0)
            model = nn.Module()
            model.first = model.second = forms.Biaffine(5, 5, 4)
            return model

        small, report = cb.compress(build(), INT8, **FAST)
        assert small.first is small.second
        assert report.layers[0].aliases == ("second",)
        cb.save(small, tmp_path / "shared.safetensors")
        again = cb.load(tmp_path / "shared.safetensors", build())
        assert again.first is again.second

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_narrow_dtypes(self, dtype):
        module = nn.Sequential(forms.Biaffine(6, 6, 3)).to(dtype)
        small, report = cb.compress(module, cb.CPConfig(rank=5), force=True, **FAST)
        assert report.layers[0].decision == "replaced"
        assert small[0](*[torch.ones(1, 2, 6, dtype=dtype)] * 2).dtype == dtype

    def test_ties_of_a_bias_survive(self, tmp_path):
        register_scorer()

        def build():
            model = network()
            model.tied = nn.Module()
            model.tied.offset = model.scorer.offset
            return model

        model = build()
        small, _ = cb.compress(model, SCORER, calibration=BATCHES, **FAST)
        assert small.scorer.compressed.bias is small.tied.offset
        cb.save(small, tmp_path / "tied.safetensors")
        again = cb.load(tmp_path / "tied.safetensors", build())
        assert again.scorer.compressed.bias is again.tied.offset


class TestRefusals:
    def kept(self, **options):
        model = network()
        before = state_of(model)
        _, report = cb.compress(model, SCORER, force=True, **FAST | options)
        assert_same_state(model, before)
        assert report.layers[0].decision == "kept"
        return report.layers[0].reason

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"call": lambda m, layer, h, r: 2 * scorer_call(m, layer, h, r)}, "differ by 1 of the largest output"),
            ({"call": lambda m, layer, h, r: m.relations(r)}, "'CompressedScorer' object has no attribute 'relations'"),
            ({"call": lambda m, layer, h, r: None}, "is not its own forward"),
            ({"call": lambda m, layer, h: h}, "TypeError"),
            ({"call": lambda m, layer, h, r: m(h, r)}, "`call`"),
            ({"example": lambda m: m.nothing}, "`example` of the adapter 'Scorer' failed: AttributeError"),
            ({"example": None}, "pass `calibration`, or register the adapter with an `example`"),
            ({"to_weight": lambda m: scorer_weight(m).transpose(0, 1)}, "differ by"),
            ({"to_bias": None}, "differ by"),
        ],
    )
    def test_a_call_that_is_not_the_forward_is_refused_and_why(self, changes, told):
        register_scorer(**changes)
        assert told in self.kept()

    def test_calibration_verifies_too(self):
        register_scorer(call=lambda m, layer, h, r, scale=1.0: scorer_call(m, layer, h, r), example=None)
        assert "differ by" in self.kept(calibration=BATCHES)  # the network's scale of 2 is forgotten

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"to_weight": lambda m: m.relations.weight}, r"floating \(out, in1, in2\). Found \(6, 25\)"),
            ({"to_weight": lambda m: scorer_weight(m).detach()}, "by differentiable operations"),
            ({"to_weight": lambda m: m.missing}, "`to_weight` of the adapter 'Scorer' failed: AttributeError"),
            ({"to_weight": lambda m: 3}, r"floating \(out, in1, in2\). Found 3"),
            ({"to_bias": lambda m: m.entities.weight[0, :2]}, r"shape \(5,\). Found \(2,\)"),
        ],
    )
    def test_an_adapter_that_does_not_fit_is_an_error(self, changes, told):
        register_scorer(**changes)
        with pytest.raises(cb.CompressionError, match=told):
            cb.compress(network(), INT8, **FAST)

    @pytest.mark.parametrize(
        ("spoil", "told"),
        [
            (lambda m: m.scorer.register_forward_hook(lambda *a: None), "forward hooks"),
            (lambda m: m.scorer.relations.register_forward_hook(lambda *a: None), "forward hooks"),
            (lambda m: setattr(m.scorer, "forward", lambda h, r, scale: h), "replaced on the instance"),
            (lambda m: setattr(m.scorer, "compressed", 3), "an attribute 'compressed' already"),
            (
                lambda m: setattr(m, "tied", m.scorer.relations),
                "held by tied too: register the class of a module that contains both",
            ),
            (lambda m: parametrize.register_parametrization(m.scorer.relations, "weight", nn.Identity()), "parametriz"),
            (lambda m: m.scorer.relations.weight.data.fill_(torch.nan), "NaN"),
        ],
    )
    def test_unfaithful_replacements_are_refused(self, spoil, told):
        register_scorer()
        model = network()
        spoil(model)
        _, report = cb.compress(model, SCORER, force=True, **FAST)
        assert report.layers[0].decision == "kept"
        assert told in report.layers[0].reason

    def test_a_weight_that_another_module_holds_needs_one_that_contains_both(self):
        model = nn.ModuleDict({"table": Wrapped(), "user": Unregistered()})
        model["user"].owner = [model["table"]]  # no part of it
        cb.register_adapter(Unregistered, to_weight=lambda m: m.owner[0].inner.weight, call=scorer_call)
        try:
            with pytest.raises(cb.CompressionError, match="register the class of a module that contains both"):
                cb.compress(model, INT8, **FAST)
        finally:
            _adapter.REGISTERED.pop(Unregistered)

    @pytest.mark.parametrize("held", [lambda table: table, lambda table: [table]], ids=["submodule", "plain list"])
    @pytest.mark.parametrize("inplace", [False, True])
    def test_the_class_of_a_module_that_contains_both_is_replaced(self, tmp_path, held, inplace):
        torch.manual_seed(0)
        rows = torch.randn(4, 6), torch.randn(4, 5)
        cb.register_adapter(
            Both,
            to_weight=lambda m: m.table.weight.view(7, 6, 5),
            call=lambda m, layer, x, y: layer(m.user.lin(x), y),
            example=lambda m: rows,
        )
        try:
            model = nn.ModuleDict({"net": Both(held)}).eval()
            expected = model["net"](*rows)
            small, report = cb.compress(model, INT8, force=True, inplace=inplace, **FAST)
            cb.save(small, tmp_path / "small.safetensors")
            loaded = cb.load(tmp_path / "small.safetensors", nn.ModuleDict({"net": Both(held)}).eval())
        finally:
            _adapter.REGISTERED.pop(Both)
        assert report.layers[0].decision == "replaced"
        assert not any("table" in name for name in small.state_dict())
        assert (small["net"](*rows) - expected).norm() < 0.02 * expected.norm()
        assert torch.equal(loaded["net"](*rows), small["net"](*rows))

    def test_a_plan_goes_stale(self):
        register_scorer()
        model = network()
        planned = cb.plan(model, SCORER, **FAST)
        with torch.no_grad():
            model.scorer.relations.weight.mul_(torch.linspace(1, 2, 25))
        with pytest.raises(cb.CompressionError, match="weight or bias has changed"):
            planned.apply()

    def test_a_seeming_form_is_named(self):
        with pytest.raises(
            cb.CompressionError, match=r"`W` \(.*\), of 3 axes, but its forward is no form .* write cb.register_adapter"
        ):
            cb.compress(nn.Sequential(forms.Relu(4, 4, 4)), INT8, **FAST)

    def test_subclasses_are_not_meant(self):
        register_scorer()
        assert adapted_module(Unregistered()) is None

    @pytest.mark.parametrize(
        "arguments",
        [
            {"kind": nn.Bilinear},
            {"kind": cb.CPBilinear},
            {"kind": 3},
            {"to_weight": None},
            {"call": "forward"},
            {"example": (1, 2)},
        ],
    )
    def test_wrong_registrations(self, arguments):
        stated = {"kind": Scorer, "to_weight": scorer_weight, "call": scorer_call} | arguments
        with pytest.raises(cb.CompressionError, match=r"should be a (class|function)"):
            cb.register_adapter(stated.pop("kind"), **stated)

    def test_loading_needs_the_registration_and_the_same_form(self, tmp_path):
        register_scorer()
        small, _ = cb.compress(network(), {"plain": None, "*": INT8}, calibration=BATCHES, **FAST)
        cb.save(small, tmp_path / "small.safetensors")
        other = network()
        other.biaffine = forms.Biaffine(6, 5, 4, (False, True))
        before = state_of(other)
        with pytest.raises(cb.CompressionError, match="of the form 'pairs oij -> oxy, 1 last in input1, 1 last"):
            cb.load(tmp_path / "small.safetensors", other)
        assert_same_state(other, before)
        unregistered = network()
        unregistered.scorer = Unregistered()
        with pytest.raises(cb.CompressionError, match="Is its class registered"):
            cb.load(tmp_path / "small.safetensors", unregistered)

    def test_a_compressed_module_is_not_found_again(self):
        register_scorer()
        small, _ = cb.compress(network(), INT8, calibration=BATCHES, **FAST)
        with pytest.raises(cb.CompressionError, match=r"compressed already: scorer\.compressed"):
            cb.plan(small, INT8)


class TestWholeNetwork:
    """What looks at the network as a whole takes adapted modules as it takes `nn.Bilinear`."""

    batches = tuple((torch.arange(40) * (k + 1) % 9, torch.arange(40) % 6) for k in range(4))

    def test_refining_on_the_networks_outputs_leaves_the_original_alone(self):
        register_scorer()
        model = network()
        before = state_of(model)
        config = cb.CPConfig(rank=4)
        small, report = cb.compress(
            model, config, calibration=self.batches, refine="network", max_seconds=2, force=True, **FAST
        )
        assert [layer.decision for layer in report.layers] == ["replaced"] * 3
        assert_same_state(model, before)
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.requires_grad for parameter in small.parameters())

    def test_a_loss_and_an_automatic_choice(self):
        register_scorer()

        def loss(model, batch):
            return sum(output.square().mean() for output in model(*batch))

        options = {"calibration": self.batches, "loss_fn": loss, "max_seconds": 3}
        small, report = cb.compress(network(), cb.AutoConfig(size=0.5), **options | FAST)
        assert {layer.form for layer in report.layers} == {"Scorer", "Biaffine", "nn.Bilinear"}
        assert any(layer.decision == "replaced" for layer in report.layers)
        assert all(bool(torch.isfinite(output).all()) for output in outputs(small))
