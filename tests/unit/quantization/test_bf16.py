import pytest
import torch

from compress_bilinear.errors import CompressionError
from compress_bilinear.quantization import FORMATS


def test_values_are_the_nearest():
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(FORMATS["bf16"].encode(tensor, "factor").decode(), tensor.bfloat16().float())


def test_values_beyond_its_range_are_an_error():
    with pytest.raises(CompressionError, match="should be within bfloat16's range"):
        FORMATS["bf16"].encode(torch.tensor([[1.0, 3.4e38]]), "rows")
