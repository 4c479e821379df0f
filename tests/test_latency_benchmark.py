"""The benchmark of latencies measures what is right, says what is not, and goes on where it was cut off."""

import csv
import dataclasses
import sys
import weakref

import pytest
import support
import torch

from benchmarks import cases, gate, latency, latency_plot, run
from benchmarks.cases import Case

TINY = (Case("rows", 5, 4, 3, 6), Case("pairs", 4, 5, 3, 2, pairs=3))
QUICK = ["--seconds", "0.001", "--rows", "suite", "1"]


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Runs the benchmark on tiny cases, and gives the rows of its CSV."""
    monkeypatch.setattr(run, "SUITE", TINY)
    monkeypatch.setattr(run, "roofline", lambda device, dtype: (1e9, 1e9))
    monkeypatch.setattr(latency, "BLOCK_SECONDS", 1e-5)
    monkeypatch.setattr(latency, "WARM_SECONDS", 1e-5)
    monkeypatch.setattr(latency, "ROUNDS", (2, 2))

    def ran(*arguments):
        monkeypatch.setattr(sys, "argv", ["run", *QUICK, "--out", str(tmp_path), *arguments])
        run.main()
        with open(tmp_path / "latency_cpu.csv", encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    return ran


def keys(rows):
    return {run.key_of(row) for row in rows}


def altered(monkeypatch, name, **changes):
    """Another way for the contestant of this name."""
    made = cases.contestants

    def contestants(*args):
        found = made(*args)
        return found | {name: dataclasses.replace(found[name], **changes)}

    monkeypatch.setattr(latency, "contestants", contestants)


def test_every_contestant_of_every_group_is_measured(benchmark, capsys):
    rows = benchmark("--passes", "forward", "training", "--dtypes", "float32", "bfloat16")
    groups = {("rows", "6"), ("rows", "1"), ("pairs", "2x3^2")}
    assert {key[2:] for key in keys(rows)} == groups
    assert {key[:2] for key in keys(rows)} == {(d, p) for d in ("float32", "bfloat16") for p in ("forward", "training")}
    forward = {row["contestant"] for row in rows if (row["case"], row["pass"]) == ("rows", "forward")}
    assert forward == {
        "nn.Bilinear", "einsum", "one GEMM", "outer", "dense", "dense int8", "dense int8, bfloat16",
        "CP", "CP int8", "CP int8, bfloat16", "CP composed", "Tucker", "Tucker composed",
    }  # fmt: skip
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < float(row["lower_quartile_ms"]) <= float(row["median_ms"]) <= float(row["upper_quartile_ms"])
        assert float(row["peak_extra_mb"]) >= 0
        assert row["processor"]
    assert "dense is" in capsys.readouterr().out


def test_who_is_wrong_or_fails_is_reported_and_the_others_are_measured(benchmark, monkeypatch, tmp_path):
    def fails(*args):
        raise torch.OutOfMemoryError("no room")

    altered(monkeypatch, "Tucker", call=fails)
    with pytest.raises(SystemExit, match="Tucker failed: OutOfMemoryError: no room"):
        benchmark("rows")
    rows = run.read(tmp_path / "latency_cpu.csv")
    bad = {row["contestant"]: row["status"] for row in rows if row["status"] != "ok"}
    assert bad == {"Tucker": "failed: OutOfMemoryError: no room"}
    assert {row["contestant"] for row in rows if row["status"] == "ok"} >= {"nn.Bilinear", "dense", "CP"}


def test_a_wrong_output_is_never_timed(benchmark, monkeypatch, tmp_path):
    altered(monkeypatch, "dense", call=lambda x1, *rest: x1.new_full((*x1.shape[:-1], 3), torch.nan))
    with pytest.raises(SystemExit, match="dense wrong: relative error nan"):
        benchmark("rows")
    assert not [r for r in run.read(tmp_path / "latency_cpu.csv") if r["contestant"] == "dense" and r["median_ms"]]


def grown(tensor, factor=1.1):
    """The same values, with a gradient that is too large."""
    return factor * tensor + (1 - factor) * tensor.detach()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_last_row_is_never_timed(benchmark, monkeypatch, tmp_path, dtype):
    right = cases.ops.bilinear_dense

    def last_row_off(*tensors):
        output = right(*tensors).clone()
        output[-1] += 0.08 * output.abs().max()
        return output

    altered(monkeypatch, "dense", call=last_row_off)
    with pytest.raises(SystemExit, match=r"dense wrong: relative error 0\.0"):
        benchmark("rows", "--rows", "suite", "--dtypes", dtype)
    statuses = {row["contestant"]: row["status"] for row in run.read(tmp_path / "latency_cpu.csv")}
    assert [name for name, status in statuses.items() if status != "ok"] == ["dense"]


@pytest.mark.parametrize(
    ("case", "name", "position", "word"),
    [("rows", "dense", 0, "input1"), ("rows", "CP", 1, "input2"), ("rows", "Tucker", 4, "operand 5"),
     ("rows", "dense", 2, "operand 3"), ("pairs", "dense", 1, "input2"), ("pairs", "CP", 5, "operand 6")],
)  # fmt: skip
def test_a_wrong_gradient_is_never_timed(benchmark, monkeypatch, case, name, position, word):
    made = cases.contestants

    def contestants(*args):
        found = made(*args)
        call = found[name].call

        def off(*tensors):
            return call(*(grown(tensor) if at == position else tensor for at, tensor in enumerate(tensors)))

        return found | {name: dataclasses.replace(found[name], call=off)}

    monkeypatch.setattr(latency, "contestants", contestants)
    with pytest.raises(SystemExit, match=f"{name} wrong: relative error 0.* in the gradient of {word}") as found:
        benchmark(case, "--rows", "suite", "--passes", "forward", "training")
    assert len(str(found.value).splitlines()) == 1  # the forward is right, and so are the others


def test_an_output_that_is_wrong_in_training_alone_is_never_timed(benchmark, monkeypatch):
    right = cases.ops.bilinear_dense

    def off(*tensors):
        output = right(*tensors)
        return output + 0.01 * output.detach().abs().max() if output.requires_grad else output

    altered(monkeypatch, "dense", call=off)
    with pytest.raises(SystemExit, match=r"dense wrong: relative error 0\.0.* in the output in training") as found:
        benchmark("rows", "--rows", "suite", "--passes", "forward", "training")
    assert len(str(found.value).splitlines()) == 1  # without gradients it is right


def test_a_gradient_that_is_wrong_in_other_rows_is_never_timed(benchmark, monkeypatch):
    right = cases.ops.bilinear_dense
    other = torch.tensor([row for row in range(6) if row not in gate.checked(6)])
    assert len(other)

    def off(x1, *rest):
        x1 = x1.view_as(x1)
        if x1.requires_grad:
            x1.register_hook(lambda gradient: gradient.index_fill(0, other, 0.5))
        return right(x1, *rest)

    altered(monkeypatch, "dense", call=off)
    with pytest.raises(SystemExit, match=r"dense wrong: relative error 0\.5 in the gradient of input1, which"):
        benchmark("rows", "--rows", "suite", "--passes", "training")


@pytest.mark.parametrize("pairs", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [3, 5, 11])
def test_a_block_of_rows_that_a_weights_gradient_leaves_out_shows(block, dtype, pairs):
    count, size = (20, 1) if pairs else (3000, 64)
    case = cases.Case("long", 9, 7, 5, count, pairs)
    right = cases.contestants(case, count, dtype, torch.device("cpu"))["CP"]
    assert gate.wrong(right, bool(pairs), training=True) == ""
    rows = torch.arange(block * size, (block + 1) * size)
    assert not set(rows.tolist()) & set(gate.checked(count, bool(pairs)))

    def off(x1, x2, in1, in2, out, bias):
        output = right.call(x1, x2, in1, in2, out, bias)
        unseen = right.call(x1, x2, in1, in2, out.detach(), bias)
        left_out = torch.zeros(count, dtype=torch.bool).index_fill(0, rows, True)
        return torch.where(left_out.view(-1, *[1] * (output.dim() - 1)), unseen, output)

    assert gate.wrong(dataclasses.replace(right, call=off), bool(pairs)) == ""
    assert "the gradient of operand 5" in gate.wrong(dataclasses.replace(right, call=off), bool(pairs), training=True)


@pytest.mark.parametrize(("count", "pairs"), [(1, False), (64, False), (5416, False), (100, True)])
def test_every_block_of_rows_has_one_in_a_direction(count, pairs):
    groups = [gate.checked(count, pairs), *gate.others(count, 8, pairs)]
    size = 1 if pairs else 64
    assert {row // size for group in groups for row in group} == set(range(-(-count // size)))
    assert max(map(len, groups)) <= 20


@pytest.mark.parametrize("name", ["dense", "CP", "Tucker"])
def test_a_bias_that_is_left_out_shows_in_16_bits(name):
    case = cases.Case("wide", 256, 256, 32, 64)
    right = cases.contestants(case, 64, torch.bfloat16, torch.device("cpu"))[name]
    assert gate.wrong(right, False) == ""
    off = dataclasses.replace(right, call=lambda *t: right.call(*t[:-1], torch.zeros_like(t[-1])))
    assert gate.wrong(off, False).startswith("relative error")


def test_the_gate_keeps_no_case_alive():
    found = cases.contestants(TINY[0], 6, torch.float32, torch.device("cpu"))
    assert [gate.wrong(contestant, False) for contestant in found.values()] == [""] * len(found)
    kept = [weakref.ref(contestant.exact) for contestant in found.values()]
    del found
    assert {reference() for reference in kept} == {None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_gradients_are_compared_in_slices_of_a_dense_weight(case, dtype):
    found = cases.contestants(case, case.rows, dtype, torch.device("cpu"))
    trained = [contestant for contestant in found.values() if contestant.trains]
    assert len(trained) > 5
    for contestant in trained:
        assert gate.wrong(contestant, bool(case.pairs), training=True, most_widened=1) == ""


def test_another_shape_or_dtype_is_wrong(benchmark, monkeypatch):
    right = cases.ops.bilinear_dense
    altered(monkeypatch, "dense", call=lambda *tensors: right(*tensors).double())
    with pytest.raises(SystemExit, match=r"dense wrong: an output of \(6, 3\) in torch\.float64"):
        benchmark("rows", "--rows", "suite")


@pytest.mark.parametrize("count", [1, 2, 6, 32, 64, 65, 512, 5416])
def test_rows_from_all_over_the_batch_are_checked(count):
    rows = gate.checked(count)
    assert rows == sorted(set(rows))
    assert {0, count - 1, count // 2} <= set(rows) <= set(range(count))
    for edge in (64, 128):
        assert count <= edge or {edge - 1, edge, count // edge * edge} & set(range(count)) <= set(rows)
    assert len(rows) <= 20


def test_the_gate_has_the_tests_tolerances():
    assert gate.TOLERANCES.items() <= support.TOLERANCES.items()


def test_a_run_goes_on_where_it_was_cut_off(benchmark, monkeypatch):
    before = benchmark("rows")
    measured = []
    whole = run.measured
    monkeypatch.setattr(
        run, "measured", lambda case, *args, **options: (measured.append(case), whole(case, *args, **options))[1]
    )
    after = benchmark("--resume")
    assert [case.name for case in measured] == ["pairs"]
    assert after[: len(before)] == before


def test_a_contestant_that_takes_the_gpu_with_it_is_left_out_by_a_fresh_process(benchmark, monkeypatch, tmp_path):
    row = {"case": "rows", "rows": 6, "contestant": "CP", "status": "failed: RuntimeError: illegal address"}

    def lost(*args, **options):
        raise latency.DeviceLost([row])

    class Replaced(Exception):
        pass

    def execv(program, arguments):
        raise Replaced(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(run, "measured", lost)
        patched.setattr(run.os, "execv", execv)
        with pytest.raises(Replaced) as found:
            benchmark("rows")
    assert found.value.args[1:3] == ("-m", "benchmarks.run")
    assert "--resume" in found.value.args
    with pytest.raises(SystemExit, match="CP failed: RuntimeError: illegal address"):
        benchmark("rows", "--resume")
    rows = [row for row in run.read(tmp_path / "latency_cpu.csv") if row["rows"] == "6"]
    assert [row["status"] for row in rows if row["contestant"] == "CP"] == ["failed: RuntimeError: illegal address"]
    assert {row["contestant"] for row in rows if row["status"] == "ok"} >= {"nn.Bilinear", "dense", "Tucker"}


def test_the_compiled_contestants_of_every_case_are_compiled(monkeypatch):
    # past a number of sizes torch would run a function as it is
    compiled, graphs = torch.compile, []

    def counted(function, **options):
        return compiled(function, backend=lambda graph, _: graphs.append(graph) or graph.forward, **options)

    monkeypatch.setattr(torch, "compile", counted)
    for size in range(2, 11):
        found = cases.contestants(Case("pairs", size, size, 3, 2, pairs=3), 2, torch.float32, torch.device("cpu"))
        cases._on_gpu(found, pairs=True)
        graphs.clear()
        with torch.no_grad():
            found["CP composed, compiled"].call(*found["CP composed"].tensors)
        assert len(graphs) == 1


def test_what_was_measured_is_drawn(benchmark, tmp_path):
    benchmark()
    target = tmp_path / "latency_cpu.png"
    assert latency_plot.draw(tmp_path / "latency_cpu.csv", target)
    assert target.read_bytes().startswith(b"\x89PNG")
    assert not latency_plot.draw(tmp_path / "absent.csv", target)


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--rows", "0"], "positive numbers"), (["nobody"], "should be among")]
)
def test_a_users_mistake_is_told(benchmark, capsys, arguments, words):
    with pytest.raises(SystemExit):
        benchmark(*arguments)
    assert words in capsys.readouterr().err
