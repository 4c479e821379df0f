import pytest
import torch

from compress_bilinear import CPBilinear, TuckerBilinear
from compress_bilinear.decomposition import check_tucker_rank, check_weight, cp_bytes, tucker_bytes
from compress_bilinear.errors import CompressionError, ConfigError
from compress_bilinear.fitting import stored_bytes

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(("shape", "rank"), [((17, 37, 63), 5), ((3, 1, 9), 20), ((1, 6, 5), 1)])
def test_cp_bytes_are_those_that_the_layer_stores(shape, rank, quantize, dtype):
    out, in1, in2 = shape
    layer = CPBilinear(in1, in2, out, rank, bias=False, dtype=dtype, quantize=quantize)
    assert cp_bytes(rank, shape, dtype.itemsize, quantize) == stored_bytes(layer)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((17, 37, 63), (4, 9, 7)), ((17, 63, 37), (4, 7, 9)), ((3, 1, 9), (3, 1, 4)), ((1, 6, 5), (1,) * 3)],
)
def test_tucker_bytes_are_those_that_the_layer_stores(shape, rank, quantize, dtype):
    out, in1, in2 = shape
    layer = TuckerBilinear(in1, in2, out, rank, bias=False, dtype=dtype, quantize=quantize)
    assert tucker_bytes(rank, shape, dtype.itemsize, quantize) == stored_bytes(layer)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_tucker_bytes_broadcast_over_tensors_of_ranks(quantize):
    shape = (3, 4, 5)
    ranks = [torch.arange(1, size + 1) for size in shape]
    table = tucker_bytes([ranks[0][:, None, None], ranks[1][None, :, None], ranks[2]], shape, 4, quantize)
    expected = [
        [[tucker_bytes((a, b, c), shape, 4, quantize) for c in range(1, 6)] for b in range(1, 5)] for a in range(1, 4)
    ]
    assert table.tolist() == expected


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (torch.ones(3, 4), r"\(3, 4\)"),
        (torch.ones(3, 0, 4), r"\(3, 0, 4\)"),
        ([[[1.0]]], "list"),
        (torch.ones(2, 2, 2, dtype=torch.int64), "torch.int64"),
        (torch.ones(2, 2, 2).to_sparse(), "torch.sparse_coo"),
        (torch.ones(2, 2, 2, device="meta"), "device meta"),
        (torch.full((2, 2, 2), torch.nan), "NaN or infinity"),
        (torch.full((2, 2, 2), -torch.inf), "NaN or infinity"),
    ],
    ids=["matrix", "empty", "list", "integers", "sparse", "meta", "nan", "infinite"],
)
def test_a_weight_that_cannot_be_decomposed_is_an_error_that_says_what_was_found(weight, found):
    with pytest.raises(CompressionError, match=f"should be .*Found .*{found}"):
        check_weight(weight)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        ((4, 4, 5), r"`rank\[0\]` should be at most 3, out_features of layer 'rel'. Found 4."),
        ((3, 9, 5), r"`rank\[1\]` should be at most 4, in1_features of layer 'rel'. Found 9."),
        ((3, 4, 6), r"`rank\[2\]` should be at most 5, in2_features of layer 'rel'. Found 6."),
        ((3, 0, 5), r"`rank\[1\]` should be a positive int. Found 0."),
        ((3, 4, 5.0), r"`rank\[2\]` should be a positive int. Found 5.0."),
        ((True, 4, 5), r"`rank\[0\]` should be a positive int. Found True."),
        ((3, 4), r"triple .*Found \(3, 4\)."),
        (3, "triple .*Found 3."),
    ],
)
def test_a_bad_tucker_rank_is_an_error_that_says_required_and_found(rank, message):
    with pytest.raises(ConfigError, match=message):
        check_tucker_rank(rank, (3, 4, 5), "layer 'rel'")


def test_tucker_ranks_from_1_to_the_sizes_are_fine():
    check_tucker_rank((1, 1, 1), (3, 4, 5))
    check_tucker_rank([3, 4, 5], (3, 4, 5))
