import copy
import json
import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from support import assert_matches_reference, assert_same_state, bilinear, low_rank, state_of
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import compress_bilinear as cb
from compress_bilinear.decomposition import Budget
from compress_bilinear.decomposition._als import Sweeper
from compress_bilinear.errors import CompressionError, ConfigError, MatchError, StalePlanError
from compress_bilinear.fitting import Latency, Timing, stored_bytes
from compress_bilinear.modules.adapters._adapter import REGISTERED
from compress_bilinear.planning import _execute, _planner, _verdict

IN1, IN2, OUT = 12, 10, 8
TUCKER = cb.TuckerConfig(rank=(3, 4, 4))
INT8 = cb.DenseConfig(quantize="int8")


def planted(seed: int = 0, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Bilinear:
    """A layer of rank 3, plus noise."""
    layer = bilinear(IN1, IN2, OUT, bias=bias, dtype=dtype, seed=seed)
    with torch.no_grad():
        layer.weight.copy_(low_rank((OUT, IN1, IN2), 3, noise=0.05, seed=seed))
    return layer


class Net(nn.Module):
    """A layer, one in a nested container, and one under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = planted(1)
        self.nested = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Sequential(planted(2))])})
        self.one = self.other = planted(3)
        self.head = nn.Linear(OUT, 5)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        inner = self.nested["blocks"][1][0]
        return self.head(self.first(x1, x2) + inner(x1, x2) + self.one(x1, x2) + self.other(x1, x2))


NAMES = ["first", "nested.blocks.1.0", "one"]


def rows(count: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(count, size, generator=generator).to(dtype) for size in (IN1, IN2))


def run(function, *args, **options):
    """`plan` or `compress`, without timing."""
    return function(*args, **{"measure_latency": False} | options)


def compressed(model, config=TUCKER, **options) -> nn.Module:
    return run(cb.compress, model, config, **options)[0]


def decisions(report: cb.Report) -> dict[str, str]:
    return {layer.name: layer.decision for layer in report.layers}


def reason(model, config=TUCKER, name="first", **options) -> str:
    """Why the named layer is kept."""
    (layer,) = (layer for layer in run(cb.plan, model, config, **options).report.layers if layer.name == name)
    assert layer.decision == "kept"
    return layer.reason


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture(params=[False, True], ids=["copy", "inplace"])
def inplace(request) -> bool:
    return request.param


class TestSelecting:
    def test_one_config_holds_for_all(self, net, inplace):
        new, report = run(cb.compress, net, TUCKER, inplace=inplace)
        assert decisions(report) == dict.fromkeys(NAMES, "replaced")
        assert all(isinstance(new.get_submodule(name), cb.TuckerBilinear) for name in [*NAMES, "other"])
        assert not any(isinstance(part, nn.Bilinear) for part in new.modules())

    def test_of_a_mapping_the_first_match_holds(self, net):
        config = {"nested.*": cb.CPConfig(rank=3), "*first": TUCKER, "*": INT8}
        report = run(cb.plan, net, config).report
        assert {layer.name: (layer.method, layer.quantize) for layer in report.layers} == {
            "first": ("tucker", None),
            "nested.blocks.1.0": ("cp", None),
            "one": ("dense", "int8"),
        }

    def test_none_leaves_layers_alone(self, net):
        new, _ = run(cb.compress, net, {"nested*": None, "first": TUCKER})
        assert isinstance(new.first, cb.TuckerBilinear)
        assert isinstance(new.one, nn.Bilinear)
        assert isinstance(new.nested["blocks"][1][0], nn.Bilinear)

    @pytest.mark.parametrize("config", [TUCKER, None])
    def test_matching_nothing_lists_the_layers(self, net, config):
        with pytest.raises(MatchError, match=r"first .*one = other"):
            run(cb.compress, net, {"decoder.*": config, "*": TUCKER})

    @pytest.mark.parametrize("function", [cb.plan, cb.compress])
    @pytest.mark.parametrize(("name", "hint"), [("batchsize", "batch_size"), ("include", None)])
    def test_an_unknown_option_is_a_mistake(self, net, function, name, hint):
        with pytest.raises(TypeError, match=f"{name}.*PlanOptions.*{f'Did you mean {hint}' if hint else ''}"):
            function(net, TUCKER, **{name: 1})

    @pytest.mark.parametrize("calibration", [5, "rows.npy", {"x1": torch.ones(2)}], ids=["int", "str", "dict"])
    def test_calibration_is_an_iterable_of_batches(self, net, calibration):
        with pytest.raises(ConfigError, match=f"an iterable of batches.* Found {type(calibration).__name__}"):
            run(cb.plan, net, TUCKER, calibration=calibration)

    def test_a_batch_instead_of_batches_is_told_how_to_be_one(self, net):
        with pytest.raises(cb.CompressionError, match=r"`\[\(x1, x2\)\]` is a single batch .* Found a tensor"):
            run(cb.plan, net, TUCKER, calibration=rows())

    def test_the_root_is_replaced_in_the_copy_only(self):
        layer, batch = planted(), rows()
        new, report = run(cb.compress, layer, TUCKER)
        assert isinstance(new, cb.TuckerBilinear)
        assert report.layers[0].label == "(root)"
        with torch.no_grad():
            assert float((new(*batch) - layer(*batch)).norm() / layer(*batch).norm()) < 0.2
        with pytest.raises(cb.CompressionError, match="use what `inplace=False` returns"):
            run(cb.compress, layer, TUCKER, inplace=True)

    @pytest.mark.parametrize("config", [3, {}, {"*": "tucker"}, {3: TUCKER}, None], ids=str)
    def test_configs_are_configs(self, net, config):
        with pytest.raises(ConfigError, match="`config` should"):
            run(cb.plan, net, config)

    @pytest.mark.parametrize("size", [0, -1, 2.0, True])
    def test_batch_sizes_are_positive(self, net, size):
        with pytest.raises(ConfigError, match="`batch_size` should be a positive int"):
            run(cb.plan, net, TUCKER, batch_size=size)

    def test_models_are_modules(self):
        with pytest.raises(ConfigError, match=r"should be an nn.Module. Found dict"):
            run(cb.plan, {}, TUCKER)

    def test_parallel_wrappers_are_refused(self, net):
        with pytest.raises(cb.CompressionError, match=r"compress its `\.module`"):
            run(cb.plan, nn.DataParallel(net), TUCKER)

    def test_a_compressed_model_is_told_so(self, net):
        with pytest.raises(MatchError, match=r"compressed already: first, nested\.blocks\.1\.0, one\."):
            run(cb.plan, compressed(net), TUCKER)


class TestSharing:
    def test_a_shared_layer_is_replaced_once_and_stays_shared(self, net, inplace):
        new, report = run(cb.compress, net, TUCKER, inplace=inplace)
        assert new.one is new.other
        assert report.layers[2].aliases == ("other",)

    def test_a_layer_in_a_plain_list_is_refused_inplace_and_followed_in_a_copy(self, net):
        net.kept = [net.first]
        before = state_of(net)
        with pytest.raises(cb.CompressionError, match=r"the attribute 'kept'.*use `inplace=False`"):
            run(cb.compress, net, TUCKER, inplace=True)
        assert_same_state(net, before)
        new = compressed(net)
        assert new.kept[0] is new.first
        assert isinstance(new.first, cb.TuckerBilinear)

    def test_no_container_is_too_deep(self, net):
        net.kept = {"all": [net.first]}
        with pytest.raises(cb.CompressionError, match="'kept'"):
            run(cb.compress, net, TUCKER, inplace=True)

    def test_tied_weights_are_kept(self, net):
        net.first.weight = net.one.weight
        assert "tied (first.weight = one.weight)" in reason(net)

    def test_a_tied_bias_stays_tied(self, net, inplace):
        net.head = nn.Linear(OUT, OUT)
        net.head.bias = net.first.bias = net.one.bias
        new = compressed(net, inplace=inplace)
        assert new.head.bias is new.first.bias is new.one.bias is new.other.out_proj.bias
        assert (new.head.bias is net.head.bias) == inplace

    def test_inplace_a_bias_keeps_its_identity(self, net):
        bias = net.first.bias
        compressed(net, inplace=True)
        assert net.first.bias is bias

    def test_layers_without_bias_stay_without(self, inplace):
        new = compressed(nn.Sequential(planted(bias=False)), inplace=inplace)
        assert new[0].bias is None


def twice(input1, input2):
    return 2 * torch.nn.functional.bilinear(input1, input2, torch.ones(OUT, IN1, IN2))


class Doubled(nn.Bilinear):
    def forward(self, input1, input2):
        return 2 * super().forward(input1, input2)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda layer: setattr(layer, "__class__", Doubled), "own forward"),
        (lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()), "parametrized"),
        (lambda layer: layer.register_forward_hook(lambda *args: None), "forward hooks"),
        (lambda layer: setattr(layer, "forward", twice), "forward was replaced on the instance"),
        (lambda layer: setattr(layer, "weight", nn.parameter.UninitializedParameter()), "not initialised"),
        (lambda layer: layer.to("meta"), "meta device"),
        (lambda layer: nn.init.constant_(layer.weight, torch.nan), "NaN or infinite"),
        (lambda layer: nn.init.constant_(layer.bias, torch.inf), "NaN or infinite"),
        (lambda layer: nn.init.zeros_(layer.weight), "all zero"),
    ],
    ids=["subclass", "parametrized", "hook", "forward", "lazy", "meta", "nan", "inf", "zero"],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_layer_that_cannot_be_replaced_faithfully_is_kept_and_the_others_are_not(net, inplace, change, why, force):
    change(net.first)
    kept = net.first
    new, report = run(cb.compress, net, TUCKER, inplace=inplace, force=force)
    assert decisions(report) == {NAMES[0]: "kept", NAMES[1]: "replaced", NAMES[2]: "replaced"}
    assert why in report.layers[0].reason
    assert type(new.first) is type(kept)
    assert (new.first is kept) == inplace


def test_a_pruned_layer_is_kept_and_hinders_copying_as_torch_does(net):
    prune.l1_unstructured(net.first, "weight", 0.5)
    with pytest.raises(cb.CompressionError, match="could not be copied"):
        compressed(net)
    report = run(cb.compress, net, TUCKER, inplace=True)[1]
    assert "weight_mask" in report.layers[0].reason
    assert isinstance(net.one, cb.TuckerBilinear)


class TestFlags:
    @pytest.mark.parametrize("when", ["before", "between"])
    @pytest.mark.parametrize("quantize", [None, "int8"])
    def test_gradient_and_mode_flags_are_those_at_applying(self, net, inplace, when, quantize):
        def change():
            net.first.weight.requires_grad_(False)
            net.first.bias.requires_grad_(True)
            net.one.bias.requires_grad_(False)
            net.one.eval()

        if when == "before":
            change()
        planned = run(cb.plan, net, cb.TuckerConfig(rank=(3, 4, 4), quantize=quantize))
        if when == "between":
            change()
        new, _ = planned.apply(inplace)
        weights = [
            {p.requires_grad for name, p in layer.named_parameters() if name.endswith("weight")}
            for layer in (new.first, new.one)
        ]
        assert weights == ([{False}, {True}] if quantize is None else [set(), set()])
        assert (new.first.bias.requires_grad, new.one.bias.requires_grad) == (True, False)
        assert [part.training for part in new.first.modules()].count(False) == 0
        assert [part.training for part in new.one.modules()].count(True) == 0
        assert net.head.training

    def test_a_compressed_model_trains(self, net, inplace):
        new, batch = compressed(net, inplace=inplace), rows(64)
        target = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.Adam(new.parameters(), lr=1e-2)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            losses.append(nn.functional.mse_loss(new(*batch), target))
            losses[-1].backward()
            optimizer.step()
        assert float(losses[-1].detach()) < 0.5 * float(losses[0].detach())
        assert all(parameter.grad is not None for parameter in new.first.parameters())


@pytest.mark.parametrize("bias", [torch.ones(1), torch.ones(OUT, 1)], ids=["one", "column"])
def test_a_layer_with_a_bias_of_another_shape_is_kept(net, bias):
    net.first.bias = nn.Parameter(bias)
    assert f"its bias has shape {tuple(bias.shape)}" in reason(net)


def test_a_copy_that_is_no_copy_is_an_error():
    class Stubborn(Net):
        def __deepcopy__(self, memo):
            return self

    model = Stubborn()
    before = state_of(model)
    with pytest.raises(CompressionError, match="__deepcopy__"):
        compressed(model)
    assert_same_state(model, before)
    assert type(model.first) is nn.Bilinear


@pytest.mark.parametrize("inplace", [False, True])
def test_an_absorbed_output_needs_no_bias(inplace):
    model = nn.Sequential(bilinear(9, 8, 2, bias=False))
    new, report = run(cb.compress, model, cb.TuckerConfig(rank=(2, 3, 3)), inplace=inplace)
    assert report.layers[0].decision == "replaced"
    assert new[0].bias is None


class TestCopying:
    def test_a_copy_leaves_the_original_bit_for_bit(self, net):
        before, parts, batch = state_of(net), dict(net.named_modules()), rows()
        output = net(*batch)
        new = compressed(net)
        assert_same_state(net, before)
        assert dict(net.named_modules()) == parts
        assert torch.equal(net(*batch), output)
        shared = {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in new.parameters()}
        assert not shared

    def test_inplace_changes_the_model_itself(self, net):
        head = net.head
        assert compressed(net, inplace=True) is net
        assert net.head is head

    def test_both_ways_give_the_same_outputs(self, net):
        batch = rows()
        copied = compressed(net)(*batch)
        assert torch.equal(compressed(net, inplace=True)(*batch), copied)

    def test_a_model_that_cannot_be_copied_is_an_error_that_names_the_way_out(self, net):
        net.cache = net.first(*rows())  # no leaf of the graph
        with pytest.raises(cb.CompressionError, match=r"could not be copied.*`inplace=True` does not copy"):
            compressed(net)
        assert isinstance(compressed(net, inplace=True).first, cb.TuckerBilinear)

    def test_planning_touches_nothing(self, net):
        before, random = state_of(net), torch.get_rng_state()
        planned = run(cb.plan, net, TUCKER, calibration=[rows(5)])
        assert_same_state(net, before)
        assert torch.equal(torch.get_rng_state(), random)
        assert isinstance(net.first, nn.Bilinear)
        assert all(name in str(planned) for name in [*NAMES, "the model is untouched"])

    def test_the_random_state_is_left_alone(self, net, inplace):
        random = torch.get_rng_state()
        run(cb.compress, net, cb.CPConfig(rank=3), inplace=inplace, calibration=[rows(5)])
        assert torch.equal(torch.get_rng_state(), random)

    def test_a_plan_can_be_applied_again(self, net):
        planned = run(cb.plan, net, TUCKER)
        (first, _), (second, _) = planned.apply(), planned.apply()
        untouched = state_of(second)
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.add_(1)
        assert_same_state(second, untouched)
        assert_same_state(planned.apply()[0], untouched)


class OneFailure(dict):
    """A dict that fails once, at its n-th assignment."""

    def __init__(self, items, at: int) -> None:
        super().__init__(items)
        self.left = at

    def __setitem__(self, key, value) -> None:
        self.left -= 1
        if self.left == 0:
            raise MemoryError("no room")
        super().__setitem__(key, value)


def fail_at(monkeypatch, module, name: str, at: int) -> None:
    """Make the `at`-th call of a function fail."""
    original, calls = getattr(module, name), []

    def failing(*args, **options):
        calls.append(1)
        if len(calls) == at:
            raise MemoryError("no room")
        return original(*args, **options)

    monkeypatch.setattr(module, name, failing)


class TestFailures:
    @pytest.mark.parametrize("at", [1, 3])
    @pytest.mark.parametrize(
        ("module", "name"),
        [(_planner, "fit"), (_planner, "judge"), (_planner, "fingerprint"), (_execute, "_ready")],
    )
    def test_a_failure_anywhere_leaves_the_model_as_it_was(self, net, inplace, monkeypatch, module, name, at):
        before, parts = state_of(net), dict(net.named_modules())
        fail_at(monkeypatch, module, name, at)
        with pytest.raises((MemoryError, cb.CompressionError), match="no room"):
            run(cb.compress, net, TUCKER, inplace=inplace)
        assert_same_state(net, before)
        assert dict(net.named_modules()) == parts

    @pytest.mark.parametrize("at", [1, 2, 3])
    def test_a_swap_that_fails_half_way_is_undone(self, net, at):
        # first, one and other are assigned in the model itself
        net._modules = OneFailure(net._modules, at)
        before, parts = state_of(net), dict(net.named_modules())
        with pytest.raises(MemoryError):
            compressed(net, inplace=True)
        assert_same_state(net, before)
        assert dict(net.named_modules()) == parts

    @pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
    @pytest.mark.parametrize("refine", [None, "network"])
    def test_gradients_that_the_caller_has_turned_off_are_no_hindrance(self, net, inplace, around, refine):
        options = {"calibration": [rows(40)] * 2, "refine": refine, "max_seconds": 1}
        with around():
            new, report = run(cb.compress, net, TUCKER, inplace=inplace, **options)
        assert set(decisions(report).values()) == {"replaced"}
        new(*rows()).sum().backward()  # what it made can be trained
        torch.optim.SGD(new.parameters(), 0.1).step()

    def test_a_model_of_inference_tensors_is_compressed(self):
        with torch.inference_mode():
            net = Net()
            _, report = run(cb.compress, net, TUCKER, calibration=[rows(40)])
        assert set(decisions(report).values()) == {"replaced"}

    def test_a_failing_calibration_leaves_the_model_as_it_was(self, net, inplace):
        before = state_of(net)
        with pytest.raises(cb.CompressionError, match="calibration batch 1"):
            run(cb.compress, net, TUCKER, inplace=inplace, calibration=[rows(), rows()[:1]])
        assert_same_state(net, before)
        assert net.training


def replaced_weight(net):
    net.first.weight = nn.Parameter(net.first.weight.detach() + 1)


CHANGES = {
    "weight": lambda net: net.first.weight.data[0, 0, 0].add_(1e-3),
    "another weight": replaced_weight,
    "bias": lambda net: net.first.bias.data.neg_(),
    "bias removed": lambda net: setattr(net.first, "bias", None),
    "dtype": lambda net: net.first.double(),
    "device": lambda net: net.first.to("meta"),
    "layer removed": lambda net: delattr(net, "first"),
    "layer replaced": lambda net: setattr(net, "first", planted(1)),
    "one of two names": lambda net: setattr(net, "other", planted(3)),
    "hook": lambda net: net.first.register_forward_hook(lambda *args: None),
    "parametrization": lambda net: parametrize.register_parametrization(net.first, "weight", nn.Tanh()),
    "tied": lambda net: setattr(net.head, "extra", net.first.weight),
}


class TestStalePlans:
    @pytest.mark.parametrize("change", CHANGES)
    def test_a_changed_model_is_planned_again(self, net, inplace, change):
        planned = run(cb.plan, net, TUCKER)
        CHANGES[change](net)
        before = copy.deepcopy(net.state_dict())
        parts = dict(net.named_modules())
        with pytest.raises(StalePlanError, match=r"(?i)plan again"):
            planned.apply(inplace)
        assert dict(net.named_modules()) == parts
        assert list(net.state_dict()) == list(before)

    def test_after_applying_inplace_a_plan_is_used_up(self, net):
        planned = run(cb.plan, net, TUCKER)
        planned.apply(inplace=True)
        with pytest.raises(StalePlanError, match=r"Layer 'first'.*Found TuckerBilinear"):
            planned.apply(inplace=True)

    def test_other_parts_may_change(self, net):
        planned = run(cb.plan, net, {"one": None, "*": TUCKER})
        with torch.no_grad():
            net.head.weight.zero_()
            net.one.weight.zero_()
        assert not planned.apply()[0].head.weight.any()


class TestVerdicts:
    def test_a_rank_that_fits_no_layer_is_an_error_that_names_layer_and_size(self, net):
        with pytest.raises(ConfigError, match=r"`rank\[1\]` should be at most 12, in1_features of layer 'first'"):
            run(cb.plan, net, cb.TuckerConfig(rank=(2, 13, 2)))

    def test_a_rank_that_fits_others_keeps_the_layer(self, net):
        net.first = bilinear(3, 10, 8)
        report = run(cb.plan, net, TUCKER).report
        assert decisions(report) == {NAMES[0]: "kept", NAMES[1]: "replaced", NAMES[2]: "replaced"}
        assert "`rank[1]` should be at most 3, in1_features of layer 'first'. Found 4" in report.layers[0].reason

    def test_each_config_of_a_mapping_has_to_fit_somewhere(self, net):
        with pytest.raises(ConfigError, match="'first'"):
            run(cb.plan, net, {"first": cb.TuckerConfig(rank=(9, 2, 2)), "*": TUCKER})

    @pytest.mark.parametrize("target", [0.3, 0.07, 0.06])
    @pytest.mark.parametrize(
        ("make", "quantize", "dtype"),
        [
            (cb.TuckerConfig, None, torch.float32),
            (cb.TuckerConfig, "int8", torch.float32),
            (cb.TuckerConfig, None, torch.float16),
            (cb.TuckerConfig, "int8", torch.float16),
            (cb.CPConfig, None, torch.float32),
            (cb.CPConfig, "int8", torch.float16),
        ],
    )
    def test_a_max_error_is_met(self, make, quantize, dtype, target):
        layer = planted(dtype=dtype)
        new, report = run(cb.compress, layer, make(rank=cb.MaxError(target), quantize=quantize))
        assert decisions(report) == {"": "replaced"}
        exact = layer.weight.detach().double()
        error = float((exact - new.to_dense(torch.float64).detach()).norm() / exact.norm())
        assert error <= target
        assert report.layers[0].weight_error == pytest.approx(error, rel=1e-9)

    @pytest.mark.parametrize(("make", "why"), [(cb.CPConfig, "1e-06"), (cb.TuckerConfig, "not smaller")])
    def test_a_max_error_out_of_reach_is_kept_with_the_reason(self, make, why):
        # a random cube has full rank, which takes more bytes than the cube
        assert why in reason(bilinear(3, 3, 3), make(rank=cb.MaxError(1e-6)), name="")

    @pytest.mark.parametrize("quantize", [None, "int8"])
    @pytest.mark.parametrize("make", [cb.CPConfig, cb.TuckerConfig])
    def test_a_max_size_is_met_with_the_bias_counted(self, net, make, quantize):
        new, report = run(cb.compress, net, {"first": make(rank=cb.MaxSize(0.2), quantize=quantize)})
        assert decisions(report) == {"first": "replaced"}
        assert report.layers[0].bytes_after == stored_bytes(new.first) <= 0.2 * stored_bytes(net.first)

    def test_a_max_size_out_of_reach_is_kept_with_the_reason(self, net):
        assert "Rank (8, 1, 1) stores 120 bytes" in reason(net, cb.TuckerConfig(rank=cb.MaxSize(0.01)))

    def test_what_is_not_smaller_is_kept_unless_forced(self, net):
        config = cb.TuckerConfig(rank=(8, 12, 10))
        assert "not smaller" in reason(net, config)
        new, report = run(cb.compress, net, config, force=True)
        assert decisions(report) == dict.fromkeys(NAMES, "replaced")
        assert report.layers[0].reason.startswith("forced, although it is not smaller")
        assert report.model_bytes_after == stored_bytes(new) == report.model_bytes_before

    @pytest.mark.parametrize(("after", "outcome"), [(1.0, "replaced"), (4.0, "kept")])
    def test_an_exact_layer_is_used_where_it_is_measured_faster(self, net, inplace, monkeypatch, after, outcome):
        latencies = Latency(2, 1.9, 2.1), Latency(after, 0.95 * after, 1.05 * after), Latency(1, 1, 1)
        sizes = []
        monkeypatch.setattr(
            _verdict,
            "time_replacement",
            lambda layer, module, size, seconds: sizes.append(size) or Timing(*latencies, "outer", size),
        )
        batch = rows()
        output = net(*batch)
        new, report = cb.compress(net, cb.DenseConfig(), inplace=inplace, batch_size=33)
        assert decisions(report) == dict.fromkeys(NAMES, outcome)
        assert sizes == [33] * 3
        assert isinstance(new.first, cb.DenseBilinear if outcome == "replaced" else nn.Bilinear)
        assert_matches_reference(new(*batch).detach(), output.detach().double(), 10)

    def test_unmeasured_exact_layers_are_kept(self, net):
        assert "has not been measured" in reason(net, cb.DenseConfig())


class TestCalibration:
    @pytest.fixture
    def sizes(self, monkeypatch):
        """The numbers of rows that latencies are asked for."""
        found = []

        def timed(layer, module, size, seconds):
            found.append(size)
            return Timing(*[Latency(2, 1, 3)] * 3, "outer", size)

        monkeypatch.setattr(_verdict, "time_replacement", timed)
        return found

    def test_output_errors_are_on_the_rows_that_reach_each_layer(self, net, inplace):
        x1, x2 = rows(20)
        exact = torch.einsum("ni,oij,nj->no", x1.double(), net.first.weight.detach().double(), x2.double())
        new, report = run(cb.compress, net, TUCKER, inplace=inplace, calibration=[(x1[:9], x2[:9]), (x1[9:], x2[9:])])
        found = torch.einsum("ni,oij,nj->no", x1.double(), new.first.to_dense(torch.float64).detach(), x2.double())
        assert report.layers[0].output_error == pytest.approx(float((exact - found).norm() / exact.norm()), rel=1e-4)
        # one is called twice, which is enough to fit to, so that only the rows that are held out count
        assert [layer.calibration_rows for layer in report.layers] == [20, 20, 10]

    def test_unreached_layers_say_so(self, net):
        net.spare = planted(7)
        report = run(cb.plan, net, TUCKER, calibration=[rows()]).report
        assert report.layers[3].output_error is None
        assert "no calibration row reached it" in report.layers[3].reason

    def test_timed_calls_have_the_calibrations_rows(self, net, sizes):
        cb.plan(net, TUCKER, calibration=[rows(4), rows(8)])
        assert sizes == [6, 6, 6]

    @pytest.mark.parametrize(("given", "expected"), [(None, 256), (17, 17)])
    def test_timed_calls_have_the_given_rows(self, net, sizes, given, expected):
        cb.plan(net, TUCKER, batch_size=given, calibration=None if given is None else [rows(4)])
        assert sizes == [expected] * 3


class TestReport:
    def test_bytes_are_those_of_the_stored_modules_and_the_whole_model(self, net, inplace):
        before = stored_bytes(net)
        config = {"first": cb.CPConfig(rank=3, quantize="int8"), "one": TUCKER, "*": INT8}
        new, report = run(cb.compress, net, config, inplace=inplace)
        for layer in report.layers:
            assert layer.bytes_after == stored_bytes(new.get_submodule(layer.name))
        unique = {value.data_ptr(): value for value in new.state_dict().values()}
        assert report.model_bytes_before == before
        assert report.model_bytes_after == sum(value.numel() * value.element_size() for value in unique.values())

    def test_the_environment_is_that_of_the_layers(self):
        report = run(cb.plan, planted(dtype=torch.bfloat16), TUCKER).report
        assert report.environment["dtype"] == "bfloat16"
        assert json.loads(report.to_json())["environment"]["device"] == "cpu"

    @pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
    def test_progress_goes_to_stderr_and_only_where_wanted(self, net, capsys, progress, shown):
        run(cb.plan, net, TUCKER, calibration=[rows()], progress=progress)
        out, err = capsys.readouterr()
        assert out == ""
        assert ("Judging" in err) == shown


class TestTimeLimit:
    @pytest.fixture
    def budgets(self, monkeypatch):
        """The time that each layer gets, on a clock that one layer takes a second of, and calibrating two."""
        now, given, original, collect = [0.0], [], _planner.fit, _planner.collect_inputs

        def collect_inputs(model, layers, batches, **options):
            now[0] += 2.0
            return collect(model, layers, batches, **options)

        monkeypatch.setattr(_planner, "collect_inputs", collect_inputs)
        monkeypatch.setattr("compress_bilinear.decomposition._budget.time.perf_counter", lambda: now[0])

        def fit(job, budget, options):
            given.append(budget.max_seconds)
            now[0] += 1.0
            return original(job, Budget(), options)

        monkeypatch.setattr(_planner, "fit", fit)
        return given

    def test_it_is_shared_by_the_sizes_of_the_layers_that_are_left(self, net, budgets):
        run(cb.plan, net, TUCKER, max_seconds=9.0)
        # three layers of one size: 9 / 3, then 8 / 2, then 7
        assert budgets == pytest.approx([3.0, 4.0, 7.0])

    def test_calibrating_counts(self, net, budgets):
        report = run(cb.plan, net, TUCKER, max_seconds=11.0, calibration=[rows()]).report
        assert budgets == pytest.approx([3.0, 4.0, 7.0])
        assert report.seconds == {"calibrate": 2.0, "fit": 3.0, "choose": 0.0, "judge": 0.0}

    def test_without_one_nothing_is_limited(self, net, budgets):
        run(cb.plan, net, TUCKER)
        assert budgets == [math.inf] * 3

    @pytest.mark.parametrize("config", [cb.CPConfig(rank=4), TUCKER, cb.CPConfig(rank=cb.MaxSize(0.3))], ids=str)
    def test_the_shortest_still_compresses(self, net, config):
        _, report = run(cb.compress, net, config, max_seconds=1e-9)
        assert decisions(report) == dict.fromkeys(NAMES, "replaced")

    def test_what_there_is_no_time_for_is_not_measured(self, net):
        _, report = cb.compress(net, replace(TUCKER, quantize="int8"), max_seconds=1e-9)
        assert [layer.latency_after_ms for layer in report.layers] == [None] * 3
        assert all(layer.has("not_timed") for layer in report.layers)
        assert {(layer.spectra, layer.truncation_error, layer.quantization_error) for layer in report.layers} == {
            ((), None, None)
        }
        assert all(0 < layer.weight_error < 1 for layer in report.layers)

    @pytest.mark.parametrize("value", [0, -3, "1"])
    def test_it_is_a_positive_number(self, net, value):
        with pytest.raises(ConfigError, match="`max_seconds` should be a positive number or None"):
            run(cb.plan, net, TUCKER, max_seconds=value)


class TestInterruption:
    @pytest.mark.parametrize("inplace", [False, True])
    def test_ctrl_c_in_a_solve_leaves_the_model_as_it_was(self, net, inplace, monkeypatch):
        before, modules, calls = state_of(net), dict(net.named_modules()), []

        def interrupted(self, factors, penalty, dtype):
            calls.append(penalty)
            if len(calls) > 40:
                raise KeyboardInterrupt
            return sweep(self, factors, penalty)

        sweep = Sweeper.sweep
        monkeypatch.setattr(Sweeper, "sweep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(cb.compress, net, cb.CPConfig(rank=4), inplace=inplace, progress=True)
        assert dict(net.named_modules()) == modules
        assert_same_state(net, before)


def test_a_long_solve_shows_the_layer_and_its_error(net, capsys):
    run(cb.plan, net, cb.AutoConfig(size=0.5), progress=True)
    shown = capsys.readouterr().err
    assert "Predicting" in shown
    assert "error 0." in shown


def test_cancelling_components_are_reported_and_not_warned_of():
    layer = nn.Bilinear(2, 2, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0, 1] = layer.weight[0, 1, 0] = layer.weight[1, 0, 0] = 1
    _, report = run(cb.compress, layer, cb.CPConfig(rank=2), force=True)
    assert report.layers[0].amplification > 3
    assert "its components cancel (amplification" in report.layers[0].reason


def test_absorbed_modes_count_nothing_and_survive_saving(tmp_path):
    net = Net()
    config = cb.TuckerConfig(rank=(3, IN1, 4))
    new, report = run(cb.compress, net, config)
    assert report.layers[0].params_after == 3 * IN1 * 4 + OUT * 3 + IN2 * 4 + OUT
    cb.save(new, tmp_path / "small.safetensors")
    again = cb.load(tmp_path / "small.safetensors", Net())
    assert torch.equal(again(*rows()), new(*rows()))


@pytest.mark.parametrize("rank", [(OUT, 3, 4), (3, IN1, IN2), (OUT, IN1, 4)], ids=str)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_absorbed_modes_train_compile_and_take_autocast(rank, quantize):
    layer = cb.TuckerBilinear.from_bilinear(planted(), rank, quantize=quantize)
    input1, input2 = (part.requires_grad_() for part in rows())
    layer(input1, input2).sum().backward()
    assert bool(input1.grad.any())
    assert bool(input2.grad.any())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(input1, input2).dtype == torch.bfloat16
    exported = torch.export.export(layer, rows()).module()
    torch.testing.assert_close(exported(*rows()), layer(*rows()))
    copied = copy.deepcopy(layer)
    copied.load_state_dict(layer.state_dict())
    assert torch.equal(copied(*rows()), layer(*rows()))


class TestFittedOutputs:
    CALIBRATION: ClassVar = {"calibration": [tuple(value + 1 for value in rows(200))]}

    def test_a_corrected_bias_is_a_new_one_and_the_original_as_it_was(self, net, inplace):
        bias = net.first.bias
        before = bias.detach().clone()
        new = compressed(net, cb.DenseConfig(quantize="nf4"), inplace=inplace, **self.CALIBRATION)
        assert new.first.bias is not bias
        assert not torch.equal(new.first.bias, before)
        assert torch.equal(bias, before)

    def test_a_tied_bias_is_not_corrected_and_stays_tied(self, net, inplace):
        net.first.bias = net.one.bias
        before = net.one.bias.detach().clone()
        new = compressed(net, cb.DenseConfig(quantize="nf4"), inplace=inplace, **self.CALIBRATION)
        assert new.first.bias is new.one.bias
        assert torch.equal(new.first.bias, before)

    def test_what_was_fitted_is_saved_and_loaded_bit_for_bit(self, net, tmp_path):
        new = compressed(net, cb.AutoConfig(size=0.5), **self.CALIBRATION)
        cb.save(new, tmp_path / "small.safetensors")
        again = cb.load(tmp_path / "small.safetensors", Net())
        assert torch.equal(again(*rows()), new(*rows()))


class TestEvaluating:
    def test_the_report_has_the_metric_before_and_after(self, net, inplace):
        _, report = run(cb.compress, net, TUCKER, inplace=inplace, evaluate=lambda m: isinstance(m.first, nn.Bilinear))
        assert (report.metric_before, report.metric_after) == (1.0, 0.0)

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("how", ["raises", "no number"])
    def test_a_failing_one_leaves_the_model_as_it_was(self, net, inplace, when, how):
        def evaluate(model):
            if isinstance(model.first, nn.Bilinear) == (when == "after"):
                return 0.5
            if how == "raises":
                raise OSError("the disk is gone")
            return {"accuracy": 0.5}

        before, modules = state_of(net), dict(net.named_modules())
        with pytest.raises(OSError if how == "raises" else ConfigError):
            run(cb.compress, net, TUCKER, inplace=inplace, evaluate=evaluate)
        assert dict(net.named_modules()) == modules
        assert_same_state(net, before)

    def test_it_is_a_function(self, net):
        with pytest.raises(ConfigError, match="`evaluate` should be a function"):
            run(cb.plan, net, TUCKER, evaluate=3)


@pytest.mark.parametrize("option", ["forward_fn", "loss_fn", "refine"])
def test_what_runs_batches_needs_calibration(net, option):
    with pytest.raises(ConfigError, match=f"`{option}` needs `calibration`"):
        run(cb.plan, net, TUCKER, **{option: "network" if option == "refine" else lambda m, b: m(*b)})


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.cubes = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x, y):
        return torch.einsum("ni,oij,nj->no", x, self.cubes, y).tanh()


def test_what_may_be_bilinear_is_named_beside_what_was_found():
    net = nn.ModuleDict({"known": bilinear(6, 5, 4), "big": Unknown(), "also": nn.Conv1d(3, 3, 3)})
    planned = cb.plan(net, cb.DenseConfig(quantize="int8"), progress=False, measure_latency=False)
    told = planned.report.unknown
    assert len(told) == 1
    assert told[0].startswith("big (Unknown) has `cubes` (4x6x5), of 3 axes, but")
    line = "register_adapter(Unknown, to_weight=lambda module: module.cubes, call=lambda module, layer, x, y: ...)"
    assert line in told[0]
    assert "Not looked at: big" in planned.report.to_markdown()
    assert "Not looked at: big (Unknown)" in str(planned)
    assert "Not looked at: big (Unknown)" in planned.report.to_html()
    assert cb.Report.from_json(planned.report.to_json()).unknown == told
    assert planned.apply()[1].unknown == told
    cb.register_adapter(Unknown, to_weight=lambda m: m.cubes, call=lambda m, layer, x, y: layer(x, y).tanh())
    try:
        assert cb.plan(net, {"known": None, "*": TUCKER}, progress=False, measure_latency=False).report.unknown == ()
    finally:
        REGISTERED.pop(Unknown)
