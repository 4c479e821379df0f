"""A callback of Lightning: it compresses the network when training ends, and saves it for use."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compress_bilinear as cb


class Fusion(nn.Module):
    """Two halves of a digit (N, 32), (N, 32) to class logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion, self.head = nn.Bilinear(32, 32, 64), nn.Linear(64, 10)

    def forward(self, top: Tensor, bottom: Tensor) -> Tensor:
        return self.head(torch.relu(self.fusion(top, bottom)))


class Task(L.LightningModule):  # type: ignore[misc]  # which mypy does not read
    """Trains a network on batches of (top, bottom, label)."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = Fusion()

    def training_step(self, batch: Sequence[Tensor]) -> Tensor:
        *views, labels = batch
        return nn.functional.cross_entropy(self.net(*views), labels)

    def test_step(self, batch: Sequence[Tensor]) -> None:
        *views, labels = batch
        self.log("accuracy", (self.net(*views).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Compress(L.Callback):  # type: ignore[misc]
    """Replaces `task.net` by the compressed network, which `path` then holds: `cb.load(path, Fusion())` reads it.

    It works on the network, not on the task, whose trainer, loggers and hooks are no part of what is saved.
    """

    report: cb.Report

    def __init__(self, config: cb.AutoConfig, path: Path) -> None:
        self.config, self.path = config, path

    def on_fit_end(self, trainer: L.Trainer, task: Task) -> None:
        batches = [tuple(views) for *views, _ in trainer.train_dataloader]
        task.net, self.report = cb.compress(task.net.eval(), self.config, calibration=batches)
        if trainer.is_global_zero:
            cb.save(task.net, self.path)


def main() -> cb.Report:
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(images))
    top, bottom = (images[order].float() / 8 - 1).split(32, dim=1)
    data = TensorDataset(top, bottom, labels[order])
    train = DataLoader(TensorDataset(*data[:1250]), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(*data[1250:]), batch_size=len(images))

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    task = Task()
    with TemporaryDirectory() as folder:
        compress = Compress(cb.AutoConfig(size=1 / 8), Path(folder) / "small.safetensors")
        trainer = L.Trainer(max_epochs=12, accelerator="cpu", callbacks=[compress], **quiet)
        trainer.fit(task, train)
        [scores] = trainer.test(task, test, verbose=False)
        again = cb.load(compress.path, Fusion())
    print(compress.report)
    print(f"Accuracy after: {scores['accuracy']:.4f}")
    with torch.no_grad():
        assert torch.equal(again.eval()(top, bottom), task.net(top, bottom))
    return compress.report


if __name__ == "__main__":
    main()
