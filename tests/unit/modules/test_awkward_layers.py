"""Twelve layers that are hard to replace: each gives a right answer, or stays and says why."""

import pytest
import torch
from support import assert_matches_reference, bilinear, low_rank
from torch import nn
from torch.nn.utils import parametrize

import compress_bilinear as cb
from compress_bilinear.ops import reference

CONFIGS = {
    "cp": cb.CPConfig(rank=2),
    "tucker": cb.TuckerConfig(rank=cb.MaxSize(0.6)),
    "int8": cb.DenseConfig(quantize="int8"),
}


def planted(in1: int, in2: int, out: int, seed: int, dtype: torch.dtype = torch.float32) -> nn.Bilinear:
    layer = bilinear(in1, in2, out, dtype=dtype, seed=seed)
    with torch.no_grad():
        layer.weight.copy_(low_rank((out, in1, in2), 2, noise=0.1, seed=seed))
    return layer


class Awkward(nn.Module):
    """Never run as a whole: only its layers matter."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = self.alias = planted(9, 8, 7, 1)
        self.frozen = planted(9, 8, 7, 2).requires_grad_(False).eval()
        self.parametrized = planted(9, 8, 7, 3)
        parametrize.register_parametrization(self.parametrized, "weight", nn.Tanh())
        self.bf16 = planted(9, 8, 7, 4, torch.bfloat16)
        self.out1 = planted(15, 14, 1, 5)
        self.in1 = planted(1, 14, 15, 6)
        self.zero = planted(9, 8, 7, 7)
        nn.init.zeros_(self.zero.weight)
        self.nan = planted(9, 8, 7, 8)
        nn.init.constant_(self.nan.weight[2, 3], torch.nan)
        self.noncontiguous = planted(9, 8, 7, 9)
        self.noncontiguous.weight = nn.Parameter(self.noncontiguous.weight.detach().mT.contiguous().mT)
        self.inside = nn.ModuleList([nn.Linear(3, 3), planted(9, 8, 7, 10)])
        self.meta = nn.Bilinear(9, 8, 7, device="meta")


KEPT = {
    "parametrized": {"cp", "tucker", "int8"},
    "zero": {"cp", "tucker"},  # its factors would be zero and never train; int8 has no such trouble
    "nan": {"cp", "tucker", "int8"},
    "meta": {"cp", "tucker", "int8"},
}
REASONS = {"parametrized": "parametrized", "zero": "all zero", "nan": "8 values that are NaN", "meta": "meta device"}
NAMES = ["shared", "frozen", "parametrized", "bf16", "out1", "in1", "zero", "nan", "noncontiguous", "inside.1", "meta"]


@pytest.fixture(scope="module", params=CONFIGS)
def way(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def before() -> Awkward:
    return Awkward()


@pytest.fixture(scope="module")
def after(before, way):
    """The compressed model, and the reports by layer."""
    model, report = cb.compress(before, CONFIGS[way], measure_latency=False)
    return model, {layer.name: layer for layer in report.layers}


def assert_right(layer: nn.Bilinear, module: nn.Module, report: cb.LayerReport) -> None:
    """The module computes what it says that it stores, and the error is that of what it stores."""
    exact, stored = layer.weight.detach().double(), module.to_dense(torch.float64).detach()
    residual, total = float((exact - stored).norm()), float(exact.norm())
    assert report.weight_error == pytest.approx(residual / total if total else 0.0, rel=1e-6, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    x1, x2 = (torch.randn(2, 5, size, generator=generator).to(layer.weight.dtype) for size in exact.shape[1:])
    expected = reference.bilinear_dense(x1.double(), x2.double(), stored, layer.bias.detach().double())
    with torch.no_grad():
        output = module(x1, x2)
    assert output.dtype == layer.weight.dtype
    assert_matches_reference(output, expected)


def test_every_layer_is_reported(after):
    assert list(after[1]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_right_or_the_reason_clear(before, after, way, name):
    model, reports = after
    layer, module, report = before.get_submodule(name), model.get_submodule(name), reports[name]
    if way in KEPT.get(name, ()):
        assert report.decision == "kept"
        assert REASONS[name] in report.reason
        assert type(module) is type(layer)
    else:
        assert (report.decision, report.reason) == ("replaced", "as configured")
        assert module.method == report.method
        assert report.bytes_after < report.bytes_before
        assert_right(layer, module, report)


def test_sharing_and_flags_are_kept(after):
    model, reports = after
    assert model.shared is model.alias
    assert reports["shared"].aliases == ("alias",)
    assert not any(parameter.requires_grad for parameter in model.frozen.parameters())
    assert not any(part.training for part in model.frozen.modules())
    assert all(parameter.requires_grad for parameter in model.shared.parameters())


def test_a_layer_that_is_the_model(way):
    layer = planted(9, 8, 7, 11)
    module, report = cb.compress(layer, CONFIGS[way], measure_latency=False)
    assert report.layers[0].decision == "replaced"
    assert_right(layer, module, report.layers[0])
