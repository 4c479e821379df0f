import pytest
import torch
from support import assert_matches_reference

from compress_bilinear import ops
from compress_bilinear.ops import _gemm


def normal(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def onednn():
    """Products of any size by oneDNN, whatever the processor."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("torch was built without oneDNN")
    with ops.use_tuning(ops.Tuning(onednn=True, onednn_rows=1, onednn_products=0)):
        yield


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1,)])
def test_onednn_products_are_linear_maps(shape):
    x, weight, bias = normal(*shape, 9).float(), normal(7, 9).float(), normal(7).float()
    for w in (weight, weight.T.contiguous().T, normal(9, 7).float().T):
        assert _gemm.uses_onednn(x, w)
        exact = torch.nn.functional.linear(x.double(), w.double())
        assert_matches_reference(ops.linear(x, w, bias), exact + bias.double())


@pytest.mark.usefixtures("onednn")
def test_onednn_products_have_gradients_twice():
    tensors = [normal(4, 5).float(), normal(3, 5).float(), normal(3).float()]
    for wanted in ((0,), (1,), (2,), (0, 1, 2)):
        ours, wide = ([t.clone() for t in tensors], [t.double() for t in tensors])
        for index in wanted:
            ours[index].requires_grad_(), wide[index].requires_grad_()
        y, exact = ops.linear(*ours).pow(3).sum(), torch.nn.functional.linear(*wide).pow(3).sum()
        first = torch.autograd.grad(y, [ours[i] for i in wanted], create_graph=True)
        expected = torch.autograd.grad(exact, [wide[i] for i in wanted], create_graph=True)
        for gradient, reference_ in zip(first, expected, strict=True):
            assert_matches_reference(gradient.detach(), reference_.detach())
        (second,) = torch.autograd.grad(sum(g.pow(2).sum() for g in first), ours[wanted[0]])
        (exact_second,) = torch.autograd.grad(sum(g.pow(2).sum() for g in expected), wide[wanted[0]])
        assert_matches_reference(second, exact_second)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("order", ops.ORDERS)
def test_every_order_of_a_dense_layer_by_onednn(order):
    tensors = [normal(33, 37), normal(33, 63), normal(17, 37, 63), normal(17)]
    single = [t.float().requires_grad_() for t in tensors]
    wide = [t.float().double().requires_grad_() for t in tensors]
    expected = ops.reference.bilinear_dense(*wide)
    found = ops.bilinear_dense(*single, order=order)
    assert_matches_reference(found.detach(), expected.detach())
    with torch.no_grad():
        assert_matches_reference(ops.bilinear_dense(*single, order=order), expected.detach())
        pairs = ops.pairwise_dense(single[0][:5], *single[1:])
        assert_matches_reference(pairs, ops.reference.pairwise_dense(wide[0][:5], *wide[1:]).detach())
    for ours, exact in zip(
        *(torch.autograd.grad(y.sum(), t) for y, t in ((found, single), (expected, wide))), strict=True
    ):
        assert_matches_reference(ours, exact)


@pytest.mark.usefixtures("onednn")
def test_whoever_watches_operators_sees_those_of_torch():
    x, weight = normal(4, 5).float(), normal(3, 5).float()
    assert _gemm.uses_onednn(x, weight)
    with torch.autocast("cpu"):
        assert not _gemm.uses_onednn(x, weight)
    assert torch.func.vmap(lambda row: ops.linear(row, weight))(x.unsqueeze(1)).shape == (4, 1, 3)
    exported = torch.export.export(torch.nn.Linear(5, 3), (x,))
    assert "mkldnn" not in str(exported.graph)
