import pytest
import torch
from support import bilinear
from torch import nn

import compress_bilinear as cb


@pytest.mark.parametrize("limit", [0.5, 0.8])
def test_by_weight_it_is_never_larger_than_a_single_method(limit):
    layer = bilinear(6, 5, 4)
    (auto,) = cb.plan(layer, cb.AutoConfig(error=limit), measure_latency=False).report.layers
    assert auto.weight_error <= limit
    for quantize in (None, "int8", "nf4"):
        for kind in (cb.CPConfig, cb.TuckerConfig):
            config = kind(rank=cb.MaxError(limit), quantize=quantize)
            (single,) = cb.plan(layer, config, measure_latency=False).report.layers
            assert auto.bytes_after <= single.bytes_after


def test_exact_low_rank_beats_8_bit_dense_at_an_error_that_rounded_factors_miss():
    layer = nn.Bilinear(20, 20, 20)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("o,i,j->oij", *torch.randn(3, 20, generator=torch.Generator().manual_seed(0))))
    (found,) = cb.plan(layer, cb.AutoConfig(error=0.006), measure_latency=False).report.layers
    assert found.bytes_after < layer.weight.numel() / 10
