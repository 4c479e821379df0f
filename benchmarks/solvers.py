"""Our solvers beside TensorLy's and pyttb's, one process for each measurement: results/solvers_cpu.{csv,png}.

python -m benchmarks.solvers                    # all cases; most of an hour
python -m benchmarks.solvers digits border_r2   # only these; --out says where to write, if anywhere
python -m benchmarks.solvers --quick            # tiny tensors, under a minute

`solvers_exact_cpu.csv` has the cases with exact answers: how often a solver finds them, of 20 seeds.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import solver_summary
from benchmarks.contestants import CP, MAX_ERROR, TUCKER, Contestant
from benchmarks.measured import measure, succeed
from benchmarks.weights import QUICK, SUITE, Weight
from compress_bilinear._io import written_atomically
from compress_bilinear.fitting import environment

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
SEEDS = 20
FRACTIONS = (1 / 30, 0.07, 0.1, 0.12, 0.15, 0.18, 0.25, 0.4)
SWEEPS = (100, 10, 30)  # of TensorLy's random start, as a curve
EXACT_SWEEPS = 1000
MEASURED = (
    *("rank", "parameters", "error", "seconds", "lower_quartile", "upper_quartile"),
    *("peak_memory_x", "amplification", "error_after_int8"),
)
EXACT = (
    *("rank", "tolerance", "seeds", "found", "raised", "best_error", "median_error", "worst_error"),
    *("median_amplification", "median_seconds"),
)


@dataclass(frozen=True)
class Run:
    """Where the weights lie, and how much is measured."""

    folder: Path
    timeout: float
    quick: bool
    method: str | None = None

    def plan(self, case: Weight) -> list[Contestant]:
        """Who is measured on a case, in order: TensorLy's starts first, for the budgets are fractions of their time."""
        if case.exact:
            theirs = [] if self.quick else [Contestant("TensorLy random", "cp", sweeps=EXACT_SWEEPS)]
            return [Contestant("ours", "cp"), *theirs]
        chosen: list[Contestant] = []
        if case.cp_rank is not None:
            first, *others = SWEEPS
            chosen += [Contestant(name, "cp", sweeps=first) for name in ("TensorLy random", "TensorLy svd")]
            chosen.append(Contestant("ours", "cp"))
            chosen += [Contestant("ours", "cp", fraction=fraction) for fraction in FRACTIONS]
            chosen += [Contestant("TensorLy random", "cp", sweeps=sweeps) for sweeps in others]
            chosen += [Contestant(name, "cp", sweeps=first) for name in CP if name not in {c.name for c in chosen}]
        if case.tucker_rank is not None:
            chosen += [Contestant(name, "tucker") for name in TUCKER]
        chosen += [Contestant(name, "max_error", target=target) for target in case.targets for name in MAX_ERROR]
        if self.quick:
            spared = {"TensorLy svd", "TensorLy sampled", "TensorLy randomized", "TensorLy numpy"}
            spared |= {"pyttb hosvd", "pyttb tucker_als"}
            chosen = [c for c in chosen if c.name not in spared and c.fraction in (None, 0.1) and c.sweeps == SWEEPS[0]]
        return [contestant for contestant in chosen if self.method in (None, contestant.method)]

    def rows(self, case: Weight) -> Iterator[Row]:
        """A row for each contestant, one after another."""
        case.write(self.folder)
        weight = case.read(self.folder)
        about = {"case": case.name, "shape": "x".join(map(str, weight.shape))}
        facts = environment(torch.device("cpu"), weight.dtype) | {"pyttb": _version("pyttb")}
        del weight  # may be large, and children need the memory
        pace: list[float] = []
        for contestant in self.plan(case):
            if contestant.fraction is not None:
                if not pace:
                    continue
                contestant = replace(contestant, max_seconds=contestant.fraction * min(pace))
            found = self._child(case, contestant)
            if contestant.name in ("TensorLy random", "TensorLy svd") and contestant.sweeps == SWEEPS[0]:
                pace += [found["seconds"]] if found["status"] == "ok" and not case.exact else []
            asked: Row = {} if case.exact else {"method": contestant.method.replace("max_error", "tucker")}
            asked |= {"contestant": contestant.name, "setting": contestant.setting}
            asked |= {} if case.exact else {"budget_seconds": _shown(contestant.max_seconds or "")}
            fields = EXACT if case.exact else MEASURED
            measured = {key: _shown(found.get(key, "")) for key in fields}
            yield about | asked | measured | {"status": found["status"]} | facts

    def _child(self, case: Weight, contestant: Contestant) -> Row:
        """What a fresh process measured, or a status that says why there is nothing."""
        job = {"case": case.name, "folder": str(self.folder), "seeds": 2 if self.quick else SEEDS}
        text = json.dumps(job | {"contestant": asdict(contestant)})
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.solvers", "--child", text]
        root = Path(__file__).parents[1]
        try:
            done = subprocess.run(command, cwd=root, timeout=self.timeout, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            return {"status": f"timeout after {self.timeout:g} s"}
        try:
            return json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            return {"status": f"ended with code {done.returncode}"}


def child(text: str) -> None:
    """Measure one contestant in this process and print the result as a line of JSON."""
    job = json.loads(text)
    case = next(case for case in (*SUITE, *QUICK) if case.name == job["case"])
    contestant, folder = Contestant(**job["contestant"]), Path(job["folder"])
    try:
        with torch.no_grad():
            found = succeed(case, contestant, folder, job["seeds"]) if case.exact else measure(case, contestant, folder)
        result = {"status": "ok"} | found
    except ImportError as error:
        result = {"status": f"not installed: {error.name}"}
    except Exception as error:
        result = {"status": f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    print(json.dumps(result))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _key(row: Row) -> tuple[Any, ...]:
    return row["case"], row["contestant"], row["setting"], row.get("method")


def _shown(value: Any) -> Any:
    return f"{value:.7g}" if isinstance(value, float) else value


def _write(out: Path, rows: Sequence[Row], exact: Sequence[Row]) -> None:
    """Write the rows; others that are there already stay."""
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("solvers_cpu.csv", rows), ("solvers_exact_cpu.csv", exact)):
        if not part:
            continue
        if (out / name).exists():
            with open(out / name, newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if _key(row) not in {_key(new) for new in part}]
            order = [case.name for case in (*SUITE, *QUICK)]
            part = sorted([*kept, *part], key=lambda row: order.index(row["case"]))
        with written_atomically(out / name) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(part[0]))
            writer.writeheader()
            writer.writerows(part)


