"""What the rows of `solvers` come to: a table, and the ratios."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

STARTS = ("TensorLy random", "TensorLy svd")
FULL = "100 sweeps"


def budget(shape: str) -> str:
    """The setting that is called the budgeted call: a tenth of TensorLy's time, a thirtieth for the largest shape."""
    return "0.033x" if shape == "97x768x768" else "0.1x"


def show(rows: Sequence[Row], exact: Sequence[Row]) -> None:
    """Print the tables and the summary."""
    console = Console(width=140)
    if rows:
        columns = {"case": "Case", "method": "", "contestant": "Contestant", "setting": "Setting"}
        columns |= {"parameters": "Params", "error": "Error", "error_after_int8": "int8 error", "seconds": "Seconds"}
        columns |= {"peak_memory_x": "Memory", "amplification": "Amplif."}
        console.print(_table(rows, columns))
    if exact:
        columns = {"case": "Case", "contestant": "Contestant", "found": "Found", "seeds": "of", "raised": "Raised"}
        columns |= {"best_error": "Best error", "median_error": "Median", "worst_error": "Worst"}
        columns |= {"median_amplification": "Amplif.", "median_seconds": "Seconds"}
        console.print(_table(exact, columns))
    for line in [*tucker_lines(rows), *cp_lines(rows), *pace_lines(rows), *max_error_lines(rows), *exact_lines(exact)]:
        console.print(line, highlight=False, markup=False)


def _table(rows: Sequence[Row], columns: Mapping[str, str]) -> Table:
    """A line for each row; where nothing was measured, the reason in place of the error."""
    table = Table(show_edge=False)
    for key, heading in columns.items():
        words = key in ("case", "method", "contestant", "setting")
        table.add_column(heading, justify="left" if words else "right", no_wrap=words)
    for k, row in enumerate(rows):
        line = {key: _short(row[key]) for key in columns}
        if row["status"] != "ok":
            line["error" if "error" in columns else "best_error"] = row["status"]
        table.add_row(*line.values(), end_section=k + 1 < len(rows) and rows[k + 1]["case"] != row["case"])
    return table


def _short(value: Any) -> str:
    try:
        return str(value) if isinstance(value, int) else f"{float(value):.4g}"
    except ValueError:
        return str(value)


def tucker_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Ours against TensorLy's defaults and the best of all others."""
    speedups: dict[str, list[float]] = {"TensorLy": [], "TensorLy numpy": []}
    for case in _cases(rows):
        found = _by_contestant(row for row in rows if row["case"] == case and row["method"] == "tucker")
        ours, theirs = found.get(("ours", "default")), found.get(("TensorLy", "default"))
        if ours is None or theirs is None:
            continue
        others = [
            float(row["error"]) for (_, setting), row in found.items() if setting == "default" and row is not ours
        ]
        faster = {
            name: float(found[name, "default"]["seconds"]) / float(ours["seconds"])
            for name in speedups
            if (name, "default") in found
        }
        for name, speedup in faster.items():
            speedups[name] += [speedup] if case.startswith("power_") else []
        yield (
            f"Tucker {case}: error / TensorLy's {_ratio(ours, theirs):.6f}, / the best other's "
            f"{float(ours['error']) / min(others):.6f}; "
            + ", ".join(f"{speedup:.2f}x as fast as {name}" for name, speedup in faster.items())
        )
    for name, found_speedups in speedups.items():
        if found_speedups:
            mean = statistics.geometric_mean(found_speedups)
            yield f"Tucker, {len(found_speedups)} power-law shapes: {mean:.2f}x as fast as {name} (geometric mean)"


def cp_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Ours against the better of TensorLy's starts, with the time against the faster one."""
    for case in _cases(rows):
        found = _by_contestant(row for row in rows if row["case"] == case and row["method"] == "cp")
        starts = [found[name, FULL] for name in STARTS if (name, FULL) in found]
        if not starts:
            continue
        better = min(starts, key=lambda row: float(row["error"]))
        seconds = min(float(row["seconds"]) for row in starts)
        for setting in ("default", budget(better["shape"])):
            ours = found.get(("ours", setting))
            if ours is None:
                continue
            growth, theirs = (float(row["error_after_int8"]) / float(row["error"]) for row in (ours, better))
            yield (
                f"CP {case}, {setting}: error / TensorLy's {_ratio(ours, better):.4f} in "
                f"{float(ours['seconds']) / seconds:.3f} of its time; int8 error / error {growth:.4f} "
                f"({better['contestant']} {theirs:.4f}); memory {_short(ours['peak_memory_x'])}x "
                f"({_short(better['peak_memory_x'])}x)"
            )


def pace_lines(rows: Sequence[Row]) -> Iterator[str]:
    """The least time in which ours was as close as TensorLy's better start, relative to that of its faster one."""
    needed = []
    shapes: set[str] = set()
    for case in _cases(rows):
        found = _by_contestant(row for row in rows if row["case"] == case and row["method"] == "cp")
        starts = [found[name, FULL] for name in STARTS if (name, FULL) in found]
        ours = [row for (name, _), row in found.items() if name == "ours"]
        if not starts or not case.startswith("power_") or starts[0]["shape"] in shapes:
            continue  # each shape counts once, at its first rank
        shapes.add(starts[0]["shape"])
        error = min(float(row["error"]) for row in starts)
        seconds = [float(row["seconds"]) for row in ours if float(row["error"]) <= error]
        if not seconds:
            yield f"CP {case}: TensorLy's error was not reached"
            continue
        needed.append(min(seconds) / min(float(row["seconds"]) for row in starts))
        yield f"CP {case}: TensorLy's error within {needed[-1]:.3f} of its time"
    if needed:
        mean = statistics.geometric_mean(needed)
        yield f"CP, {len(needed)} power-law shapes: TensorLy's error within {mean:.3f} of its time (geometric mean)"


def max_error_lines(rows: Sequence[Row]) -> Iterator[str]:
    """Parameters for the same target, ours against a plain ST-HOSVD."""
    ratios = []
    for case in _cases(rows):
        found = _by_contestant(row for row in rows if row["case"] == case)
        for (name, setting), ours in found.items():
            plain = found.get(("ST-HOSVD", setting))
            if name == "ours" and plain is not None:
                ratios.append(float(ours["parameters"]) / float(plain["parameters"]))
                sizes = f"{ours['parameters']} parameters / ST-HOSVD's {plain['parameters']}"
                yield f"{setting} {case}: {sizes} = {ratios[-1]:.3f}"
    if ratios:
        mean = statistics.geometric_mean(ratios)
        yield f"MaxError, {len(ratios)} targets: {mean:.3f} of the parameters (geometric mean)"


def exact_lines(exact: Iterable[Row]) -> Iterator[str]:
    """Success counts; where no exact answer exists, errors and amplification."""
    for row in exact:
        if row["status"] != "ok":
            continue
        what = f"median error {row['median_error']}, amplification {row['median_amplification']}"
        if row["found"] != "":
            what = f"found {row['found']} of {row['seeds']}"
        yield f"{row['case']}: {row['contestant']} {what}, {row['median_seconds']} s a solve"


def _cases(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["case"] for row in rows))


def _by_contestant(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    return {(row["contestant"], row["setting"]): row for row in rows if row["status"] == "ok"}


def _ratio(ours: Row, theirs: Row) -> float:
    return float(ours["error"]) / float(theirs["error"])
