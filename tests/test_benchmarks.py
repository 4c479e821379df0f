"""The solver benchmark runs, verifies and says what it measured, on tiny tensors."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import comparison

ROOT = Path(__file__).parents[1]


def test_the_quick_solver_benchmark_measures_every_contestant(tmp_path):
    command = [sys.executable, "-m", "benchmarks.solvers", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "solvers_cpu.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["status"] == "ok"]
    assert {row["status"] for row in rows} <= {"ok", "not installed: pyttb"}
    assert {row["contestant"] for row in measured} >= {"ours", "TensorLy", "TensorLy random", "ST-HOSVD"}
    for row in measured:
        assert 0 < float(row["error"]) < 1
        assert float(row["seconds"]) > 0
        assert row["processor"]
        assert row["torch"]
    with open(tmp_path / "solvers_exact_cpu.csv", encoding="utf-8", newline="") as file:
        (ours,) = [row for row in csv.DictReader(file) if row["contestant"] == "ours"]
    assert ours["found"] == ours["seeds"]
    assert "of its time" in done.stdout


@pytest.mark.parametrize(
    ("suffix", "start"), [("html", "<!DOCTYPE html>"), ("md", "### median"), ("csv", "figure,layer,")]
)
def test_results_are_set_side_by_side(tmp_path, monkeypatch, suffix, start):
    path = tmp_path / f"latency.{suffix}"
    monkeypatch.setattr(sys, "argv", ["comparison", "-o", str(path)])
    comparison.main()
    assert path.read_text(encoding="utf-8").startswith(start)


def test_a_benchmarks_rows_become_a_comparison():
    rows = [
        {"case": "a", "contestant": "x", "median_ms": "2.0", "torch": "2.13"},
        {"case": "a", "contestant": "y", "median_ms": 1.5, "torch": "2.13"},
        {"case": "b", "contestant": "y", "median_ms": "", "torch": "2.13"},
    ]
    found = comparison.compared(rows)
    assert (found.runs, found.panels[0].rows) == (("x", "y"), ("a", "b"))
    assert found.panels[0].values == ((2.0, 1.5), (None, None))
    assert found.panels[0].best(0) == (False, True)
    assert found.notes == ("Measured on: torch 2.13",)
