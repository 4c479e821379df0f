"""Networks in public projects' forms keep their own metric within 0.01 at a quarter of the bytes."""

from importlib.util import find_spec

import pytest

import compress_bilinear as cb
from benchmarks import public_forms

BY_DEFAULT = ("grouped bilinear", "outer-product fusion")  # the others are slow tests


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow) for name in public_forms.NETWORKS]
)
def test_the_metric_survives_4x(name, tmp_path):
    if name == "RESCAL" and find_spec("pykeen") is None:
        pytest.skip("the Kinships triples come with PyKEEN: pip install 'compress-bilinear[bench]'")
    network = public_forms.trained(name)
    before = network.metric(network.model)
    assert before > 0.7  # it has learnt its task
    config = public_forms.CONFIGS["Tucker int8"]
    options = {"calibration": network.batches, "measure_latency": False, "max_seconds": 4}
    small, report = cb.compress(network.model, config, **options)
    assert {layer.decision for layer in report.layers} == {"replaced"}
    assert all(layer.bytes_before >= 4 * layer.bytes_after for layer in report.layers)
    assert all(layer.output_error < 0.1 for layer in report.layers)
    assert network.metric(small) >= before - 0.01
