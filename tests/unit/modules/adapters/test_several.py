"""Several weights in one module, as experts have them: each is a layer with its own name."""

import copy
import pickle

import pytest
import torch
from support import assert_same_state, state_of
from torch import nn

import compress_bilinear as cb
from compress_bilinear.modules import AdaptedBilinear, find

INT8 = cb.DenseConfig(quantize="int8")
TUCKER = cb.TuckerConfig(rank=(8, 8, 4))
FAST = {"measure_latency": False}


class Experts(nn.Module):
    """Two matrices for each expert, and a bias of the second: rows (N, d) with their experts (N,)."""

    def __init__(self, experts=6, size=12, hidden=16):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.up = nn.Parameter(torch.randn(experts, hidden, size) / size**0.5)
        self.down = nn.Parameter(torch.randn(experts, size, hidden) / hidden**0.5)
        self.shift = nn.Parameter(torch.randn(size))

    def forward(self, x, expert):
        hidden = torch.bmm(self.up[expert], (x * self.scale).unsqueeze(-1)).relu()
        return torch.bmm(self.down[expert], hidden).squeeze(-1) + self.shift


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(12, 6), Experts()

    def forward(self, x):
        return x + self.experts(x, self.gate(x).argmax(-1))


def run_experts(module, layers, x, expert):
    hidden = layers["up"].indexed(x * module.scale, expert).relu()
    return layers["down"].indexed(hidden, expert)


def register(**changes):
    stated = {
        "to_weight": {"up": lambda m: m.up.permute(1, 2, 0), "down": lambda m: m.down.permute(1, 2, 0)},
        "to_bias": {"down": lambda m: m.shift},
        "call": run_experts,
    }
    cb.register_adapter(Experts, **stated | changes)


def router():
    torch.manual_seed(0)
    return Router().eval()


BATCHES = [torch.randn(50, 12, generator=torch.Generator().manual_seed(k)) for k in range(4)]


def test_each_weight_is_found_by_its_own_name_and_shape():
    register()
    found = {layer.label: tuple(layer.layer.weight.shape) for layer in find(router())}
    assert found == {"experts.up": (16, 12, 6), "experts.down": (12, 16, 6)}
    assert set(found) == {layer.label for layer in find(nn.ModuleDict({"experts": Experts()}))}
    assert {layer.label for layer in find(Experts())} == {"up", "down"}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("config", "decisions"),
    [
        ({"*": INT8}, ["replaced", "replaced"]),
        ({"experts": TUCKER}, ["replaced", "replaced"]),
        ({"experts.up": TUCKER, "*": None}, ["replaced"]),
        ({"*.down": INT8}, ["replaced"]),
    ],
)
def test_they_are_replaced_together_or_one_of_them(config, decisions, inplace, tmp_path):
    register()
    model, exact = router(), router()
    small, report = cb.compress(model, config, calibration=BATCHES, inplace=inplace, force=True, **FAST)
    assert [layer.decision for layer in report.layers] == decisions
    assert all(layer.output_error > 0 for layer in report.layers)
    assert (small is model) == inplace
    if not inplace:
        assert_same_state(model, exact.state_dict())
    assert list(small.experts.compressed) == ["up", "down"]
    assert {name for name, _ in small.experts.named_parameters(recurse=False)} == {"scale"}
    x = BATCHES[0]
    with torch.no_grad():
        assert 0 < float((small(x) - exact(x)).norm() / exact(x).norm()) < 0.7
        assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))
        assert torch.equal(copy.deepcopy(small)(x), small(x))
        cb.save(small, tmp_path / "experts.safetensors")
        assert torch.equal(cb.load(tmp_path / "experts.safetensors", router())(x), small(x))


