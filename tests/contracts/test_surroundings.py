"""What a program has set before it calls: a default dtype, a default device, and no gradients."""

from contextlib import contextmanager, nullcontext
from itertools import product

import pytest
import torch
from torch import nn

import compress_bilinear as cb

CONFIGS = [
    cb.CPConfig(rank=6, quantize="int8"),
    cb.TuckerConfig(rank=(5, 9, 10), quantize="nf4"),
    cb.TuckerConfig(rank=cb.MaxError(0.6)),
    cb.DenseConfig(quantize="int8"),
    cb.AutoConfig(size=0.3),
]
PLAIN = {"device": "cpu", "dtype": torch.float32}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rel, self.head = nn.Bilinear(12, 11, 8, **PLAIN), nn.Linear(8, 3, **PLAIN)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, **PLAIN))

    def forward(self, x, y):
        return self.head(self.rel(x, y))


def rows(count=64):
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.randn(count, size, generator=generator, **PLAIN) for size in (12, 11))


def everything(config, path, *, calibrated):
    """Compress, save, load and run. Returns the layer's report and the outputs."""
    data = [rows(count) for count in range(60, 68)] if calibrated else None
    small, report = cb.compress(Net(), config, calibration=data, force=True, progress=False)
    cb.save(small, path)
    loaded, (x, y) = cb.load(path, Net()), rows()
    assert str(report)
    assert report.to_json()
    layer = loaded.rel
    with torch.no_grad():
        parts = [
            loaded(x, y),
            layer.pairwise(x, y),
            layer.pairwise_sum(x.unsqueeze(1), y.unsqueeze(1)),
            layer.to_dense(),
            layer.indexed(x, torch.zeros_like(x[:, 0]).int()),
        ]
        parts.append(layer.blockwise(x.unflatten(1, (2, 6)), y.unsqueeze(1).expand(-1, 2, -1)))
    return report.layers[0], parts


BY_DEFAULT = [(CONFIGS[0], False), (CONFIGS[1], True), (CONFIGS[3], False), (CONFIGS[4], True)]  # the others are slow


@pytest.mark.parametrize(
    ("config", "calibrated"),
    [
        pytest.param(*pair, marks=() if pair in BY_DEFAULT else pytest.mark.slow, id=f"{pair[0]} {pair[1]}")
        for pair in product(CONFIGS, [False, True])
    ],
)
def test_they_change_nothing(config, calibrated, tmp_path):
    expected, outputs = everything(config, tmp_path / "net.safetensors", calibrated=calibrated)
    for name, surrounding in SURROUNDINGS.items():
        with surrounding():
            found, others = everything(config, tmp_path / "other.safetensors", calibrated=calibrated)
        assert (found.method, found.rank, found.quantize, found.decision) == (
            (expected.method, expected.rank, expected.quantize, expected.decision)
        ), name
        assert found.weight_error == pytest.approx(expected.weight_error, rel=1e-3), name
        for one, other in zip(outputs, others, strict=True):
            assert (other.dtype, other.device.type) == (one.dtype, "cpu"), name
            assert float((one - other).norm()) <= 1e-2 * float(one.norm()), name


@pytest.mark.parametrize(
    "surrounding", [torch.no_grad, torch.inference_mode, nullcontext], ids=["no_grad", "inf", "none"]
)
def test_what_was_made_can_be_trained(surrounding):
    with surrounding():
        small, _ = cb.compress(Net(), cb.CPConfig(rank=4), calibration=[rows()], force=True, progress=False)
    small(*rows()).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
