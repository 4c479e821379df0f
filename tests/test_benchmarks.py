"""The solver benchmark runs, verifies and says what it measured, on tiny tensors."""

import csv
import subprocess
import sys
from pathlib import Path

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
