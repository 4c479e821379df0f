"""What follows from a format's row in the table without another line of code; `test_worked_examples.py` runs this file.

Not collected by itself: the formats that it tests are in a copy of the package.
"""

import copy
import math
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from support import Run, low_rank
from torch import nn

import compress_bilinear as cb
from compress_bilinear.config import Quantize
from compress_bilinear.errors import ConfigError
from compress_bilinear.fitting import stored_bytes
from compress_bilinear.quantization import FORMATS, QuantizedTensor

ADDED = [name for name in get_args(Quantize) if name not in ("bf16", "int8", "nf4")]
OUT, IN1, IN2 = 20, 30, 24

CONFIGS = {
    "cp": lambda quantize: cb.CPConfig(rank=6, quantize=quantize),
    "tucker": lambda quantize: cb.TuckerConfig(rank=(6, 6, 6), quantize=quantize),
    "interpolative tucker": lambda quantize: cb.TuckerConfig(rank=(18, 25, 24), quantize=quantize),
    "dense": lambda quantize: cb.DenseConfig(quantize=quantize),
}
for_each = pytest.mark.parametrize("quantize", ADDED)
for_configs = pytest.mark.parametrize(
    "config",
    [
        pytest.param(c, id=n, marks=[pytest.mark.slow] if n == "interpolative tucker" else [])
        for n, c in CONFIGS.items()
    ],
)
calibrated_or_not = pytest.mark.parametrize("calibrated", [False, True], ids=["weight", "outputs"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rel = nn.Bilinear(IN1, IN2, OUT)
        with torch.no_grad():
            self.rel.weight.copy_(low_rank((OUT, IN1, IN2), 6, noise=0.05) / 10)

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        return self.rel(x1, x2)


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(128, size, generator=generator) for size in (IN1, IN2)) for _ in range(count)]


@cache
def compressed(config, calibrated: bool = False, **options):
    """A compressed network, which nobody changes, and its report."""
    calibration = batches() if calibrated else None
    options = {"force": True, "measure_latency": False, "progress": False} | options
    return cb.compress(Net(), config, calibration=calibration, **options)


def test_there_is_one() -> None:
    assert ADDED


@for_each
@for_configs
@calibrated_or_not
def test_errors_are_near_those_expected_and_bytes_are_counted_right(config, calibrated, quantize):
    (_, exact), (small, report) = compressed(config(None), calibrated), compressed(config(quantize), calibrated)
    (plain,), (layer,) = exact.layers, report.layers
    assert layer.decision == "replaced"
    assert layer.weight_error <= math.hypot(plain.weight_error, 1.5 * FORMATS[quantize].error)
    if calibrated:
        assert layer.output_error <= math.hypot(plain.output_error, 1.5 * FORMATS[quantize].error)
    assert layer.bytes_after == stored_bytes(small.rel) < layer.bytes_before
    formats = {part.format.name for part in small.modules() if isinstance(part, QuantizedTensor)}
    assert formats == {layer.quantize} == {quantize}
    assert quantize in str(report)
    assert quantize in report.to_json()


@for_each
@for_configs
def test_files_hold_the_very_values(config, quantize, tmp_path):
    small, _ = compressed(config(quantize))
    cb.save(small, tmp_path / "small.safetensors")
    again = cb.load(tmp_path / "small.safetensors", Net())
    inputs = batches(1)[0]
    assert torch.equal(again(*inputs), small(*inputs))
    half = [value.half() for value in inputs]
    assert torch.equal(again.half()(*half), copy.deepcopy(small).half()(*half))


@for_each
@for_configs
def test_layers_are_decoded_and_encoded_again(config, quantize):
    small, _ = compressed(config(quantize))
    floating = cb.dequantize(small)
    assert small.rel.quantize == quantize
    assert floating.rel.quantize is None
    again = cb.quantize(floating, quantize)
    torch.testing.assert_close(again.rel.to_dense(), small.rel.to_dense(), rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="only int8 is multiplied as integers"):
        cb.set_compute(small, "int8")


@pytest.mark.slow
@for_each
@pytest.mark.parametrize("rank", [cb.MaxSize(0.1), cb.MaxError(0.2)], ids=["size", "error"])
@pytest.mark.parametrize("kind", [cb.CPConfig, cb.TuckerConfig])
def test_targets_count_what_is_stored(kind, rank, quantize):
    (layer,) = compressed(kind(rank=rank, quantize=quantize))[1].layers
    if isinstance(rank, cb.MaxSize):
        assert layer.bytes_after <= rank.fraction * layer.bytes_before
    else:
        assert layer.weight_error <= rank.error


@pytest.mark.slow
@for_each
def test_the_search_tries_it(quantize):
    _, report = compressed(cb.AutoConfig(size=0.1), calibrated=True, max_seconds=2)
    assert ("dense", quantize) in {(point.method, point.quantize) for point in report.layers[0].front}


@pytest.mark.slow
@for_each
def test_it_is_distilled(quantize):
    _, report = compressed(cb.CPConfig(rank=6, quantize=quantize), calibrated=True, refine="network", max_seconds=1)
    assert report.layers[0].quantize == quantize


@for_each
def test_the_command_line_takes_it(quantize: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Net().state_dict(), "model.pt")
    arguments = "--method", "cp", "--rank", "6", "--quantize", quantize
    assert run("compress", "model.pt", "-o", "small.safetensors", *arguments)[::2] == (0, "")
    status, output, _ = run("inspect", "small.safetensors")
    assert status == 0
    assert quantize in output
