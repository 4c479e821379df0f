"""A checkpoint without its network's code: inspected, compressed and compared on the command line."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import compress_bilinear as cb


class Net(nn.Module):
    """Only the last step, `cb.load`, needs this."""

    def __init__(self) -> None:
        super().__init__()
        self.fusion, self.head = nn.Bilinear(48, 48, 32), nn.Linear(32, 10)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.head(self.fusion(x1, x2).relu())


def run(folder: str, command: str) -> str:
    """`compress-bilinear ...`, as in a shell."""
    program = [sys.executable, "-m", "compress_bilinear", *command.split()]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True, check=True).stdout


def main() -> cb.Report:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(Net().state_dict(), Path(folder) / "model.pt")  # yours comes trained
        print(run(folder, "inspect model.pt"))
        print(run(folder, "compress model.pt -o small.safetensors --layers fusion --method dense --quantize int8"))
        text = run(folder, "report model.pt small.safetensors --format json")
        model = cb.load(Path(folder) / "small.safetensors", Net())
    print(model)
    return cb.Report.from_json(text)


if __name__ == "__main__":
    main()
