"""What compressing a network does and says, for every method and storage format."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product

import pytest
import torch
from layers import LAYERS
from support import DTYPES, assert_matches_reference, assert_same_state, bilinear, low_rank, state_of
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.config import CONFIGS, Config
from compress_bilinear.errors import CompressionError, StalePlanError
from compress_bilinear.quantization import FORMATS

RANKS = {"dense": None, "tucker": (3, 5, 4)}  # of every other method 3
IN1, IN2, OUT = 12, 10, 8

for_each = pytest.mark.parametrize(("method", "quantize"), list(product(LAYERS, (None, *FORMATS))))
calibrated_or_not = pytest.mark.parametrize("calibrated", [False, True], ids=["weight", "outputs"])


def config_of(method: str, quantize: str | None) -> Config:
    rank = RANKS.get(method, 3)
    return CONFIGS[method](quantize=quantize, **({} if rank is None else {"rank": rank}))


def layer_of_low_rank(seed: int = 0, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Bilinear:
    layer = bilinear(IN1, IN2, OUT, bias=bias, dtype=dtype, seed=seed)
    with torch.no_grad():
        layer.weight.copy_(low_rank((OUT, IN1, IN2), 3, noise=0.2, seed=seed) / 10)
    return layer


class Net(nn.Module):
    """A layer of its own, one that is frozen, one with two names and no bias, and a linear layer behind them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.own, self.frozen = layer_of_low_rank(seed), layer_of_low_rank(seed + 1)
        self.one = self.other = layer_of_low_rank(seed + 2, bias=False)
        self.head = nn.Linear(OUT, 3)
        nn.init.constant_(self.head.weight, 0.5)
        nn.init.constant_(self.head.bias, seed)
        self.frozen.requires_grad_(False)
        self.frozen.eval()

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.head(self.own(x1, x2) + self.frozen(x1, x2) + self.one(x1, x2) * self.other(x1, x2))


