"""On a GPU: captured graphs, and gradients of every dtype. Skipped where there is none."""

import pytest
import torch
from support import assert_matches_reference

from compress_bilinear import ops
from compress_bilinear.quantization import FORMATS, LEVELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = (101, 64, 45)  # (I, J, O)
CALLS = [(kind, pairs) for kind in ("dense", "cp", "tucker") for pairs in (False, True)]
WAYS = [(*call, None) for call in CALLS]
WAYS += [(kind, False, backend) for kind in ("dense", "cp") for backend in ("composed", "triton")]


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
    return getattr(ops, ("pairwise_" if pairs else "bilinear_") + kind)(
        *tensors, **{name: value for name, value in options.items() if value is not None}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "pairs", "backend"), WAYS)
def test_every_path_has_the_references_outputs_and_gradients(kind, pairs, backend, dtype):
    if (kind, backend, dtype) == ("dense", "triton", torch.float16):
        return  # which is refused
    tensors = [tensor.requires_grad_() for tensor in operands(kind, pairs, dtype)]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    found, exact = call(kind, pairs, *tensors, backend=backend), call(kind, pairs, *wide)
    assert_matches_reference(found.detach(), exact.detach(), 10)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(exact.sum(), wide), strict=True
    ):
        assert_matches_reference(ours, theirs, 10)


def in_int8(kind, tensors):
    """The operands with their weights in int8, and the option that has the scales of a CP."""
    x1, x2, *rest, bias = tensors
    if kind == "cp":
        sigma = torch.stack([factor.float().abs().max() for factor in rest]).prod().expand(30).contiguous()
        return [x1, x2, *map(unit_values, rest), bias], {"sigma": sigma}
    values = [FORMATS["int8"].encode(t, "weight") if t.dim() == 3 else unit_values(t) for t in rest]
    return [x1, x2, *values, bias], {}


def unit_values(factor):
    return FORMATS["int8"].encode(factor.float() / factor.float().abs().max() * LEVELS / 128, "factor")


def captured(step):
    """A graph of a step, and what it gives, after kernels have been compiled and loaded on a stream beside."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # where a wait for the device, or memory of the host, is an error
        found = step()
    return graph, found


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(("kind", "pairs", "backend"), WAYS)
def test_a_forward_is_captured_in_a_graph_and_replayed_with_new_inputs(kind, pairs, backend, int8):
    tensors, options = operands(kind, pairs, torch.bfloat16), {}
    if int8:
        tensors, options = in_int8(kind, tensors)
        backend = None if kind == "dense" else backend  # whose kernel reads floating point alone
    with torch.no_grad():
        graph, found = captured(lambda: call(kind, pairs, *tensors, backend=backend, **options))
        before = found.clone()
        for tensor, factor in zip(tensors[:2], (-0.5, 3.0), strict=True):
            tensor.copy_(tensor.roll(1, 0) * factor)
        graph.replay()
        expected = call(kind, pairs, *tensors, backend=backend, **options)
    assert not torch.equal(found, before)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "pairs", "backend"), WAYS)
def test_a_forward_with_its_backward_is_captured_and_replayed_with_new_inputs(kind, pairs, backend):
    tensors = [tensor.requires_grad_() for tensor in operands(kind, pairs, torch.bfloat16)]
    direction = torch.randn_like(call(kind, pairs, *tensors))

    def step():
        return torch.autograd.grad(call(kind, pairs, *tensors, backend=backend), tensors, direction)

    graph, found = captured(step)
    with torch.no_grad():
        for tensor, factor in zip(tensors[:2], (-0.5, 3.0), strict=True):
            tensor.copy_(tensor.roll(1, 0) * factor)
    graph.replay()
    for ours, expected in zip(found, step(), strict=True):
        assert_matches_reference(ours, expected.double())


@pytest.mark.parametrize(("kind", "pairs"), CALLS)
def test_compiled_with_less_overhead_it_gives_the_same_for_new_inputs(kind, pairs):
    tensors = operands(kind, pairs, torch.bfloat16)
    compiled = torch.compile(lambda *args: call(kind, pairs, *args), fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):  # a warm-up, a recording, and replays
            tensors[0] = tensors[0].roll(1, 0)
            torch.compiler.cudagraph_mark_step_begin()
            assert_matches_reference(compiled(*tensors), call(kind, pairs, *(t.double() for t in tensors)), 2)


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
