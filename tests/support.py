"""What the tests share: one tolerance table, the comparison that uses it, and small layers."""

import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress_bilinear import cli
from compress_bilinear.fitting import Latency, LayerInputs, Timing
from compress_bilinear.planning import _verdict as selection

Run = Callable[..., tuple[int, str, str]]
"""Of the fixture `run`: the command line with some arguments; its status, stdout and stderr."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# The tolerances of all tests; what a storage format may lose is `Format.error`.
# Of outputs, relative to the largest entry of the reference: products of up to a few hundred terms
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Of a whole tensor that is rounded to a dtype and loses nothing else: the relative Frobenius error
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

# (I, J, O): odd, oblong either way, the output largest, and each dimension of size 1
SHAPES = ((37, 63, 17), (63, 37, 17), (7, 5, 80), (1, 9, 3), (9, 1, 3), (5, 6, 1))


def assert_matches_reference(found: Tensor, reference: Tensor, factor: float = 1.0) -> None:
    """`found` equals a float64 reference, up to the tolerance of its own dtype times `factor`."""
    assert found.shape == reference.shape
    assert bool(torch.isfinite(found).all())
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    tolerance = factor * TOLERANCES[found.dtype] * max(scale, 1e-30)
    torch.testing.assert_close(found.double(), reference.double(), rtol=0, atol=tolerance)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int | None = None) -> Tensor:
    """Gaussian numbers, the same in every dtype up to rounding; without a seed, others for every sum of sizes."""
    generator = torch.Generator().manual_seed(sum(shape) if seed is None else seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def bilinear(
    in1: int, in2: int, out: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Bilinear:
    """A seeded `nn.Bilinear`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Bilinear(in1, in2, out, bias=bias, dtype=dtype)


def low_rank(shape: tuple[int, int, int], rank: int, *, noise: float = 0.0, seed: int = 0) -> Tensor:
    """A float64 tensor of CP rank `rank`, plus relative noise."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape]
    exact = torch.einsum("or,ir,jr->oij", *factors)
    added = torch.randn(shape, generator=generator, dtype=torch.float64)
    return exact + noise * exact.norm() / added.norm() * added


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Bit for bit the state that `state_of` copied."""
    now = model.state_dict()
    assert list(now) == list(before)
    for name, value in before.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str
) -> tuple[int, str, str]:
    """Run the command line with some arguments: its status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["compress-bilinear", *args])
    status = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    return status, *capsys.readouterr()


def timed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing takes no time, and finds that a replacement is half as fast."""
    latencies = Latency(2, 1, 3), Latency(4, 3, 5), Latency(1, 1, 1)
    monkeypatch.setattr(
        selection, "time_replacement", lambda layer, module, rows, seconds: Timing(*latencies, "outer", rows)
    )


def assert_refused(run: Run, folder: Path, args: tuple[str, ...], problem: str) -> None:
    """A mistake is one line on stderr and status 2, and no file comes or goes."""
    before = sorted(folder.rglob("*"))
    status, _, err = run(*args)
    assert status == 2
    assert problem in err
    assert err.startswith("compress-bilinear: error: ")
    assert err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


class Memory(TorchDispatchMode):
    """Elements of the largest tensor that an operator makes, and of all that are alive at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._made(leaf.untyped_storage(), leaf.untyped_storage().nbytes() // leaf.element_size())
        return result

    def _made(self, storage, elements):
        self.alive += elements
        self.largest, self.peak = max(self.largest, elements), max(self.peak, self.alive)
        weakref.finalize(storage, self._freed, elements)

    def _freed(self, elements):
        self.alive -= elements


def layer_inputs(first: Tensor, second: Tensor, calls: int = 1) -> LayerInputs:
    """What calibration would take of these rows (n, I) and (n, J), in their order."""
    return LayerInputs(first, second, len(first), calls)
