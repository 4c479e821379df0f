"""On a GPU: captured graphs, gradients of every dtype, and the modules' fused path. Skipped where there is none."""

import pytest
import torch
from support import assert_matches_reference

from compress_bilinear import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = (101, 64, 45)  # (I, J, O)
CALLS = [(kind, pairs) for kind in ("dense", "cp", "tucker") for pairs in (False, True)]


def operands(kind, pairs, dtype):
    generator = torch.Generator().manual_seed(0)
    in1, in2, out = SHAPE
    rest = {
        "dense": [(out, in1, in2)],
        "cp": [(30, in1), (30, in2), (out, 30)],
        "tucker": [(20, in1), (18, in2), (33, 20, 18), (out, 33)],
    }[kind]
    leading = ((5, 9), (5, 12)) if pairs else ((70,), (70,))
    shapes = [(*leading[0], in1), (*leading[1], in2), *rest, (out,)]
    return [(0.3 * torch.randn(shape, generator=generator)).to("cuda", dtype) for shape in shapes]


def call(kind, pairs, *tensors, **options):
    return getattr(ops, ("pairwise_" if pairs else "bilinear_") + kind)(*tensors, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "composed", "triton"])
@pytest.mark.parametrize("kind", ["dense", "cp", "tucker"])
def test_every_path_has_the_references_outputs_and_gradients(kind, backend, dtype):
    tensors = [tensor.requires_grad_() for tensor in operands(kind, False, dtype)]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    found, exact = call(kind, False, *tensors, backend=backend), call(kind, False, *wide)
    assert_matches_reference(found.detach(), exact.detach(), 10)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(exact.sum(), wide), strict=True
    ):
        assert_matches_reference(ours, theirs, 10)


@pytest.mark.parametrize(("kind", "pairs"), CALLS)
def test_pairs_and_rows_are_captured_in_a_graph_and_replayed(kind, pairs):
    tensors = operands(kind, pairs, torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):  # kernels are compiled and loaded before
            call(kind, pairs, *tensors)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(kind, pairs, *tensors)
        tensors[0].neg_()
        graph.replay()
        assert torch.equal(captured, call(kind, pairs, *tensors))


@pytest.mark.parametrize(("kind", "pairs"), CALLS)
def test_autocast_has_its_way(kind, pairs):
    tensors = operands(kind, pairs, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        found = call(kind, pairs, *tensors)
    assert found.dtype == torch.bfloat16
    assert_matches_reference(found, call(kind, pairs, *(tensor.double() for tensor in tensors)), 2)


@pytest.mark.parametrize("kind", ["dense", "cp", "tucker"])
def test_a_compiled_graph_is_whole(kind):
    tensors = operands(kind, False, torch.bfloat16)
    compiled = torch.compile(lambda *args: call(kind, False, *args), fullgraph=True, dynamic=True)
    assert_matches_reference(compiled(*tensors), call(kind, False, *(tensor.double() for tensor in tensors)), 2)