def test_what_is_kept_beside_a_replacement_is_exact():
    register()
    model = router().double()
    batches = [batch.double() for batch in BATCHES]
    small, _ = cb.compress(model, {"*.up": cb.DenseConfig()}, calibration=batches, force=True, **FAST)
    torch.testing.assert_close(small(batches[0]), model(batches[0]), rtol=0, atol=1e-12)
    kept = small.experts.compressed["down"]
    assert kept.to_dense().data_ptr() != model.experts.down.data_ptr()
    assert kept.bias is not model.experts.shift
    small(batches[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in small.experts.parameters())


def test_a_file_without_one_of_them_is_refused(tmp_path):
    register()
    small, _ = cb.compress(router(), INT8, calibration=BATCHES, **FAST)
    del small.experts.compressed["down"]
    cb.save(small, tmp_path / "half.safetensors")
    model = router()
    before = state_of(model)
    with pytest.raises(cb.CompressionError, match=r"missing experts\.down"):
        cb.load(tmp_path / "half.safetensors", model)
    assert_same_state(model, before)


@pytest.mark.slow
def test_all_are_tried_out_and_refined_together():
    register()
    small, report = cb.compress(
        router(), cb.CPConfig(rank=12), calibration=BATCHES, refine="network", max_seconds=2, force=True
    )
    assert [layer.name for layer in report.layers] == ["experts.up", "experts.down"]
    assert [layer.batch_size for layer in report.layers] == [50, 50]
    assert "experts.down: is a Experts" in str(report)
    assert isinstance(small.experts, AdaptedBilinear)
    with pytest.raises(cb.CompressionError, match=r"compressed already: experts\.compressed\.up"):
        cb.plan(small, INT8)


def test_a_tie_of_one_keeps_all():
    register()
    model = router()
    model.other = nn.Module()
    model.other.weight = model.experts.up
    _, report = cb.compress(model, INT8, calibration=BATCHES, force=True, **FAST)
    assert all("tied" in layer.reason for layer in report.layers)


def test_a_call_that_mixes_them_up_is_told():
    register(call=lambda m, layers, x, k: run_experts(m, layers, x, k.flip(0)))
    _, report = cb.compress(router(), INT8, calibration=BATCHES, force=True, **FAST)
    assert all("is not its own forward" in layer.reason for layer in report.layers)


class Fields(nn.Module):
    """x_i W_k * x_j for each pair k of fields, as networks for click rates have it: (N, F, d) -> (N, pairs, d)."""

    def __init__(self, fields=4, size=8):
        super().__init__()
        self.pairs = torch.combinations(torch.arange(fields)).T
        self.matrices = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in self.pairs.T)

    def forward(self, x):
        products = [linear(x[:, i]) * x[:, j] for linear, i, j in zip(self.matrices, *self.pairs, strict=True)]
        return torch.stack(products, 1)


def test_the_matrices_of_pairs_of_fields_are_one_weight_by_an_index():
    def run_fields(module, layer, x):
        first, second = module.pairs
        index = torch.arange(len(first)).expand(len(x), -1)
        return layer.indexed(x[:, first], index) * x[:, second]

    def to_weight(module):
        return torch.stack([linear.weight for linear in module.matrices], -1)

    cb.register_adapter(Fields, to_weight=to_weight, call=run_fields)
    torch.manual_seed(0)
    model, x = nn.Sequential(Fields()).eval(), torch.randn(30, 4, 8)
    small, report = cb.compress(model, cb.TuckerConfig(rank=(8, 8, 4)), calibration=[x], force=True, **FAST)
    assert (report.layers[0].decision, report.layers[0].shape) == ("replaced", (8, 8, 6))
    assert {name.partition(".")[0] for name, _ in small[0].named_parameters()} == {"compressed"}
    with torch.no_grad():
        assert 0 < float((small(x) - model(x)).norm() / model(x).norm()) < 0.7


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"to_weight": {}}, r"Found \[\]"),
        ({"to_weight": {"a.b": lambda m: m.up}}, r"Found \['a.b'\]"),
        ({"to_weight": {"keys": lambda m: m.up}}, r"Found \['keys'\]"),
        ({"to_weight": {"compressed": lambda m: m.up}}, r"Found \['compressed'\]"),
        ({"to_bias": {"middle": lambda m: m.shift}}, r"and \['middle'\]"),
        ({"to_weight": lambda m: m.up}, r"Found \[''\], and \['down'\]"),
        ({"to_weight": {"up": None}}, "`to_weight` should be a function. Found None"),
        ({"to_bias": {"down": 3}}, "`to_bias` should be a function. Found 3"),
    ],
)
def test_wrong_names_are_errors(changes, told):
    with pytest.raises(cb.CompressionError, match=told):
        register(**changes)


def test_a_module_is_verified_once_for_all_its_weights(monkeypatch):
    calls = []
    forward = Experts.forward
    monkeypatch.setattr(Experts, "forward", lambda m, x, expert: calls.append(x.dtype) or forward(m, x, expert))
    register()
    _, report = cb.compress(router(), INT8, calibration=BATCHES, force=True, **FAST)
    assert [layer.decision for layer in report.layers] == ["replaced", "replaced"]
    assert calls.count(torch.float64) == 1
