"""Latency, peak memory and fraction of the roofline on the shape suite, after a correctness gate.

python -m benchmarks.run                    # on the CPU, float32, forward: some twenty minutes
python -m benchmarks.run docred enormous    # only these cases
python -m benchmarks.run --device cuda      # bfloat16, float32, float16, forward and backward: at most 8 minutes
python -m benchmarks.run --resume           # what a run that was cut off has not measured yet

Needs torch, and on a GPU Triton; the package need not be installed. Writes results/latency_<device>.csv after each
group of contestants. One that is wrong or fails is a row that says so, and status 1 in the end; where it takes the GPU
with it, the run goes on in a fresh process without it.
"""

import argparse
import csv
import os
import statistics
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
try:
    import compress_bilinear  # noqa: F401
except ImportError:  # where its other dependencies are missing, its operations still stand on torch alone
    package = types.ModuleType("compress_bilinear")
    package.__path__ = [str(ROOT / "compress_bilinear")]
    sys.modules["compress_bilinear"] = package

from benchmarks.cases import SUITE, Case  # noqa: E402 - after the stand-in above
from benchmarks.latency import DeviceLost, Row, environment, measured, roofline  # noqa: E402

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
RIVALS = ("nn.Bilinear", "einsum", "one GEMM", "outer", "einsum, compiled", "plain Triton")
CHAINS = {"CP": ("CP composed", "CP composed, compiled"), "Tucker": ("Tucker composed", "Tucker composed, compiled")}


class Group(NamedTuple):
    """What is measured side by side."""

    dtype: str
    kind: str
    case: Case
    rows: int

    @property
    def key(self) -> tuple[str, ...]:
        """As the rows of a CSV name it."""
        rows = f"{self.rows}x{self.case.pairs}^2" if self.case.pairs else str(self.rows)
        return self.dtype, self.kind, self.case.name, rows


def key_of(row: Row) -> tuple[str, ...]:
    """The key of a row's group."""
    return tuple(str(row[name]) for name in ("dtype", "pass", "case", "rows"))


