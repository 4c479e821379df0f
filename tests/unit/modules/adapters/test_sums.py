"""Adapters of modules that sum products before their weight (outer product means, triplets of edges), or matrices."""

import pytest
import torch
from torch import nn

import compress_bilinear as cb


class OuterMean(nn.Module):
    """An outer product mean with a mask (S, N): (S, N, size) -> (N, N, out)."""

    def __init__(self, size=10, hidden=6, out=8):
        super().__init__()
        self.norm, self.left, self.right = nn.LayerNorm(size), nn.Linear(size, hidden), nn.Linear(size, hidden)
        self.out = nn.Linear(hidden**2, out)

    def parts(self, m, mask):
        m = self.norm(m)
        return (part(m) * mask.unsqueeze(-1) for part in (self.left, self.right))

    def forward(self, m, mask):
        outer = torch.einsum("sic,sjd->ijcd", *self.parts(m, mask))
        return self.out(outer.flatten(-2)) / (1e-3 + mask.T @ mask).unsqueeze(-1)


class Triplets(nn.Module):
    """Sums over the neighbours of each edge before the weight: (E, S, 7), (E, S, size) -> (E, out)."""

    def __init__(self, size=10, out=8):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, size, out))

    def forward(self, radial, messages):
        return torch.einsum("nie,ieo->no", radial.mT @ messages, self.weight)


def outer_mean(module, layer, m, mask):
    return layer.pairwise_sum(*module.parts(m, mask)) / (1e-3 + mask.T @ mask).unsqueeze(-1)


def triplets(module, layer, radial, messages):
    return layer.pairwise_sum(radial.unsqueeze(-2), messages.unsqueeze(-2))[:, 0, 0]


def register(**changes):
    own = {"to_weight": lambda m: m.out.weight.view(-1, 6, 6), "to_bias": lambda m: m.out.bias, "call": outer_mean}
    cb.register_adapter(OuterMean, **own | changes)
    cb.register_adapter(Triplets, to_weight=lambda m: m.weight.permute(2, 0, 1), call=triplets)


CASES = {
    "outer": (OuterMean, lambda: (torch.randn(5, 9, 10), (torch.rand(5, 9) > 0.2).float()), (8, 6, 6)),
    "triplets": (Triplets, lambda: (torch.randn(40, 5, 7), torch.randn(40, 5, 10)), (8, 7, 10)),
}


@pytest.mark.parametrize("config", ["full Tucker", "CP", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_fitted_to_products_serves_their_sums(case, config, tmp_path):
    torch.manual_seed(0)
    register()
    kind, batch, shape = CASES[case]
    model, batches = kind().eval(), [batch() for _ in range(6)]
    asked = {
        "full Tucker": cb.TuckerConfig(rank=shape),
        "CP": cb.CPConfig(rank=36),
        "int8": cb.DenseConfig(quantize="int8"),
    }[config]
    small, report = cb.compress(model, asked, calibration=batches, force=True, measure_latency=False)
    (layer,) = report.layers
    assert (layer.decision, layer.shape) == ("replaced", shape), layer.reason
    assert layer.calibration_rows > 0
    with torch.no_grad():
        exact, found = model(*batches[0]), small(*batches[0])
        assert (found - exact).norm() <= {"full Tucker": 1e-5, "CP": 0.2, "int8": 0.02}[config] * exact.norm()
        cb.save(small, tmp_path / "small.safetensors")
        assert torch.equal(cb.load(tmp_path / "small.safetensors", kind()).eval()(*batches[0]), found)


def test_a_call_that_leaves_out_a_part_is_told():
    register(call=lambda module, layer, m, mask: layer.pairwise_sum(*module.parts(m, mask)))
    batches = [CASES["outer"][1]() for _ in range(4)]
    _, report = cb.compress(OuterMean(), cb.DenseConfig(quantize="int8"), calibration=batches, measure_latency=False)
    assert "`call` of the adapter 'OuterMean' is not its own forward: in float64 they differ" in report.layers[0].reason


class Basis(nn.Module):
    """Matrices of relations that are sums of a few: rows (N, 12) with the number of their relation (N,)."""

    def __init__(self):
        super().__init__()
        self.basis, self.shares = nn.Parameter(torch.randn(3, 12, 10)), nn.Parameter(torch.randn(9, 3))

    def forward(self, x, k):
        return torch.einsum("ni,nb,bio->no", x, self.shares[k], self.basis)


def test_a_weight_that_is_made_of_fewer_numbers_is_kept_and_its_factor_replaced():
    torch.manual_seed(0)
    model, batch = Basis(), (torch.randn(40, 12), torch.arange(40) % 9)
    whole = {
        "to_weight": lambda m: torch.einsum("rb,bio->oir", m.shares, m.basis),
        "call": lambda m, layer, x, k: layer.indexed(x, k),
    }
    part = {
        "to_weight": lambda m: m.basis.permute(2, 1, 0),
        "call": lambda m, layer, x, k: layer(x, m.shares[k]),
    }
    found = []
    for stated in (whole, part):
        cb.register_adapter(Basis, example=lambda m: batch, **stated)
        small, report = cb.compress(model, cb.DenseConfig(quantize="int8"), force=True, measure_latency=False)
        found += report.layers
    assert found[0].decision == "kept"
    assert "its weight of 1080 entries is computed from 387, so that it is compressed already" in found[0].reason
    assert (found[1].decision, found[1].shape) == ("replaced", (10, 12, 3))
    with torch.no_grad():
        assert (small(*batch) - model(*batch)).norm() < 0.02 * model(*batch).norm()
