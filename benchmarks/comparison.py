"""A benchmark's rows in a table: a row a case, a column a contestant, the best marked.

python -m benchmarks.comparison                                   # results/latency_cpu.csv, as a table
python -m benchmarks.comparison results/solvers_cpu.csv --figure error --figure seconds --row case --row method
"""

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from compress_bilinear.report import Comparison, Panel, better

RESULTS = Path(__file__).parent / "results"
_ENVIRONMENT = ("device", "dtype", "processor", "threads", "torch")
_LOWER = ("ms", "seconds", "memory", "error", "bytes", "parameters")


def compared(
    rows: Sequence[Mapping[str, object]],
    figures: Sequence[str] = ("median_ms",),
    row: Sequence[str] = ("case",),
    column: Sequence[str] = ("contestant",),
) -> Comparison:
    """The comparison of a benchmark's rows.

    Args:
        rows: as read from its CSV, or before they are written.
        figures: columns of the CSV, one a table.
        row, column: what tells the rows and the columns of a table apart.

    Raises: KeyError where a row lacks one of these.
    """

    def name(one: Mapping[str, object], keys: Sequence[str]) -> str:
        return " ".join(str(one[key]) for key in keys if one[key] != "")

    cases = tuple(dict.fromkeys(name(one, row) for one in rows))
    runs = tuple(dict.fromkeys(name(one, column) for one in rows))
    panels = []
    for figure in figures:
        found = {(name(one, row), name(one, column)): _number(one[figure]) for one in rows}
        values = tuple(tuple(found.get((case, run)) for run in runs) for case in cases)
        lower = any(part in figure.split("_") for part in _LOWER)
        panels.append(Panel(field=figure, better="lower" if lower else better(figure), rows=cases, values=values))
    told = (f"{key} {', '.join(sorted({str(one[key]) for one in rows}))}" for key in _ENVIRONMENT if key in rows[0])
    return Comparison(runs=runs, panels=tuple(panels), notes=(f"Measured on: {', '.join(told)}",))


def _number(value: object) -> float | None:
    try:
        found = float(str(value))
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS / "latency_cpu.csv")
    parser.add_argument("--figure", action="append", help="a column of numbers; median_ms where none is given")
    parser.add_argument("--row", action="append", help="a column that names the rows; case where none is given")
    parser.add_argument("--column", action="append", help="one that names the columns; contestant where none is given")
    options = parser.parse_args()
    with open(options.results, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = (options.figure or ["median_ms"], options.row or ["case"], options.column or ["contestant"])
    missing = [key for keys in wanted for key in keys if key not in rows[0]]
    if missing:
        parser.error(f"columns should be among {', '.join(rows[0])}. Found {', '.join(missing)}.")
    print(compared(rows, *wanted))


if __name__ == "__main__":
    main()