def main() -> None:
    """Run the chosen cases, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in SUITE]
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="float32 on a CPU, all three on a GPU by default")
    parser.add_argument(
        "--rows", nargs="+", default=["suite", "1", "32"], help="numbers of rows, or 'suite'; suite 1 32 by default"
    )
    parser.add_argument("--passes", nargs="+", choices=("forward", "training"), help="forward, and on a GPU training")
    parser.add_argument("--seconds", type=float, default=None, help="about how long to time a group; 2 or 0.3")
    parser.add_argument("--minutes", type=float, default=None, help="when no more is begun; 60 or 7.5")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the CSV")
    parser.add_argument("--resume", action="store_true", help="keep what the CSV has, and measure the rest")
    parser.add_argument("--begun", type=float, default=time.time(), help=argparse.SUPPRESS)  # of a run that goes on
    options = parser.parse_args()
    if unknown := set(options.cases) - set(names):
        parser.error(f"cases should be among {', '.join(names)}. Found {', '.join(sorted(unknown))}.")
    if wrong := [rows for rows in options.rows if rows != "suite" and not (rows.isdecimal() and int(rows) > 0)]:
        parser.error(f"--rows should be positive numbers or 'suite'. Found {wrong[0]!r}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use. Found none.")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"latency_{options.device}.csv"
    rows: list[Row] = read(path) if options.resume and path.exists() else []
    if rows and not rows[0].keys() >= {"status", "pass", "dtype", "case", "rows"}:
        parser.error(f"--resume needs the CSV of this benchmark. Found another in {path}.")
    skipped = run(options, path, rows)
    if not rows:
        sys.exit("Nothing was measured: more --minutes are needed.")
    print(summary(rows))
    if skipped:
        print(f"{skipped} groups were not begun for want of time: --resume measures them.")
    print(f"Wrote {path} after {time.time() - options.begun:.0f} s")
    if bad := [row for row in rows if row["status"] != "ok"]:
        sys.exit("\n".join(f"{' '.join(key_of(row))}: {row['contestant']} {row['status']}" for row in bad))


def groups(options: argparse.Namespace) -> Iterator[Group]:
    """In the order of their weight: the suite's own rows first, a case's passes side by side."""
    on_gpu = options.device == "cuda"
    for dtype in options.dtypes or (list(DTYPES) if on_gpu else ["float32"]):
        for asked in dict.fromkeys(options.rows):
            for case in SUITE:
                if options.cases and case.name not in options.cases:
                    continue
                if case.pairs and asked != next(iter(options.rows)):
                    continue  # pairs have their own number only
                count = case.rows if asked == "suite" or case.pairs else int(asked)
                if asked != "suite" and count == case.rows and "suite" in options.rows:
                    continue
                for kind in options.passes or (["forward", "training"] if on_gpu else ["forward"]):
                    yield Group(dtype, kind, case, count)


def run(options: argparse.Namespace, path: Path, rows: list[Row]) -> int:
    """Measure into `rows` and the CSV; the number of groups for which there was no time."""
    device, on_gpu = torch.device(options.device), options.device == "cuda"
    deadline = options.begun + 60 * (options.minutes or (7.5 if on_gpu else 60))
    done = {key_of(row) for row in rows if row["status"] == "ok"}
    hardware: dict[str, tuple[tuple[float, float], Row]] = {}
    skipped = 0
    for group in groups(options):
        if group.key in done:
            continue
        if time.time() > deadline:
            skipped += 1
            continue
        print(f"{' '.join(group.key)} ...", file=sys.stderr)
        dtype = DTYPES[group.dtype]
        if group.dtype not in hardware:
            limits = roofline(device, dtype)
            hardware[group.dtype] = limits, environment(device, group.dtype, limits)
        limits, about = hardware[group.dtype]
        compiling = group.dtype == "bfloat16" and group.rows == group.case.rows and group.kind == "forward"
        compiling = on_gpu and compiling and time.time() < (options.begun + deadline) / 2
        seconds = options.seconds or (0.3 if on_gpu else 2.0)
        failed = frozenset(str(row["contestant"]) for row in rows if key_of(row) == group.key)
        training, lost = group.kind == "training", False
        try:
            found = measured(
                group.case, group.rows, dtype, device, training, compiling, limits, seconds, excluded=failed
            )
        except DeviceLost as error:
            found, lost = error.rows, True
        rows += [row | {"pass": group.kind} | about for row in found]
        write(path, rows)
        if lost:
            print(f"The GPU is lost to this process: {found[-1]['status']}. Going on in another.", file=sys.stderr)
            arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
            again = [sys.executable, "-m", "benchmarks.run", *arguments, "--resume", "--begun", str(options.begun)]
            os.execv(sys.executable, again)
    return skipped


def read(path: Path) -> list[Row]:
    """The rows of a CSV."""
    with open(path, newline="", encoding="utf-8") as file:
        return [dict(row) for row in csv.DictReader(file)]


def write(path: Path, rows: list[Row]) -> None:
    """All rows so far; a run that is cut off leaves a whole file."""
    columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def summary(rows: list[Row]) -> str:
    """A line for each group, then geometric means, and how often the bars of a group are kept."""
    lines = []
    grouped: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            grouped.setdefault(key_of(row), {})[str(row["contestant"])] = row
    for key, group in grouped.items():
        cells = ", ".join(f"{name} {_ms(group[name]):.4g}" for name in group)
        lines.append(f"{' '.join(key)}: {cells} ms")
    for heading in dict.fromkeys((key[0], key[1]) for key in grouped):
        chosen = {key: group for key, group in grouped.items() if key[:2] == heading}
        for name in ("dense", "dense int8", "dense int8, bfloat16", "CP", "CP int8", "CP int8, bfloat16", "Tucker"):
            against: dict[str, tuple[str, ...]] = {"nn.Bilinear": ("nn.Bilinear",)}
            against |= {"the best exact rival": RIVALS} if name == "dense" else {}
            against |= {"the best exact": (*RIVALS, "dense")} if name.startswith("dense int8") else {}
            against |= {"CP in float": ("CP",)} if name.startswith("CP int8") else {}
            against |= {"the best chain": CHAINS[name]} if name in CHAINS else {}
            for what, others in against.items():
                ratios = {
                    key: min(_ms(group[other]) for other in others if other in group) / _ms(group[name])
                    for key, group in chosen.items()
                    if name in group and any(other in group for other in others)
                }
                if ratios:
                    least = min(ratios, key=lambda key: ratios[key])
                    mean = statistics.geometric_mean(ratios.values())
                    lines.append(
                        f"{' '.join(heading)}: {name} is {mean:.2f}x as fast as {what} in the geometric mean of "
                        f"{len(ratios)}, at least {ratios[least]:.2f}x ({least[2]}, {least[3]} rows)"
                    )
        dense = [group["dense"] for group in chosen.values() if "dense" in group]
        if dense and heading[1] == "forward":
            most = max(dense, key=lambda row: _mb(row) - max(64 * 1.048576, 2 * float(str(row["output_mb"]))))
            lines.append(
                f"{' '.join(heading)}: dense takes {_mb(most):.3g} MB of memory beside what it is given where that is "
                f"most for its output of {most['output_mb']} MB ({most['case']}, {most['rows']} rows)"
            )
    return "\n".join(lines)


def _ms(row: Row) -> float:
    return float(str(row["median_ms"]))


def _mb(row: Row) -> float:
    return float(str(row["peak_extra_mb"]))


if __name__ == "__main__":
    main()