def main() -> None:
    """Run the chosen cases, print a table and the ratios, write the CSVs and the plot."""
    names = [case.name for case in (*SUITE, *QUICK)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(names)}; all but the quick ones where none is given")
    parser.add_argument("--quick", action="store_true", help="a few contestants on tiny tensors")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results, in which other rows stay; a whole run has benchmarks/results",
    )
    parser.add_argument("--method", choices=["cp", "tucker", "max_error"], help="only these contestants")
    parser.add_argument("--timeout", type=float, default=900, help="most seconds for one measurement")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    unknown = set(options.cases) - set(names)
    if unknown:
        parser.error(f"cases should be among {', '.join(names)}. Found {', '.join(sorted(unknown))}.")
    suite = QUICK if options.quick else SUITE
    chosen = [case for case in (*SUITE, *QUICK) if case.name in options.cases] or list(suite)
    whole = not options.cases and not options.quick
    out = options.out or (RESULTS if whole else None)
    rows: list[Row] = []
    exact: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        run = Run(Path(folder), options.timeout, options.quick, options.method)
        task = progress.add_task("", total=sum(len(run.plan(case)) for case in chosen))
        for case in chosen:
            progress.update(task, description=case.name)
            for row in run.rows(case):
                (exact if case.exact else rows).append(row)
                progress.update(task, advance=1, description=f"{case.name}: after {row['contestant']}")
                if out is not None:  # each time, for a run that is cut short
                    _write(out, rows, exact)
            case.path(run.folder).unlink()
    solver_summary.show(rows, exact)  # of this run only
    if out is not None:
        print(f"Wrote {out}")
        _plot(out)


def _plot(out: Path) -> None:
    try:
        from benchmarks import plot
    except ImportError as cause:
        print(f"No plot: {cause}.", file=sys.stderr)
        return
    plot.draw(out / "solvers_cpu.csv", out / "solvers_cpu.png")


if __name__ == "__main__":
    main()
