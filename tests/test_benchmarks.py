"""The benchmarks of solvers and of storage formats run, verify and say what they measured, on tiny tensors.

Their quick runs are slow tests: each starts several processes. By default one contestant of each runs in this process.
"""

import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tensorly

from benchmarks import comparison, decoding, large_layer, measured, quantization
from benchmarks.cases import SUITE
from benchmarks.contestants import Contestant
from benchmarks.weights import QUICK, power_law

ROOT = Path(__file__).parents[1]


def quick(module, results, folder):
    """What a quick run of a benchmark prints, and the rows that it writes."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, read(folder / f"{results}.csv")


def assert_formats_are_measured(rows):
    """Of a case of the suite: every method has every format, timed, with its error and bytes."""
    for form in ("dense", "cp", "tucker"):
        suite = {row["contestant"]: row for row in rows if row["form"] == form and row["status"] == "ok"}
        assert suite.keys() >= {"fp32", "bf16", "int8", "nf4", "nf4, bitsandbytes", "int8 per tensor"}
        assert all(float(row["median_ms"]) > 0 for row in suite.values())
        assert 0 < float(suite["int8"]["error"]) < 0.02 < float(suite["nf4"]["error"]) < 0.3
        assert float(suite["nf4"]["bytes_vs_fp32"]) < 0.15 < float(suite["int8"]["bytes_vs_fp32"]) <= 0.27


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def backend():
    """TensorLy's backend, which contestants set, is put back."""
    before = tensorly.get_backend()
    yield
    tensorly.set_backend(before)


@pytest.mark.usefixtures("backend")
@pytest.mark.filterwarnings("ignore::compress_bilinear.AmplificationWarning")  # in a tenth of a second a CP may cancel
@pytest.mark.parametrize("name", ["ours", "TensorLy random", "ST-HOSVD"])
def test_a_contestant_of_the_solver_benchmark_is_measured(name, tmp_path):
    methods = {"ours": ("cp", "tucker"), "TensorLy random": ("cp",), "ST-HOSVD": ("max_error",)}[name]
    power = replace(QUICK[0], build=lambda: power_law((6, 8, 7)))
    power.write(tmp_path)
    for method in methods:
        limit = 0.1 if name == "ours" else None
        target = 0.5 if method == "max_error" else None
        contestant = Contestant(name, method, sweeps=10, max_seconds=limit, target=target)
        row = measured.measure(power, contestant, tmp_path)
        assert 0 < row["error"] < 1
        assert 0 < row["lower_quartile"] <= row["seconds"] <= row["upper_quartile"]
        assert row["peak_memory_x"] > 0


def test_the_solver_benchmark_counts_exact_answers(tmp_path):
    exact = QUICK[-1]
    exact.write(tmp_path)
    row = measured.succeed(exact, Contestant("ours", "cp"), tmp_path, seeds=2)
    assert (row["found"], row["raised"]) == (2, 0)


def test_the_large_layer_benchmark_measures_weight_and_outputs():
    weight_only, calibrated = (large_layer.measure(True, 1, calibrated) for calibrated in (False, True))
    assert calibrated["unseen_output_error"] < weight_only["unseen_output_error"] < 1
    assert weight_only["weight_error"] < calibrated["weight_error"]
    assert calibrated["parameters"] == weight_only["parameters"]


def test_the_quantization_benchmark_measures_every_format_of_a_case():
    (case,) = (case for case in SUITE if case.name == "simgnn_ntn")
    assert_formats_are_measured(quantization.run_case(case, 0.01))


def test_the_quantization_benchmark_compares_cores_of_equal_bytes():
    rows = {row["contestant"]: row for row in quantization.run_cores("power 2", power_law((16, 20, 18), 2.0))}
    int8, bf16 = (rows[f"{core} core, 1/8"] for core in ("int8", "bfloat16"))
    assert 0 < float(bf16["error"]) < float(int8["error"]) < 1
    assert abs(float(int8["bytes_vs_fp32"]) - float(bf16["bytes_vs_fp32"])) < 0.03


@pytest.mark.slow
def test_the_quick_solver_benchmark_measures_every_contestant(tmp_path):
    printed, rows = quick("solvers", "solvers_cpu", tmp_path)
    ok = [row for row in rows if row["status"] == "ok"]
    assert {row["status"] for row in rows} <= {"ok", "not installed: pyttb"}
    assert {row["contestant"] for row in ok} >= {"ours", "TensorLy", "TensorLy random", "ST-HOSVD"}
    for row in ok:
        assert 0 < float(row["error"]) < 1
        assert float(row["seconds"]) > 0
        assert row["processor"]
        assert row["torch"]
    (ours,) = [row for row in read(tmp_path / "solvers_exact_cpu.csv") if row["contestant"] == "ours"]
    assert ours["found"] == ours["seeds"]
    assert "of its time" in printed


def test_the_quick_decoding_benchmark_finds_the_same_bits(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["decoding", "--quick"])
    decoding.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "float" in line]
    assert [line.split()[-2] for line in lines] == ["True"] * 3


@pytest.mark.slow
def test_the_quick_quantization_benchmark_has_every_format_of_every_form(tmp_path):
    _, rows = quick("quantization", "quantization_cpu", tmp_path)
    assert {row["status"] for row in rows} <= {"ok", "not installed: torchao"}
    found = {(row["case"], row["form"], row["contestant"]): row for row in rows if row["status"] == "ok"}
    assert_formats_are_measured([row for row in rows if row["case"] == "simgnn_ntn"])
    assert all(row["processor"] and row["torch"] for row in rows)
    for form in ("dense", "cp", "tucker"):
        digits = found["digits", form, "int8"]  # a trained weight
        allowed = 0.007 if form == "dense" else 0.015
        assert float(digits["error"]) <= math.hypot(float(digits["truncation_error"]), allowed)
        assert float(digits["bytes_vs_fp32"]) <= 0.27
    assert ("digits", "cp", "nf4, int8's penalty") in found
    cores = {(row["case"], row["contestant"]): row for row in rows if row["form"] == "tucker core"}
    for case, better in (("digits", "int8"), ("power 2", "bfloat16")):
        best = min(("int8", "bfloat16"), key=lambda core: float(cores[case, f"{core} core, 1/8"]["error"]))
        assert best == better
    assert ("simgnn_ntn", "cp", "bitsandbytes Linear8bitLt") in found
    assert abs(float(found["digits", "dense", "int8"]["metric_change"])) <= 0.002


@pytest.mark.slow
def test_the_quick_large_layer_benchmark_shows_that_calibration_helps_on_unseen_rows(tmp_path):
    _, rows = quick("large_layer", "large_layer_cpu", tmp_path)
    assert [(row["method"], int(row["calibration_rows"]) > 0) for row in rows] == [
        ("CP", False),
        ("CP", True),
        ("Tucker", False),
        ("Tucker", True),
    ]
    for weight_only, calibrated in (rows[:2], rows[2:]):
        assert float(calibrated["unseen_output_error"]) < float(weight_only["unseen_output_error"]) < 1
        assert float(weight_only["weight_error"]) < float(calibrated["weight_error"])
        assert calibrated["parameters"] == weight_only["parameters"]
        assert float(calibrated["seconds"]) > 0
        assert float(calibrated["peak_memory_x"]) > 0


def test_results_are_printed_as_a_table(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["comparison"])
    comparison.main()
    assert capsys.readouterr().out.startswith("median_ms (lower is better, * marks the best)")


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
