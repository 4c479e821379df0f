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
import torch

from benchmarks import comparison, decoding, large_layer, measured, quality, quantization, time_to_error
from benchmarks import rows as results
from benchmarks import time_to_error_shown as promised
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


def test_rows_of_other_keys_stay_in_a_file_of_results(tmp_path):
    path = tmp_path / "new" / "results.csv"
    results.write(
        path, [{"layer": name, "seed": 0, "error": 1.0} for name in "ab"], {"torch": 1}, keys=("layer", "seed")
    )
    new = [{"layer": "b", "seed": 0, "seconds": 2.0}, {"layer": "b", "seed": 1, "seconds": 3.0}]
    whole = results.write(path, new, {"torch": 2}, keys=("layer", "seed"))
    assert [(row["layer"], str(row["seed"]), row.get("seconds")) for row in whole] == [
        ("a", "0", None),
        ("b", "0", 2.0),
        ("b", "1", 3.0),
    ]
    assert read(path)[0] == {"layer": "a", "seed": "0", "error": "1.0", "seconds": "", "torch": "1"}
    assert [row["torch"] for row in results.write(path, new, {"torch": 3})] == [
        3,
        3,
    ]  # without keys a file is written anew


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("shape", "times", "methods"),
    [
        ((64, 64, 24), 48, ["TensorLy CP", "TensorLy Tucker"]),  # no rank of an SVD per output is so small
        ((6, 5, 4), 7, ["TensorLy CP", "TensorLy Tucker"]),
        ((6, 5, 4), 8, ["TensorLy CP"]),
        ((6, 5, 4), 9, []),
    ],
    ids=str,
)
def test_by_hand_there_is_only_what_fits(shape, times, methods):
    found = list(quality.by_hand(power_law(shape), times))
    assert [name for name, _, _ in found] == methods
    assert all(used <= 4 * math.prod(shape) / times for _, _, used in found)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("contestant", ["automatic", "Tucker", "CP"])
def test_a_point_of_time_to_error_is_measured_within_the_size(contestant):
    row = time_to_error.measure(contestant, (10, 14, 12), 0.5, torch.get_num_threads())
    assert 0 < row["output_error"] < 1
    assert row["smaller_x"] >= 8
    assert row["seconds"] > 0


def test_the_inputs_of_time_to_error_that_measure_are_in_no_batch_and_of_the_same_distribution():
    layer, seen, unseen = time_to_error.problem((4, 9, 7))
    assert (tuple(layer.weight.shape), len(seen), len(unseen)) == ((4, 9, 7), 8, 8)
    for old, new in zip(zip(*seen, strict=True), zip(*unseen, strict=True), strict=True):
        first, second = torch.cat(old).double(), torch.cat(new).double()
        assert not (first[:, None, 0] == second[:, 0]).any()
        moments = [inputs.T @ inputs / len(inputs) for inputs in (first, second)]
        assert (moments[0] - moments[1]).norm() < 0.15 * moments[0].norm()


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(2, 3.1, 0.2), (5, 5, 0.1), ("", 20, 0.1)], ["+0.9 s", "yes", "+0.0%", "yes"]),
        ([(2, 3.3, 0.2), (4, 5, 0.204)], ["+1.1 s", "NO", "+2.0%", "yes"]),
        ([(2, 2, 0.1), (3, 3, 0.2), (4, 4, 0.11)], ["-0.2 s", "yes", "+10.0%", "NO"]),
        ([(2, 2, 0.1), (4, 4, "")], ["-0.2 s", "yes", "+inf%", "NO"]),  # nothing was found in time
        ([(2, 2, ""), (4, 4, 0.1), ("", 7, 0.2)], ["-0.2 s", "yes", "+0.0%", "yes"]),  # 7 s are no twice 4
    ],
    ids=str,
)
def test_promises_about_time_are_read_off_the_points(points, expected):
    about = {"layer": "4x5x6", "contestant": "automatic", "status": "ok"}
    fields = ("asked_seconds", "seconds", "output_error")
    table = promised.promises([about | dict(zip(fields, point, strict=True)) for point in points])
    assert [next(iter(column.cells)) for column in table.columns] == ["4x5x6", *expected]


@pytest.mark.slow
def test_the_quick_time_to_error_benchmark_measures_every_point_in_a_process_of_its_own(tmp_path):
    printed, rows = quick("time_to_error", "time_to_error_cpu", tmp_path)
    contestants = ["automatic"] * 3 + ["TensorLy Tucker, int8", "TensorLy CP, int8"]
    assert [(row["contestant"], row["status"]) for row in rows] == [(name, "ok") for name in contestants]
    assert [row["asked_seconds"] for row in rows] == ["0.5", "1", "", "", ""]
    for row in rows:
        assert 0 < float(row["output_error"]) < 1
        assert float(row["smaller_x"]) >= 8
        assert float(row["peak_mb"]) > 0
        assert row["processor"]
    ours, *libraries = (float(row["output_error"]) for row in rows[2:])
    assert ours < min(libraries)
    assert "Worse with twice the time" in printed
    assert (tmp_path / "time_to_error_cpu.png").stat().st_size > 0


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