def rows(count: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of which the second depends on the first."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, IN1, generator=generator)
    second = first[:, :IN2] + 0.5 * torch.randn(count, IN2, generator=generator)
    return first.to(dtype), second.to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Calibration rows: enough to fit to, with some held out."""
    return [rows(64, dtype, seed) for seed in range(4)]


def compressed(model: nn.Module, method: str, quantize: str | None, **options) -> tuple[nn.Module, cb.Report]:
    # forced: layers of this size are not smaller in every format, and an exact dense one never is
    return cb.compress(model, config_of(method, quantize), force=True, measure_latency=False, progress=False, **options)


@cache
def planned(method: str, quantize: str | None, calibrated: bool = False) -> cb.Plan:
    """A plan for a `Net`, which no test changes."""
    calibration = batches() if calibrated else None
    options = {"calibration": calibration, "force": True, "measure_latency": False, "progress": False}
    return cb.plan(Net(), config_of(method, quantize), **options)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {"own": model.own, "frozen": model.frozen, "one": model.one}


def bytes_of(module: nn.Module) -> int:
    """What torch stores: the bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@calibrated_or_not
@for_each
def test_the_report_names_what_was_made(method, quantize, calibrated):
    model, report = planned(method, quantize, calibrated).apply()
    assert [(layer.name, layer.aliases) for layer in report.layers] == [
        ("own", ()),
        ("frozen", ()),
        ("one", ("other",)),
    ]
    for layer, made in zip(report.layers, layers_of(model).values(), strict=True):
        assert type(made) is LAYERS[method]
        assert (layer.method, layer.rank, layer.quantize) == (method, RANKS.get(method, 3), quantize)
        assert (made.rank, made.quantize) == (RANKS.get(method, 3), quantize)
        assert (layer.decision, layer.shape) == ("replaced", (OUT, IN1, IN2))
        assert bool(layer.calibration_rows) == calibrated
        assert (0 < layer.flops_after < layer.flops_before) or method == "dense"
    assert cb.Report.from_dict(json.loads(report.to_json())) == report


@calibrated_or_not
@for_each
def test_the_report_counts_the_bytes_and_numbers_that_torch_stores(method, quantize, calibrated):
    model, report = planned(method, quantize, calibrated).apply()
    before = Net()
    for layer in report.layers:
        old, new = layers_of(before)[layer.name], layers_of(model)[layer.name]
        assert (layer.bytes_before, layer.bytes_after) == (bytes_of(old), bytes_of(new))
        assert layer.params_before == sum(parameter.numel() for parameter in old.parameters())
        if quantize is None:
            assert layer.params_after == sum(parameter.numel() for parameter in new.parameters())
    assert (report.model_bytes_before, report.model_bytes_after) == (bytes_of(before), bytes_of(model))
    assert (report.model_bytes_after < report.model_bytes_before) == (method != "dense" or quantize is not None)


@calibrated_or_not
@for_each
def test_the_report_has_the_errors_of_the_weight_and_of_unseen_outputs(method, quantize, calibrated):
    model, report = planned(method, quantize, calibrated).apply()
    for layer in report.layers:
        old, new = layers_of(Net())[layer.name], layers_of(model)[layer.name]
        exact = old.weight.detach()
        assert layer.weight_error == pytest.approx(relative(new.to_dense(torch.float64).detach(), exact), abs=1e-12)
        if not calibrated:
            assert layer.output_error is None
            continue
        # what was held out is known to the fit alone: rows of the same distribution have about the same error
        values = rows(2000, seed=99)
        bias = 0 if old.bias is None else old.bias.detach()
        outputs = torch.einsum("ni,oij,nj->no", values[0].double(), exact.double(), values[1].double())
        fresh = relative(new(*values).detach().double() - bias, outputs)
        assert layer.output_error == pytest.approx(fresh, rel=0.35, abs=1e-6)


@calibrated_or_not
@for_each
def test_a_file_gives_back_the_same_bits(method, quantize, calibrated, tmp_path):
    model, _ = planned(method, quantize, calibrated).apply()
    cb.save(model, tmp_path / "small.safetensors")
    loaded = cb.load(tmp_path / "small.safetensors", Net(seed=5))
    assert_same_state(loaded, state_of(model))
    assert loaded.one is loaded.other
    assert torch.equal(loaded(*rows()), model(*rows()))
    assert [parameter.requires_grad for parameter in loaded.frozen.parameters()] == [
        parameter.requires_grad for parameter in model.frozen.parameters()
    ]


@for_each
def test_a_copy_and_the_model_itself_become_the_same(method, quantize):
    plan = copy.deepcopy(planned(method, quantize))
    model, before = plan.model, state_of(plan.model)
    copied, _ = plan.apply()
    assert_same_state(model, before)
    head = model.head
    given, _ = plan.apply(inplace=True)
    assert given is model
    assert model.head is head
    assert_same_state(model, state_of(copied))
    assert torch.equal(model(*rows()), copied(*rows()))
    assert not {tensor.data_ptr() for tensor in copied.parameters()} & {
        tensor.data_ptr() for tensor in model.parameters()
    }


@for_each
def test_shared_frozen_and_evaluating_layers_stay_so(method, quantize):
    model, _ = planned(method, quantize).apply()
    assert model.one is model.other
    assert model.one.bias is None
    assert not any(parameter.requires_grad for parameter in model.frozen.parameters())
    assert all(parameter.requires_grad for parameter in model.own.parameters())
    factors = [name for name, _ in model.own.named_parameters() if not name.endswith("bias")]
    assert bool(factors) == (quantize is None)
    assert not any(part.training for part in model.frozen.modules())
    assert all(part.training for part in (*model.own.modules(), *model.one.modules()))


@for_each
def test_training_and_evaluation_compute_the_same(method, quantize):
    model, _ = planned(method, quantize).apply()
    trained = model(*rows()).detach()
    with torch.no_grad():
        assert_matches_reference(model.eval()(*rows()), trained.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@for_each
def test_a_model_that_is_one_layer_of_any_dtype_is_returned_anew(method, quantize, dtype):
    layer = layer_of_low_rank(dtype=dtype)
    before = state_of(layer)
    calibration = batches(dtype) if dtype == torch.bfloat16 else None  # the others are fitted to the weight
    new, report = compressed(layer, method, quantize, calibration=calibration)
    assert type(new) is LAYERS[method]
    (found,) = report.layers
    assert (found.name, found.decision) == ("", "replaced")
    assert_same_state(layer, before)
    weight = new.to_dense(torch.float64).detach()
    assert found.weight_error == pytest.approx(relative(weight, layer.weight.detach()), abs=1e-9)
    assert found.weight_error < 0.5
    assert (found.bytes_before, found.bytes_after) == (bytes_of(layer), bytes_of(new))
    values = rows(dtype=dtype)
    exact = torch.einsum("ni,oij,nj->no", values[0].double(), weight, values[1].double()) + new.bias.detach().double()
    assert_matches_reference(new(*values).detach(), exact)


@for_each
def test_a_model_that_is_one_layer_cannot_be_changed_in_place(method, quantize):
    layer = bilinear(IN1, IN2, OUT)
    before = state_of(layer)
    with pytest.raises(CompressionError, match="inplace"):
        compressed(layer, method, quantize, inplace=True)
    assert_same_state(layer, before)


class FailsOnce(dict):
    """The submodules of a module, of which one cannot be put in its place at first."""

    def __init__(self, items: dict[str, nn.Module], name: str) -> None:
        super().__init__(items)
        self.name = name

    def __setitem__(self, name: str, module: nn.Module) -> None:
        if name == self.name:
            self.name = ""
            raise MemoryError("no room")
        super().__setitem__(name, module)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Values, modules, flags and hooks of the model are afterwards what they were before."""

    def what_is_no_tensor():
        flags = [parameter.requires_grad for parameter in model.parameters()]
        modes = [part.training for part in model.modules()]
        return dict(model.named_modules(remove_duplicate=False)), flags, modes

    state, others = state_of(model), what_is_no_tensor()
    yield
    assert_same_state(model, state)
    assert what_is_no_tensor() == others
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("failure", ["batches", "forward"])
@for_each
def test_a_calibration_that_fails_leaves_the_model_as_it_was(method, quantize, failure):
    def failing():
        yield rows(64)
        if failure == "batches":
            raise OSError("no such file")
        yield torch.ones(3, IN1 + 1), torch.ones(3, IN2)

    model = Net()
    with unchanged(model), pytest.raises((CompressionError, OSError)):
        compressed(model, method, quantize, calibration=failing(), inplace=True)


@for_each
def test_a_swap_that_fails_half_way_is_undone(method, quantize):
    plan = copy.deepcopy(planned(method, quantize))
    plan.model._modules = FailsOnce(plan.model._modules, "other")
    with unchanged(plan.model), pytest.raises(MemoryError, match="no room"):
        plan.apply(inplace=True)


@pytest.mark.parametrize("inplace", [False, True])
@for_each
def test_a_metric_that_fails_after_the_swap_leaves_the_model_as_it_was(method, quantize, inplace):
    def accuracy(model):
        if type(model[0]) is not nn.Bilinear:
            raise OSError("no data")
        return 1.0

    model = nn.Sequential(layer_of_low_rank())
    with unchanged(model), pytest.raises(OSError, match="no data"):
        compressed(model, method, quantize, evaluate=accuracy, inplace=inplace)


@for_each
def test_a_plan_for_a_weight_that_has_changed_is_refused(method, quantize):
    plan = copy.deepcopy(planned(method, quantize))
    with torch.no_grad():
        plan.model.own.weight[0, 0, 0] += 1
    with unchanged(plan.model), pytest.raises(StalePlanError):
        plan.apply(inplace=True)
