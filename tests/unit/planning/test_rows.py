"""Rows in a file calibrate a checkpoint without its code, exactly as the network's own calls would."""

import json
from pathlib import Path

import numpy
import pytest
import safetensors.numpy
import torch
from safetensors.torch import save_file
from support import bilinear, low_rank
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.files import read_state
from compress_bilinear.planning import choose_weights, compress_state
from compress_bilinear.planning._rows import batches, read_rows

IN1, IN2, OUT = 14, 13, 6
SHAPES = {"rel": (OUT, IN1, IN2), "head": (OUT, IN1, IN2)}


def rows(count: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(2, 0.1, IN1), torch.linspace(0.1, 2, IN2)
    first, second = (torch.randn(count, len(scale), generator=generator) * scale for scale in scales)
    return first, second


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({name: bilinear(IN1, IN2, OUT, seed=seed) for seed, name in enumerate(SHAPES)})
    with torch.no_grad():
        for seed, layer in enumerate(model.values()):
            layer.weight.copy_(low_rank((OUT, IN1, IN2), 3, noise=0.4, seed=seed))
    torch.save(model.state_dict(), "net.pt")
    first, second = rows()
    save_file({"rel.input1": first, "rel.input2": second}, "rows.safetensors")
    return model


COMPRESS = ("compress", "net.pt", "-o", "small.safetensors", "--no-latency", "--layers", "rel")
TUCKER = ("--method", "tucker", "--rank", "3,4,4")


class Pair(nn.Module):
    def __init__(self, rel):
        super().__init__()
        self.rel = rel

    def forward(self, x, y):
        return self.rel(x, y)


def test_it_fits_as_the_networks_own_calls_do(run, folder):
    status, out, err = run(*COMPRESS, *TUCKER, "--calibration", "rows.safetensors", "--json")
    assert (status, err) == (0, "")
    (found,) = cb.Report.from_json(out).layers
    layer = Pair(folder["rel"])
    first, second = rows()
    batches = list(zip(first.split(256), second.split(256), strict=True))
    small, expected = cb.compress(layer, cb.TuckerConfig(rank=(3, 4, 4)), calibration=batches, measure_latency=False)
    assert found.output_error == pytest.approx(expected.layers[0].output_error, rel=1e-6)
    assert found.calibration_rows == expected.layers[0].calibration_rows == 150
    loaded = cb.load("small.safetensors", nn.ModuleDict({name: bilinear(IN1, IN2, OUT) for name in SHAPES}))
    torch.testing.assert_close(loaded["rel"].to_dense(), small.rel.to_dense())
    run(*COMPRESS, *TUCKER, "--json")
    _, told, _ = run("report", "net.pt", "small.safetensors", "--calibration", "rows.safetensors", "--json")
    assert cb.Report.from_json(told).layers[0].output_error > found.output_error  # of what was fitted to the weight


def test_the_report_on_two_files_measures_on_the_rows_that_were_held_out(run):
    _, out, _ = run(*COMPRESS, *TUCKER, "--calibration", "rows.safetensors", "--json")
    _, told, _ = run("report", "net.pt", "small.safetensors", "--calibration", "rows.safetensors", "--json")
    first, second = (cb.Report.from_json(text).layers[0] for text in (out, told))
    assert second.output_error == pytest.approx(first.output_error, rel=1e-9)
    assert second.calibration_rows == first.calibration_rows


def test_a_limit_may_count_on_the_outputs(run):
    limit = ("--method", "tucker", "--max-error", "0.3", "--on", "output")
    _, out, _ = run(*COMPRESS, *limit, "--calibration", "rows.safetensors", "--json")
    found = cb.Report.from_json(out)
    assert found.layers[0].output_error <= 0.3 < found.layers[0].weight_error
    assert found.config["layers"]["rel"]["on"] == "output"


def test_a_layer_without_rows_is_told(run):
    _, out, _ = run(*COMPRESS, "--layers", "head", *TUCKER, "--calibration", "rows.safetensors", "--json")
    rel, head = cb.Report.from_json(out).layers
    assert rel.output_error is not None
    assert head.output_error is None
    assert "no calibration row reached it" in head.reason


def test_the_latency_is_of_256_rows_whatever_the_file_holds():
    state, _ = read_state("net.pt")
    chosen = choose_weights(state, ["rel"])
    planned, _, _ = compress_state(state, chosen, cb.DenseConfig(quantize="int8"), calibration="rows.safetensors")
    assert planned.report.layers[0].batch_size == 256


def test_rows_come_in_batches_of_256(folder):
    first, second = rows()
    found = batches({"rel": (first, second), "head": (first[:300].double(), second[:300].double())}, folder)
    assert [{name: len(pair[0]) for name, pair in batch.items()} for batch in found] == [
        {"rel": 256, "head": 256},
        {"rel": 256, "head": 44},
        {"rel": 88},
    ]
    assert all(value.dtype == torch.float32 for batch in found for pair in batch.values() for value in pair)


def test_a_shared_layer_has_the_rows_of_all_its_names(run, folder):
    folder["again"] = folder["rel"]
    torch.save(folder.state_dict(), "net.pt")
    first, second = rows(40)
    save_file({"again.input1": first, "again.input2": second}, "again.safetensors")
    _, out, _ = run(*COMPRESS, *TUCKER, "--calibration", "again.safetensors", "--json")
    assert cb.Report.from_json(out).layers[0].calibration_rows == 10
    both = {f"{name}.input{k + 1}": rows(40, seed)[k] for seed, name in enumerate(("rel", "again")) for k in (0, 1)}
    save_file(both, "both.safetensors")
    _, out, _ = run(*COMPRESS, *TUCKER, "--calibration", "both.safetensors", "--json")
    assert cb.Report.from_json(out).layers[0].calibration_rows == 20
    _, told, _ = run("report", "net.pt", "small.safetensors", "--calibration", "both.safetensors", "--json")
    assert cb.Report.from_json(told).layers[0].calibration_rows == 20


def test_a_file_that_is_one_layer_has_rows_without_a_name(run, folder):
    torch.save(folder["rel"].to(torch.bfloat16).state_dict(), "layer.pt")
    first, second = rows(3 * 200)
    save_file({"input1": first.view(3, 200, IN1), "input2": second.view(3, 200, IN2)}, "one.safetensors")
    args = ("compress", "layer.pt", "-o", "small.safetensors", "--no-latency", "--layers", "*")
    args += ("--method", "auto", "--max-size", "0.4")
    status, out, err = run(*args, "--calibration", "one.safetensors", "--json", "--max-seconds", "3")
    assert (status, err) == (0, "")
    (found,) = cb.Report.from_json(out).layers
    assert (found.name, found.calibration_rows, found.output_error < 0.5) == ("", 150, True)
    assert len(found.front) > 3


def test_the_network_that_refinement_trains_is_all_layers_side_by_side(run):
    config = {"refine": "network", "max_seconds": 1, "layers": {"rel": {"method": "cp", "rank": 3}}}
    Path("refine.json").write_text(json.dumps(config))
    status, out, err = run(*COMPRESS[:5], "--config", "refine.json", "--calibration", "rows.safetensors", "--json")
    assert (status, err) == (0, "")
    assert cb.Report.from_json(out).layers[0].output_error < 1


X, Y = rows(20)
MISTAKES = {
    "a name that is no layer's": (
        {"real.input1": X, "real.input2": Y},
        "Found 'real.input1'. Did you mean rel.input1?",
    ),
    "one of two": ({"rel.input1": X}, "should have rel.input1 and rel.input2. Found no rel.input2"),
    "transposed": ({"rel.input1": X.T.contiguous(), "rel.input2": Y}, "(..., 14). Found (14, 20) torch.float32"),
    "swapped": ({"rel.input1": Y, "rel.input2": X}, "should be floating rows of shape (..., 14). Found (20, 13)"),
    "integers": ({"rel.input1": X.int(), "rel.input2": Y}, "Found (20, 14) torch.int32"),
    "a single row": ({"rel.input1": X[0].clone(), "rel.input2": Y[0].clone()}, "Found (14,) torch.float32"),
    "no row": ({"rel.input1": X[:0].clone(), "rel.input2": Y[:0].clone()}, "Found (0, 14)"),
    "other rows": (
        {"rel.input1": X[:19].clone(), "rel.input2": Y},
        "as many rows, which belong together. Found (19,) and",
    ),
    "another layer alone": ({"head.input1": X, "head.input2": Y}, "should have rows of rel. Found none"),
    "nothing": ({}, "should have rows of rel. Found none"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_by_the_tensors_name(case):
    tensors, problem = MISTAKES[case]
    save_file(tensors, "wrong.safetensors")
    with pytest.raises(cb.CompressionError) as raised:
        read_rows("wrong.safetensors", SHAPES, {"rel": "rel"})
    assert problem in str(raised.value)


def test_values_that_are_not_finite_are_told(run):
    save_file({"rel.input1": X * torch.inf, "rel.input2": Y}, "wrong.safetensors")
    status, _, err = run(*COMPRESS, *TUCKER, "--calibration", "wrong.safetensors")
    assert status == 2
    assert "The calibration inputs that reach layer 'rel' should be finite" in err


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("rows.pt", "should end in .safetensors. Found 'rows.pt'"),
        ("rows.npz", "To convert a .npz file: safetensors.numpy.save_file(dict(numpy.load(file)), 'rows.safetensors')"),
        ("none.safetensors", "'none.safetensors' should be a file. Found none"),
        ("text.safetensors", "should be a whole safetensors file"),
    ],
)
def test_a_file_that_holds_no_rows_is_told(file, problem):
    Path("text.safetensors").write_text("nothing")
    with pytest.raises(cb.CompressionError) as raised:
        read_rows(file, SHAPES, {"rel": "rel"})
    assert problem in str(raised.value)


def test_a_npz_file_is_converted_as_the_message_says():
    arrays = {"rel.input1": X.numpy(), "rel.input2": Y.numpy()}
    numpy.savez("rows.npz", **arrays)
    safetensors.numpy.save_file(dict(numpy.load("rows.npz")), "converted.safetensors")
    assert torch.equal(read_rows("converted.safetensors", SHAPES, {"rel": "rel"})["rel"][1], Y)
