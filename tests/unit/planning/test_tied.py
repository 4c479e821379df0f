"""Several `nn.Bilinear`s with one weight: stored once, replaced under all names, shared afterwards."""

import copy

import pytest
import torch
from support import assert_same_state, state_of
from torch import nn

import compress_bilinear as cb

CP = cb.CPConfig(rank=6)
QUIET = {"measure_latency": False, "progress": False}


class Tied(nn.Module):
    """Two modules in different places; each sees inputs of its own."""

    def __init__(self, bias: str = "tied") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Bilinear(12, 10, 8, bias=bias != "none")
        self.other = nn.ModuleDict({"rel": nn.Bilinear(12, 10, 8, bias=bias != "none")})
        self.other["rel"].weight = self.first.weight
        if bias == "tied":
            self.other["rel"].bias = self.first.bias

    def forward(self, x, y, z):
        return torch.cat([self.first(x, y), self.other["rel"](z, y)], -1)


def batches(count=8):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(12) < 6
    draws = [[torch.randn(16, size, generator=generator) for size in (12, 10, 12)] for _ in range(count)]
    return [(x * mask, y, z * ~mask) for x, y, z in draws]


@pytest.mark.parametrize("bias", ["tied", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_one_replacement_takes_the_place_of_all(bias, inplace, tmp_path):
    net = Tied(bias)
    before = state_of(net)
    small, report = cb.compress(
        copy.deepcopy(net) if inplace else net, CP, calibration=batches(), force=True, inplace=inplace, **QUIET
    )
    assert_same_state(net, before)
    (layer,) = report.layers
    assert (layer.name, layer.aliases) == ("first", ("other.rel",))
    assert layer.bytes_before == sum(4 * value.numel() for value in net.parameters())
    assert small.first is small.other["rel"]
    assert isinstance(small.first, cb.CPBilinear)
    # the halves of the first input come from one module each: fitted to both
    assert layer.calibration_rows >= 32
    assert layer.output_error < 0.9
    cb.save(small, tmp_path / "small.safetensors")
    again = cb.load(tmp_path / "small.safetensors", Tied(bias))
    assert again.first is again.other["rel"]
    assert torch.equal(again(*batches(1)[0]), small(*batches(1)[0]))


def test_distilled_it_stays_one():
    small, _ = cb.compress(
        Tied(), CP, calibration=batches(), force=True, refine="network", max_seconds=3, measure_latency=False
    )
    assert small.first is small.other["rel"]


def test_with_biases_of_their_own_they_are_kept_and_the_way_out_is_told():
    net = Tied("own")
    small, report = cb.compress(net, CP, **QUIET)
    assert [layer.decision for layer in report.layers] == ["kept", "kept"]
    assert "nn.Bilinears with one bias or none" in report.layers[0].reason
    assert small.first.weight is small.other["rel"].weight


def test_a_pattern_may_name_any_of_them_and_hooks_on_one_keep_all():
    plan = cb.plan(Tied(), {"other.*": CP}, force=True, **QUIET)
    assert plan.apply()[0].first.rank == 6
    net = Tied()
    net.other["rel"].register_forward_hook(lambda *args: None)
    (layer,) = cb.plan(net, CP, **QUIET).report.layers
    assert "it has forward hooks" in layer.reason
