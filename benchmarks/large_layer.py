"""What fitting a large layer to its outputs costs: results/large_layer_cpu.csv, a few minutes.

python -m benchmarks.large_layer                 # nn.Bilinear(768, 768, 97), as relation extractors have, 8,192 rows
python -m benchmarks.large_layer --quick         # a small one, a few seconds; --out says where to write, if anywhere

Each config is solved twice, each time in a process of its own: for the weight alone and for the outputs on calibration
inputs, which are correlated as features of an encoder are. Errors are of rows that neither has seen.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import compress_bilinear as cb
from benchmarks.memory import with_peak
from benchmarks.rows import write
from benchmarks.weights import power_law
from compress_bilinear.fitting import environment

RESULTS = Path(__file__).parent / "results"
BATCH = 512
SIZES = {False: ((97, 768, 768), 8192), True: ((7, 24, 20), 1024)}
CONFIGS: dict[bool, tuple[cb.CPConfig | cb.TuckerConfig, ...]] = {
    False: (cb.CPConfig(rank=64), cb.TuckerConfig(rank=(32, 96, 96))),
    True: (cb.CPConfig(rank=7), cb.TuckerConfig(rank=(4, 7, 7))),
}


def inputs(shape: tuple[int, int, int], rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of 64 common causes and some noise, the second input correlated with the first."""
    causes = torch.randn(64, shape[1], generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(rows, 64, generator=generator) @ causes / 8
    first += 0.3 * torch.randn(rows, shape[1], generator=generator)
    second = first.roll(7, 1)[:, torch.arange(shape[2]) % shape[1]]
    return first, second + 0.5 * torch.randn(rows, shape[2], generator=generator)


def measure(quick: bool, index: int, calibrated: bool) -> dict[str, Any]:
    """Calibrate, fit and check one config in this process."""
    (shape, rows), config = SIZES[quick], CONFIGS[quick][index]
    layer = nn.Bilinear(shape[1], shape[2], shape[0])
    with torch.no_grad():
        layer.weight.copy_(power_law(shape))
    parts = [part.split(BATCH) for part in inputs(shape, rows, seed=1)]
    batches = list(zip(*parts, strict=True)) if calibrated else None

    def planned() -> tuple[cb.Plan[nn.Bilinear], float]:
        start = time.perf_counter()
        return cb.plan(layer, config, calibration=batches, measure_latency=False), time.perf_counter() - start

    cb.plan(nn.Bilinear(8, 8, 8), CONFIGS[True][index], measure_latency=False)  # loads code, starts threads
    (plan, seconds), peak = with_peak(planned)
    small, _ = plan.apply()
    unseen = [tuple(x.split(BATCH)) for x in inputs(shape, BATCH * 4, seed=2)]
    with torch.no_grad():
        exact = torch.cat([layer(*pair) for pair in zip(*unseen, strict=True)]).double()
        found = torch.cat([small(*pair) for pair in zip(*unseen, strict=True)]).double()
    return {
        "seconds": round(seconds, 3),
        "peak_memory_x": round(peak / (layer.weight.numel() * layer.weight.element_size()), 3),
        "weight_error": plan.report.layers[0].weight_error,
        "unseen_output_error": float((found - exact).norm() / (exact - layer.bias.detach().double()).norm()),
        "parameters": sum(parameter.numel() for parameter in small.parameters()),
    }


def rows(quick: bool) -> list[dict[str, Any]]:
    """A row for each config without and with calibration, each measured in a process of its own."""
    shape, count = SIZES[quick]
    found = []
    for index, config in enumerate(CONFIGS[quick]):
        for calibrated in (False, True):
            command = [
                sys.executable,
                "-m",
                "benchmarks.large_layer",
                "--child",
                json.dumps([quick, index, calibrated]),
            ]
            done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=True)
            about = {
                "shape": "x".join(map(str, shape)),
                "method": "CP" if isinstance(config, cb.CPConfig) else "Tucker",
                "rank": str(config.rank),
                "calibration_rows": count if calibrated else 0,
            }
            found.append(about | json.loads(done.stdout.splitlines()[-1]))
    return found


def main() -> None:
    """Measure, print a table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small layer")
    parser.add_argument("--out", type=Path, help="folder for the result; a whole run has benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*json.loads(options.child))))
        return
    found = rows(options.quick)
    table = Table(*(name.replace("_", " ") for name in found[0]), box=box.SIMPLE_HEAD)
    for row in found:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    out = options.out or (None if options.quick else RESULTS)
    if out is not None:
        path = out / "large_layer_cpu.csv"
        write(path, found, environment(torch.device("cpu"), torch.float32))
        print(f"Wrote {path}")


if __name__ == "__main__":
    main()
