"""Latency on the shape suite: a correctness gate, then side-by-side timing, then results/latency_<device>.csv.

python -m benchmarks.run                  # the cases within 2e11 FLOPs; float32, forward, on the CPU
python -m benchmarks.run docred enormous  # only these
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import SUITE, Case, contestants
from compress_bilinear.files import written_atomically
from compress_bilinear.measure import environment, latencies

RESULTS = Path(__file__).parent / "results"
MOST_FLOPS = 2e11
TOLERANCE = 1e-4  # relative Frobenius, float32


def run(case: Case, seconds: float) -> list[dict[str, object]]:
    """One row for each contestant; raises where an exact one disagrees with `nn.Bilinear`."""
    exact, compressed = contestants(case, torch.float32)
    with torch.no_grad():
        expected = exact["nn.Bilinear"]()
        for name, call in exact.items():
            error = float((call() - expected).norm() / expected.norm())
            if not error < TOLERANCE:
                raise SystemExit(f"{case.name}: {name} is wrong: relative error {error:.3g}")
        measured = latencies({**exact, **compressed}, torch.device("cpu"), seconds)
    baseline = measured["nn.Bilinear"].median
    return [
        {
            "case": case.name,
            "in1": case.in1,
            "in2": case.in2,
            "out": case.out,
            "rows": f"{case.rows}x{case.pairs}^2" if case.pairs else case.rows,
            "contestant": name,
            "median_ms": f"{latency.median:.5g}",
            "lower_quartile_ms": f"{latency.lower:.5g}",
            "upper_quartile_ms": f"{latency.upper:.5g}",
            "speedup_vs_bilinear": f"{baseline / latency.median:.3f}",
        }
        for name, latency in measured.items()
    ]


def main() -> None:
    """Run the chosen cases, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in SUITE]
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(names)}; those up to 2e11 FLOPs where none is given")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long to time each case")
    options = parser.parse_args()
    unknown = set(options.cases) - set(names)
    if unknown:
        parser.error(f"cases should be among {', '.join(names)}. Found {', '.join(sorted(unknown))}.")
    device = environment(torch.device("cpu"), torch.float32)
    rows: list[dict[str, object]] = []
    for case in SUITE:
        if case.name in options.cases or (not options.cases and case.flops <= MOST_FLOPS):
            print(f"{case.name} ...", file=sys.stderr)
            rows += [row | device for row in run(case, options.seconds)]
    table = Table("Case", "Contestant", "Median ms", "Quartiles", "vs nn.Bilinear")
    for row in rows:
        quartiles = f"{row['lower_quartile_ms']} – {row['upper_quartile_ms']}"
        table.add_row(
            *(str(row[key]) for key in ("case", "contestant", "median_ms")), quartiles, f"{row['speedup_vs_bilinear']}x"
        )
    Console(width=100).print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "latency_cpu.csv"
    with written_atomically(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
