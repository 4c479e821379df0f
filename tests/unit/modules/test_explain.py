import pytest
import torch
from support import bilinear

from compress_bilinear import CPBilinear, DenseBilinear, TuckerBilinear
from compress_bilinear.ops import _choice

LAYERS = {
    "cp": lambda **options: CPBilinear(9, 7, 5, 4, **options),
    "tucker": lambda **options: TuckerBilinear(9, 7, 5, (2, 3, 4), **options),
    "dense": lambda **options: DenseBilinear.from_bilinear(bilinear(9, 7, 5), **options),
}


@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_on_a_cpu_says_that_it_is_composed_and_why(kind, quantize):
    text = LAYERS[kind](quantize=quantize).explain()
    reasons = ("the only one",) if kind == "tucker" else ("on cpu", "not installed", "read int8")
    assert any(reason in text for reason in reasons)


@pytest.mark.parametrize("kind", ["cp", "tucker"])
def test_what_wraps_an_inner_layer_is_named_and_the_result_is_the_same(kind):
    layer = LAYERS[kind]()
    inputs = torch.randn(6, 9), torch.randn(6, 7)
    expected = layer(*inputs)
    handle = layer.in1_proj.register_forward_hook(lambda *_: None)
    assert "`in1_proj` has hooks" in layer.explain()
    torch.testing.assert_close(layer(*inputs), expected)
    handle.remove()
    layer.out_proj = torch.nn.Sequential(layer.out_proj)
    assert "`out_proj` is a Sequential" in layer.explain()
    torch.testing.assert_close(layer(*inputs), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_on_a_gpu_a_layer_says_why_no_kernel_runs(kind, monkeypatch):
    monkeypatch.setattr(_choice, "reason_against_triton", lambda device, dtype: None)
    reason = "the only one for a Tucker layer" if kind == "tucker" else "has not been measured"
    assert reason in LAYERS[kind]().explain(4096, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", LAYERS)
def test_all_pairs_are_composed(kind):
    assert "the only one for pairs" in LAYERS[kind]().explain(100_000, pairs=True, device="cuda")
