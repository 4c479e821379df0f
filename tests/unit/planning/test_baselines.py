"""What a layer's record tells besides its replacement, where the config left no choice."""

import pytest
import torch
from support import bilinear, low_rank
from torch import nn

import compress_bilinear as cb
from compress_bilinear.fitting import stored_bytes, weight_error
from compress_bilinear.planning import _baselines as baselines

IN1, IN2, OUT = 12, 11, 9
ROWS = [(torch.randn(64, IN1), torch.randn(64, IN2)) for _ in range(4)]
CONFIGS = {
    "CP": cb.CPConfig(rank=3),
    "Tucker": cb.TuckerConfig(rank=cb.MaxSize(0.3), quantize="int8"),
    "weight error": cb.TuckerConfig(rank=cb.MaxError(0.5), quantize="int8"),
    "output error": cb.CPConfig(rank=cb.MaxError(0.5, on="output")),
    "int8": cb.DenseConfig(quantize="int8"),
}


def model() -> nn.Bilinear:
    layer = bilinear(IN1, IN2, OUT)
    with torch.no_grad():
        layer.weight.copy_(low_rank((OUT, IN1, IN2), 4, noise=0.3))
    return layer


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("calibrated", [True, False], ids=["rows", "no rows"])
def test_it_stands_among_the_layer_and_eight_bits(name, calibrated):
    if name == "output error" and not calibrated:
        pytest.skip("needs rows")
    layer = model()
    small, report = cb.compress(
        layer, CONFIGS[name], calibration=ROWS if calibrated else None, measure_latency=False, max_seconds=2
    )
    (record,) = report.layers
    assert record.front == ()
    (chosen,) = (one for one in record.compared if one.chosen)
    assert (chosen.method, chosen.rank, chosen.quantize) == (record.method, record.rank, record.quantize)
    assert (chosen.bytes, chosen.weight_error, chosen.output_error) == (
        stored_bytes(small),
        record.weight_error,
        record.output_error,
    )
    (whole,) = (one for one in record.compared if one.method == "keep")
    assert (whole.bytes, whole.weight_error, whole.output_error) == (
        stored_bytes(layer),
        0.0,
        0.0 if calibrated else None,
    )
    (eight,) = (one for one in record.compared if (one.method, one.quantize) == ("dense", "int8"))
    dense = cb.DenseBilinear.from_bilinear(layer, quantize="int8")
    assert eight.weight_error == pytest.approx(weight_error(layer.weight, dense), rel=0.3)  # its rounding may be fitted
    assert (eight.output_error is None) == (not calibrated)
    sizes = [one.bytes for one in record.compared]
    assert sizes == sorted(sizes)
    assert cb.Report.from_json(report.to_json()) == report


def test_a_search_on_the_outputs_shows_the_ranks_that_it_tried():
    _, report = cb.compress(model(), CONFIGS["output error"], calibration=ROWS, measure_latency=False)
    tried = [one for one in report.layers[0].compared if one.method == "cp"]
    assert len(tried) == len({one.rank for one in tried}) > 2
    assert sum(one.chosen for one in tried) == 1
    assert all(one.output_error is not None for one in tried)


def test_where_nothing_is_replaced_the_layer_itself_is_the_chosen_one():
    _, report = cb.compress(model(), cb.CPConfig(rank=90), measure_latency=False)
    (record,) = report.layers
    assert record.decision == "kept"
    assert [one.method for one in record.compared if one.chosen] == ["keep"]
    assert any((one.method, one.rank) == ("cp", 90) for one in record.compared)


def test_a_weight_that_would_take_seconds_is_not_quantized_for_comparison(monkeypatch):
    monkeypatch.setattr(baselines, "_MOST", OUT * IN1 * IN2 - 1)
    _, report = cb.compress(model(), CONFIGS["CP"], measure_latency=False)
    assert [one.method for one in report.layers[0].compared] == ["cp", "keep"]


def test_training_renews_the_errors_that_the_chosen_one_had():
    points = [baselines.point(cb.CPBilinear(3, 3, 2, rank), 0.5, 0.4, chosen=rank == 2) for rank in (1, 2)]
    points.append(baselines.point(cb.CPBilinear(3, 3, 2, 3), None, 0.4, chosen=True))
    found = baselines.renewed(points, 0.6, 0.1)
    assert [(one.weight_error, one.output_error) for one in found] == [(0.5, 0.4), (0.6, 0.1), (None, 0.1)]
