"""A checkpoint in several files, as large networks come: compressed on the command line, and loaded in Python."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import compress_bilinear as cb


class Net(nn.Module):
    """Two words (N,), (N,) to logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, 48)
        self.fusion, self.head = nn.Bilinear(48, 48, 32), nn.Linear(32, 10)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.head(self.fusion(self.words(first), self.words(second)).relu())


def main() -> cb.Report:
    torch.manual_seed(0)
    original = Net()  # yours comes trained, in files that somebody else wrote
    first, second = torch.randint(0, 1000, (2, 512))
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large", Path(folder) / "small"
        large.mkdir()
        small.mkdir()
        names: dict[str, str] = {}
        for name, value in original.state_dict().items():
            names[name] = f"part-{len(names)}.safetensors"
            save_file({name: value}, large / names[name])
        (large / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        rows = {"fusion.input1": original.words(first), "fusion.input2": original.words(second)}
        save_file({name: value.detach() for name, value in rows.items()}, Path(folder) / "rows.safetensors")

        output = "small/model.safetensors.index.json"  # a name that ends so writes several files too
        how = "--layers fusion --method dense --quantize int8 --calibration rows.safetensors --report report.json"
        program = [sys.executable, "-m", "compress_bilinear", "compress", "large", "-o", output, *how.split()]
        print(subprocess.run(program, cwd=folder, capture_output=True, text=True, check=True).stdout)
        print(*sorted(path.name for path in small.iterdir()))

        model = cb.load(small, Net())
        text = (Path(folder) / "report.json").read_text()
    with torch.no_grad():
        expected = original(first, second)
        error = (model(first, second) - expected).norm() / expected.norm()
    print(f"the logits' relative error is {error:.4f}")
    return cb.Report.from_json(text)


if __name__ == "__main__":
    main()
