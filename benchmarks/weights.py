"""The tensors that solvers are measured on: trained weights, power-law ones, and small ones with exact answers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import link_prediction
from compress_bilinear.cli import _demo as demo

Rank3 = tuple[int, int, int]


@dataclass(frozen=True)
class Weight:
    """A tensor and the ranks at which it is decomposed; a rank of None means that the method is left out.

    Attributes:
        exact: count over many seeds how often CP finds the answer, instead of timing all contestants.
        tolerance: the relative error that counts as found; None where no exact answer of this rank exists.
        targets: `MaxError` targets to meet besides.
    """

    name: str
    build: Callable[[], Tensor]
    cp_rank: int | None = None
    tucker_rank: Rank3 | None = None
    exact: bool = False
    tolerance: float | None = None
    targets: tuple[float, ...] = ()

    def path(self, folder: Path) -> Path:
        """Where `write` puts it."""
        return folder / f"{self.name}.safetensors"

    def write(self, folder: Path) -> None:
        """Build it once, for the processes that `read` it; the training of the trained ones takes a minute."""
        if not self.path(folder).exists():
            save_file({"weight": self.build().detach().contiguous()}, self.path(folder))

    def read(self, folder: Path) -> Tensor:
        """What `write` wrote, in memory of its own: a mapped file would be paged in while something is measured."""
        return load_file(self.path(folder))["weight"].clone()


def power_law(shape: Rank3, power: float = 0.5) -> Tensor:
    """Gaussian, scaled by index^-power along each of three randomly rotated axes: 1/2 is slow, as in trained ones."""
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(shape, generator=generator)
    for mode, size in enumerate(shape):
        decay = torch.arange(1, size + 1).rsqrt().pow(2 * power)
        core.mul_(decay.view([-1 if axis == mode else 1 for axis in range(3)]))
    first, second, third = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for size in shape)
    weight = (first @ core.flatten(1)).view(shape)
    weight = second @ weight @ third.T
    return weight / weight.norm()


def matrix_product(m: int, n: int, p: int) -> Tensor:
    """⟨m, n, p⟩, the bilinear map of an m x n and an n x p matrix: (mp, mn, np). 2x2 has rank 7 (Strassen, 1969)."""
    weight = torch.zeros(m, p, m, n, n, p, dtype=torch.float64)
    for i in range(m):
        for j in range(n):
            for k in range(p):
                weight[i, k, i, j, j, k] = 1
    return weight.view(m * p, m * n, n * p)


def complex_product() -> Tensor:
    """The product of two complex numbers: (2, 2, 2), rank 3."""
    return torch.tensor([[[1, 0], [0, -1]], [[0, 1], [1, 0]]], dtype=torch.float64)


def border_rank() -> Tensor:
    """aab + aba + baa: rank 3, but rank 2 comes as close as you like with components that grow and cancel."""
    weight = torch.zeros(2, 2, 2, dtype=torch.float64)
    weight[0, 0, 1] = weight[0, 1, 0] = weight[1, 0, 0] = 1
    return weight


def collinear(shape: Rank3, rank: int, cosine: float) -> Tensor:
    """An exact CP whose columns have the same cosine with each other, in every factor; ALS swamps on these."""
    generator = torch.Generator().manual_seed(0)
    gram = torch.full((rank, rank), cosine, dtype=torch.float64).fill_diagonal_(1.0)
    root = torch.linalg.cholesky(gram, upper=True)
    draws = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in shape)
    out, in1, in2 = (torch.linalg.qr(draw)[0] @ root for draw in draws)
    return torch.einsum("or,ir,jr->oij", out, in1, in2)


def hilbert(size: int) -> Tensor:
    """1 / (i + j + k - 2) from i = j = k = 1: singular values fall so fast that rounding shows."""
    index = torch.arange(size, dtype=torch.float64)
    return 1 / (index[:, None, None] + index[:, None] + index + 1)


def _digits(epochs: int = demo.EPOCHS) -> Tensor:
    return demo.train(demo.load_digits(), epochs=epochs).fusion.weight


def _links() -> Tensor:
    return link_prediction.train().fusion.weight


def _eighth(shape: Rank3) -> int:
    """The CP rank of an eighth of the parameters."""
    return math.prod(shape) // 8 // sum(shape)


def _third(shape: Rank3) -> Rank3:
    out, in1, in2 = (size // 3 for size in shape)
    return out, in1, in2


_DIGITS = (64, 64, 64)
_LINKS = (link_prediction.ENTITY_DIM, link_prediction.ENTITY_DIM, link_prediction.RELATION_DIM)
_TARGETS = (0.6, 0.3, 0.2, 0.1)

TRAINED = (
    Weight("digits", _digits, _eighth(_DIGITS), _third(_DIGITS), targets=_TARGETS),
    Weight("link_prediction", _links, _eighth(_LINKS), _third(_LINKS), targets=_TARGETS),
)
SYNTHETIC = (
    Weight("power_50x100x100", lambda: power_law((50, 100, 100)), 64, (16, 32, 32)),
    Weight("power_128x128x128", lambda: power_law((128, 128, 128)), 64, (32, 32, 32)),
    Weight("power_128x128x128_r128", lambda: power_law((128, 128, 128)), 128),
    Weight("power_97x148x148", lambda: power_law((97, 148, 148)), 64, (32, 48, 48)),
    Weight("power_97x768x768", lambda: power_law((97, 768, 768)), 64, (32, 96, 96)),
)
EXACT = (
    Weight("hilbert_60", lambda: hilbert(60), tucker_rank=(8, 8, 8)),
    Weight("complex_r3", complex_product, 3, exact=True, tolerance=1e-6),
    Weight("matmul_222_r7", lambda: matrix_product(2, 2, 2), 7, exact=True, tolerance=1e-6),
    Weight("matmul_223_r11", lambda: matrix_product(2, 2, 3), 11, exact=True, tolerance=1e-6),
    Weight("collinear_r24", lambda: collinear((32, 64, 64), 24, 0.9), 24, exact=True, tolerance=1e-5),
    Weight("border_r2", border_rank, 2, exact=True),
    Weight("matmul_222_r6", lambda: matrix_product(2, 2, 2), 6, exact=True),
)
QUICK = (
    Weight("quick_power", lambda: power_law((8, 12, 10)), 6, (3, 4, 4)),
    Weight("quick_digits", lambda: _digits(epochs=1), targets=(0.6,)),
    Weight("quick_complex_r3", complex_product, 3, exact=True, tolerance=1e-6),
)
SUITE = (*TRAINED, *SYNTHETIC, *EXACT)
