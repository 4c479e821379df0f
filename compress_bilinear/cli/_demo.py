"""The main job on real data: train a small network, compress it in five ways, and see whether its accuracy survives.

The data is scikit-learn's bundled copy of the UCI handwritten digits (1,797 images of 8 x 8). A network looks at the
top and the bottom half of an image as two views and fuses them by an `nn.Bilinear`, the form in which such layers
occur in multimodal networks.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from ..config import Config, CPConfig, DenseConfig, MaxSize, TuckerConfig
from ..errors import CompressionError
from ..files import load, save
from ..planning import compress
from ..report import COLUMNS, LayerReport, Note, Report, compact_table, effective, figure

EPOCHS = 30
_BATCH = 64

CONFIGS: dict[str, Config] = {
    "CP": CPConfig(rank=MaxSize(0.25)),
    "CP int8": CPConfig(rank=MaxSize(0.0625), quantize="int8"),
    "Tucker": TuckerConfig(rank=MaxSize(0.25)),
    "Tucker int8": TuckerConfig(rank=MaxSize(0.0625), quantize="int8"),
    "int8": DenseConfig(quantize="int8"),
}
"""What is compared: a quarter of the bytes by CP, by Tucker and by int8 alone, and a sixteenth by both at once."""


class TwoViews(nn.Module):
    """Two views of a digit, each encoded, fused by an `nn.Bilinear`, then classified: (N, 32), (N, 32) -> (N, 10)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.top = nn.Sequential(nn.Linear(32, width), nn.Tanh())
        self.bottom = nn.Sequential(nn.Linear(32, width), nn.Tanh())
        self.fusion = nn.Bilinear(width, width, width)
        self.head = nn.Linear(width, 10)

    def forward(
        self,
        top: Tensor,  # (N, 32)
        bottom: Tensor,  # (N, 32)
    ) -> Tensor:  # (N, 10)
        fused = self.fusion(self.top(top), self.bottom(bottom))
        logits: Tensor = self.head(torch.relu(fused))
        return logits


@dataclass(frozen=True, eq=False)
class Digits:
    """Two halves of each image, (N, 32) each with values in [-1, 1], and the labels (N,); 70% to train, 30% to test."""

    train: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]

    @property
    def batches(self) -> Sequence[tuple[Tensor, Tensor]]:
        """The training inputs in batches, without labels: what calibration takes."""
        top, bottom, _ = self.train
        return list(zip(top.split(_BATCH), bottom.split(_BATCH), strict=True))


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    name: str
    layer: LayerReport
    accuracy: float


def load_digits(seed: int = 0) -> Digits:
    """Read and split the bundled digits. Raises: CompressionError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as cause:
        raise CompressionError(
            "The demo's data needs scikit-learn. Found none: pip install 'compress-bilinear[demo]'."
        ) from cause
    images, labels = bundled(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed), device="cpu")
    pixels = torch.as_tensor(images, dtype=torch.float32)[order] / 8 - 1
    classes = torch.as_tensor(labels)[order]
    count = int(0.7 * len(order))
    parts = (pixels[:, :32].contiguous(), pixels[:, 32:].contiguous(), classes)
    first, second = (part[:count] for part in parts), (part[count:] for part in parts)
    return Digits(tuple(first), tuple(second))  # type: ignore[arg-type]


def train(data: Digits, seed: int = 0, epochs: int = EPOCHS, progress: bool = False) -> TwoViews:
    """Train the network by Adam with weight decay; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TwoViews()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        top, bottom, labels = data.train
        console = Console(stderr=True)
        for _ in track(range(epochs), "Training", console=console, transient=True, disable=not progress):
            for batch in torch.randperm(len(labels)).split(_BATCH):
                loss = nn.functional.cross_entropy(model(top[batch], bottom[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, data: Digits) -> float:
    """The share of test images that are classified rightly."""
    top, bottom, labels = data.test
    with torch.no_grad():
        return float((model(top, bottom).argmax(1) == labels).double().mean())


def run(
    folder: str | os.PathLike[str] | None = None, seed: int = 0, progress: bool = False
) -> tuple[list[Row], Report]:
    """Train, compress in every way of `CONFIGS`, save, reload and verify.

    Args:
        folder: where the compressed networks stay, one file each; None keeps them in a temporary folder.
        seed: of the split and the training.
        progress: show progress bars on stderr.

    Returns:
        A row for the original and one for each way; and the report of the last.

    Raises: CompressionError without scikit-learn, or where a reloaded network differs from the one that was saved.
    """
    data = load_digits(seed)
    model = train(data, seed, progress=progress)
    before = accuracy(model, data)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(folder) if folder is not None else Path(scratch)
        target.mkdir(parents=True, exist_ok=True)
        for name, config in CONFIGS.items():
            compressed, report = compress(model, config, calibration=data.batches, progress=progress)
            path = target / f"{name.lower().replace(' ', '_')}.safetensors"
            save(compressed, path)
            _verify(compressed, load(path, TwoViews().eval()), data, path)
            layer = report.layers[0]
            shown = name if layer.decision == "replaced" else f"{name} (kept)"
            rows.append(Row(shown, layer, accuracy(compressed, data)))
    return [_original(rows[0].layer, before), *rows], report


def _verify(compressed: nn.Module, reloaded: nn.Module, data: Digits, path: Path) -> None:
    top, bottom, _ = data.test
    with torch.no_grad():
        if not torch.equal(compressed(top, bottom), reloaded(top, bottom)):
            raise CompressionError(f"{str(path)!r} should reload to the network that was saved. Found other outputs.")


def _original(layer: LayerReport, before: float) -> Row:
    sizes: dict[str, Any] = {f"{what}_after": getattr(layer, f"{what}_before") for what in ("params", "bytes", "flops")}
    kept = replace(
        layer, method="nn.Bilinear", decision="kept", notes=(Note("original", "the original"),), front=(), **sizes
    )
    return Row("nn.Bilinear", effective(kept), before)


def table(rows: Sequence[Row]) -> Table:
    """The demo's table."""
    columns = ("Method", "Rank", "Bytes", "Smaller", *COLUMNS[2:4], *COLUMNS[-2:], "Accuracy")
    figures = ("bytes_after", "times_smaller", "weight_error", "output_error", "speedup", "speedup_vs_dense")
    lines = [
        [
            row.name,
            figure(row.layer.rank).replace(" ", ""),
            *(figure(getattr(row.layer, name), name) for name in figures),
            f"{row.accuracy:.4f}",
        ]
        for row in rows
    ]
    return compact_table("The fusion layer of a network on two halves of a digit", columns, lines)
