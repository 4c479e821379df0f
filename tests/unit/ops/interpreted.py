"""Every Triton kernel under Triton's interpreter, against float64 references; `test_triton.py` runs this file.

It is not collected by itself: TRITON_INTERPRET has to be set before Triton is imported, and holds for the process.
Fresh memory is filled with NaN, which shows what a kernel leaves unwritten. Operands are views of larger tensors of
NaN, which shows what it reads outside of them.
"""

import itertools

import pytest
import torch
from layers import int8_slices
from support import assert_matches_reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress_bilinear import ops
from compress_bilinear.errors import InputError
from compress_bilinear.ops import _choice
from compress_bilinear.ops.triton import _cp as _triton_cp
from compress_bilinear.ops.triton import _cp_pairs as _triton_cp_pairs
from compress_bilinear.ops.triton import _operators
from compress_bilinear.ops.triton import _tucker_pairs as _triton_tucker_pairs
from compress_bilinear.quantization import FORMATS, decode_int8

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# (N, I, J, O): odd, a size 1 in each place, and wider than the tiles
SIZES = ((5, 18, 7, 17), (1, 1, 9, 3), (33, 9, 1, 1), (33, 18, 17, 33))


def covering(*axes):
    """The product of the axes' values. All but enough for each value to appear are slow."""
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        usual = sum(places) % max(map(len, axes)) == 0
        values = (axis[place] for axis, place in zip(axes, places, strict=True))
        cases.append(pytest.param(*values, marks=[] if usual else pytest.mark.slow))
    return cases


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    assert _choice.INTERPRETED
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def framed(tensor, turned=False):
    """The same values inside a larger tensor of NaN, last axis contiguous or, `turned`, the first."""
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        frame = torch.full([size + 2 for size in tensor.shape], 127, dtype=tensor.dtype)
    else:
        frame = torch.full([size + 2 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
    if turned:
        frame = frame.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))
    view = frame[tuple(slice(1, -1) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


def leaves(tensors, turned=False):
    return [framed(tensor, turned).requires_grad_() for tensor in tensors]


def assert_gradients(found, exact, tensors, wide, factor=1.0):
    direction = normal(*found.shape)
    ours = torch.autograd.grad(found, tensors, direction.to(found.dtype))
    theirs = torch.autograd.grad(exact, wide, direction.to(found.dtype).double())
    for gradient, expected in zip(ours, theirs, strict=True):
        assert_matches_reference(gradient, expected, factor)


def wide_of(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def dense_operands(sizes, dtype):
    rows, in1, in2, out = sizes
    return [normal(rows, in1), normal(rows, in2), normal(out, in1, in2), normal(out)], dtype


def operands(kind, sizes, dtype, rank=(5, 18, 20)):
    """Inputs, the layer's tensors and bias."""
    rows, in1, in2, out = sizes
    inputs = [normal(rows, in1), normal(rows + 1, in2)[:rows]]
    match kind:
        case "dense":
            rest = [normal(out, in1, in2)]
        case "cp":
            rest = [normal(rank[2], in1), normal(rank[2] + 1, in2)[: rank[2]], normal(out, rank[2])]
        case _:
            rest = [normal(rank[1], in1), normal(rank[2], in2), normal(*rank), normal(out, rank[0])]
    return [tensor.to(dtype) for tensor in [*inputs, *rest, normal(out)]]


def reference(kind, tensors):
    x1, x2, *rest, bias = tensors
    match kind:
        case "dense":
            return ops.reference.bilinear_dense(x1, x2, rest[0], bias)
        case "cp":
            return ops.reference.bilinear_cp(x1, x2, (rest[2], rest[0].mT, rest[1].mT), bias)
        case _:
            in1, in2, core, out = rest
            return ops.reference.bilinear_tucker(x1, x2, core, (out, in1.mT, in2.mT), bias)


CALLS = {"dense": ops.bilinear_dense, "cp": ops.bilinear_cp, "tucker": ops.bilinear_tucker}


@pytest.mark.parametrize(("sizes", "turned"), covering(SIZES, [False, True, False, True]))
@pytest.mark.parametrize("kind", CALLS)
def test_outputs_and_gradients(kind, sizes, turned):
    tensors = leaves(operands(kind, sizes, torch.float32), turned)
    wide = wide_of(tensors)
    found = CALLS[kind](*tensors, backend="triton")
    exact = reference(kind, wide)
    assert_matches_reference(found.detach(), exact.detach())
    assert_gradients(found, exact, tensors, wide)


@pytest.mark.parametrize(("kind", "dtype"), covering([*CALLS], DTYPES[1:]))
def test_half_precision(kind, dtype):
    tensors = leaves([0.3 * tensor for tensor in operands(kind, SIZES[0], dtype)])
    wide = wide_of(tensors)
    found = CALLS[kind](*tensors, backend="triton")
    exact = reference(kind, wide)
    assert_matches_reference(found.detach(), exact.detach())
    assert_gradients(found, exact, tensors, wide)


@pytest.mark.parametrize("width", [40, _triton_cp.MOST_IN + 5])
def test_only_the_gradients_that_are_wanted_are_taken(width):
    # the inputs' alone in the kernel, or wider ones from what it stores; a weight's alone
    for wanted in ([0], [1], [2], [4], [5]):
        tensors = operands("cp", (6, width, 7, 5), torch.float32)
        for index in wanted:
            tensors[index].requires_grad_()
        found = ops.bilinear_cp(*tensors, backend="triton")
        exact = ops.bilinear_cp(*tensors, backend="composed")
        for index in wanted:
            (ours,), (theirs,) = (torch.autograd.grad(y.sum(), tensors[index]) for y in (found, exact))
            assert_matches_reference(ours, theirs.double())


def test_a_split_product_is_the_same():
    # many outputs: the product of the projections, then a plain linear map
    tensors = leaves(operands("cp", (5, 9, 11, 300), torch.float32))
    assert _choice.cp_splits(5, 20, 300)
    wide = wide_of(tensors)
    found, exact = ops.bilinear_cp(*tensors, backend="triton"), reference("cp", wide)
    assert_matches_reference(found.detach(), exact.detach())
    assert_gradients(found, exact, tensors, wide)


def test_one_kernel_and_several_programs_sum_the_same_dense_layer():
    tensors = operands("dense", SIZES[3], torch.float32)
    expected = reference("dense", [tensor.double() for tensor in tensors])
    for programs in (1, 128):  # whole sums over i, and parts of them
        with ops.use_tuning(ops.Tuning(programs=programs)):
            assert_matches_reference(ops.bilinear_dense(*tensors, backend="triton"), expected)


@pytest.mark.parametrize(("layout", "dtype"), covering([1, 2, "blocks"], DTYPES))
def test_int8_dense(layout, dtype):
    x1, x2, weight, bias = operands("dense", SIZES[0] if layout != "blocks" else (3, 7, 140, 5), dtype)
    if layout == "blocks":
        stored = FORMATS["int8"].encode(weight, "weight")
        qdata, scale = stored.qdata, stored.scale
    else:
        qdata, scale = int8_slices(weight, layout)
    inputs = leaves([x1, x2])
    found = ops.bilinear_dense(*inputs, framed(qdata), bias, scale=framed(scale), backend="triton")
    wide = wide_of(inputs)
    exact = ops.reference.bilinear_dense(*wide, decode_int8(qdata, scale, torch.float64), bias.double())
    assert_matches_reference(found.detach(), exact.detach())
    assert_gradients(found, exact, inputs, wide)


def unit_factor(factor):
    """int8 of step 2⁻⁷, and what it stands for."""
    qdata = (factor / factor.abs().max() * 127).round().to(torch.int8)
    return framed(qdata), qdata.double() / 128


@pytest.mark.parametrize(("out", "dtype"), covering([21, 300], DTYPES))  # one kernel; a product and a linear map
def test_int8_cp_and_its_pairs(out, dtype):
    x1, x2, *factors, bias = operands("cp", (5, 18, 7, out), torch.float32)
    values, exact_factors = zip(*map(unit_factor, factors), strict=True)
    sigma = normal(len(factors[0]), dtype=torch.float32)
    inputs = leaves([x1.to(dtype), x2.to(dtype)])
    wide, bias = wide_of(inputs), bias.to(dtype)
    in1, in2, widened = *exact_factors[:2], exact_factors[2] * sigma.double()
    found = ops.bilinear_cp(*inputs, *values, bias, sigma=framed(sigma), backend="triton")
    exact = reference("cp", [*wide, in1, in2, widened, bias.double()])
    assert_matches_reference(found.detach(), exact.detach())
    assert_gradients(found, exact, inputs, wide)
    with torch.no_grad():
        assert_matches_reference(ops.bilinear_cp(*inputs, *values, bias, sigma=sigma), exact.detach())
    pairs = ops.pairwise_cp(*inputs, *values, bias, sigma=sigma, backend="triton")
    every = ops.reference.pairwise_cp(*wide, (widened, in1.mT, in2.mT), bias.double())
    assert_matches_reference(pairs.detach(), every.detach())
    assert_gradients(pairs, every, inputs, wide)


# scales along either axis; its core alone
@pytest.mark.parametrize(("rank", "dtype"), covering([(5, 18, 20), (5, 20, 18), (129, 3, 4)], DTYPES))
def test_int8_tucker_and_its_pairs(rank, dtype):
    x1, x2, *factors, bias = operands("tucker", SIZES[0], torch.float32, rank)
    core = FORMATS["int8"].encode(factors.pop(2), "weight")
    (in1, w1), (in2, w2), (out, u) = map(unit_factor, factors)
    g = core.decode(torch.float64)
    inputs = leaves([x1.to(dtype), x2.to(dtype)])
    wide, bias = wide_of(inputs), bias.to(dtype)
    values = (in1, in2, framed(core.qdata), out)
    found = ops.bilinear_tucker(*inputs, *values, bias, scale=framed(core.scale), backend="triton")
    exact = reference("tucker", [*wide, w1, w2, g, u, bias.double()])
    assert_matches_reference(found.detach(), exact.detach())
    assert_gradients(found, exact, inputs, wide)
    if rank[0] > _choice.MOST_RANK:
        return
    pairs = ops.pairwise_tucker(*inputs, *values, bias, scale=core.scale, backend="triton")
    every = ops.reference.pairwise_tucker(*wide, g, (u, w1.mT, w2.mT), bias.double())
    assert_matches_reference(pairs.detach(), every.detach())
    assert_gradients(pairs, every, inputs, wide)


PAIRS = {"cp": ops.pairwise_cp, "tucker": ops.pairwise_tucker}
# (L1, L2, O, (R_o, R_i, R_j)): a size 1 in each place, odd, and wider than the tiles
LENGTHS = ((1, 1, 1, (1, 1, 1)), (3, 18, 17, (5, 18, 20)), (3, 2, 33, (33, 7, 18)), (2, 17, 3, (66, 3, 9)))
FEW_PAIRS = (2, 3, 5, (2, 3, 4))


def pair_operands(kind, sizes, dtype):
    length1, length2, out, rank = sizes
    _, _, *rest = operands(kind, (1, 7, 9, out), dtype, rank)
    return [normal(2, length1, 7, dtype=dtype), normal(2, length2, 9, dtype=dtype), *rest]


@pytest.mark.parametrize(
    ("sizes", "programs", "turned"),  # sums in one part or more
    [(LENGTHS[0], 128, False), (LENGTHS[1], 4, True), (LENGTHS[2], 1, False), (LENGTHS[3], 8, True)],
)
@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_and_their_gradients(kind, sizes, programs, turned):
    tensors = leaves(pair_operands(kind, sizes, torch.float32), turned)
    wide = wide_of(tensors)
    found, exact = PAIRS[kind](*tensors, backend="triton"), PAIRS[kind](*wide)
    assert_matches_reference(found.detach(), exact.detach())
    direction = framed(normal(*found.shape, dtype=torch.float32), turned)  # as an operator after it may hand it back
    with ops.use_tuning(ops.Tuning(programs=programs)):
        ours = torch.autograd.grad(found, tensors, direction)
    for gradient, expected in zip(ours, torch.autograd.grad(exact, wide, direction.double()), strict=True):
        assert_matches_reference(gradient, expected)


@pytest.mark.parametrize(("kind", "dtype"), covering([*PAIRS], DTYPES[1:]))
def test_pairs_in_half_precision(kind, dtype):
    tensors = leaves([0.3 * tensor for tensor in pair_operands(kind, LENGTHS[1], dtype)])
    wide = wide_of(tensors)
    found, exact = PAIRS[kind](*tensors, backend="triton"), PAIRS[kind](*wide)
    assert_matches_reference(found.detach(), exact.detach())
    assert_gradients(found, exact, tensors, wide)


def test_scales_of_pairs_enter_every_gradient():
    tensors, sigma = leaves(pair_operands("cp", LENGTHS[1], torch.float32)), normal(20, dtype=torch.float32)
    wide = wide_of(tensors)
    found = ops.pairwise_cp(*tensors, sigma=framed(sigma), backend="triton")
    exact = ops.pairwise_cp(*wide[:4], wide[4] * sigma.double(), wide[5])
    assert_gradients(found, exact, tensors, wide)


def test_scales_of_pairs_that_want_a_gradient_are_left_to_torch():
    sigma = normal(20, dtype=torch.float32).requires_grad_()
    with pytest.raises(InputError, match="take scales as constants"):
        ops.pairwise_cp(*pair_operands("cp", LENGTHS[1], torch.float32), sigma=sigma, backend="triton")


def test_the_operator_for_a_dense_weight_takes_no_rows():
    tensors = [normal(*shape, dtype=torch.float32).requires_grad_() for shape in ((0, 4), (0, 5), (3, 4, 5))]
    output = _operators.fused_dense(*tensors, None)
    assert output.shape == (0, 3)
    for gradient, tensor in zip(torch.autograd.grad(output.sum(), tensors), tensors, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("lengths", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("kind", PAIRS)
def test_operators_for_pairs_take_none(kind, lengths):
    # as a compiled graph, which chose for any number of rows, may hand them
    batch, length1, length2 = lengths
    first = normal(batch, length1, *([4] if kind == "cp" else [2, 4]), dtype=torch.float32)
    out = normal(5, 4 if kind == "cp" else 2, dtype=torch.float32)
    tensors = [first, normal(batch, length2, 4, dtype=torch.float32), out, normal(5, dtype=torch.float32)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    pairs = _operators.fused_tucker_pairs if kind == "tucker" else _operators.fused_cp_pairs
    output = pairs(*tensors, *([None] if kind == "cp" else []))
    assert output.shape == (*lengths, 5)
    for gradient, tensor in zip(torch.autograd.grad(output.sum(), tensors), tensors, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("kind", PAIRS)
def test_only_the_gradients_of_pairs_that_are_wanted_are_taken(kind, monkeypatch):
    launched = []
    for module in (_triton_cp_pairs, _triton_tucker_pairs):
        for name in [name for name in vars(module) if name.startswith("launch_")]:
            launch = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *a, _l=launch, _n=name: (launched.append(_n), _l(*a))[1])
    tensors = pair_operands(kind, LENGTHS[0], torch.float32)
    for wanted in (0, 1, len(tensors) - 2, len(tensors) - 1):
        chosen = [t.detach().requires_grad_(index == wanted) for index, t in enumerate(tensors)]
        launched.clear()
        found, exact = (PAIRS[kind](*chosen, backend=backend) for backend in ("triton", "composed"))
        (ours,), (theirs,) = (torch.autograd.grad(y.sum(), chosen[wanted]) for y in (found, exact))
        assert_matches_reference(ours, theirs.double())
        assert len(launched) == (1 if wanted == len(tensors) - 1 else 2)  # the bias's is a plain sum


@pytest.mark.parametrize("kind", PAIRS)
def test_nothing_as_large_as_all_products_is_held_for_the_gradients_of_pairs(kind):
    class Most(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            self.elements = max([self.elements, *sizes])
            return out

    length1, length2, out, rank = 3, 17, 3, (66, 3, 9)
    tensors = [t.requires_grad_() for t in pair_operands(kind, (length1, length2, out, rank), torch.float32)]
    between = 2 * length1 * length2 * (9 if kind == "cp" else 66)
    held = []
    for backend in ("triton", "composed"):
        with Most() as most:
            found = PAIRS[kind](*tensors, backend=backend)
            torch.autograd.grad(found, tensors, torch.ones_like(found))
        held.append(most.elements)
    assert held[0] < between <= held[1]


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_captured_whole(kind):
    tensors = [tensor.requires_grad_() for tensor in pair_operands(kind, FEW_PAIRS, torch.float32)]
    call = lambda *args: PAIRS[kind](*args, backend="triton")  # noqa: E731
    expected = call(*tensors)
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors)
    assert_matches_reference(found.detach(), expected.detach().double())
    direction = normal(*expected.shape, dtype=torch.float32)
    ours, theirs = (torch.autograd.grad(y, tensors, direction) for y in (found, expected))
    for gradient, exact in zip(ours, theirs, strict=True):
        assert_matches_reference(gradient, exact.double())


@pytest.mark.parametrize("kind", PAIRS)
def test_operators_for_pairs_are_registered_soundly(kind):
    p, q, *rest = (t.requires_grad_() for t in pair_operands(kind, FEW_PAIRS, torch.float32))
    length1, length2 = p.shape[1], q.shape[1]
    first = normal(2, length1, *([4] if kind == "cp" else [2, 4]), dtype=torch.float32).requires_grad_()
    second = normal(2, length2, 4, dtype=torch.float32).requires_grad_()
    out, bias = rest[-2:]
    dy = normal(2, length1, length2, out.shape[0], dtype=torch.float32)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    scales = (None,) if kind == "cp" else ()
    forward, backward = {
        "cp": (_operators.fused_cp_pairs, _operators.fused_cp_pairs_backward),
        "tucker": (_operators.fused_tucker_pairs, _operators.fused_tucker_pairs_backward),
    }[kind]
    torch.library.opcheck(forward.registered, (first, second, out, bias, *scales), test_utils=checks)
    for wanted in ((True, True, True), (False, True, False)):
        args = (dy, first.detach(), second.detach(), out.detach(), *scales, *wanted)
        torch.library.opcheck(backward.registered, args, test_utils=checks[:2])


@pytest.mark.parametrize("kind", PAIRS)
def test_second_derivatives_of_pairs_take_the_composed_path(kind):
    tensors = [t.requires_grad_() for t in pair_operands(kind, FEW_PAIRS, torch.float32)]
    second = []
    for backend in ("triton", "composed"):
        output = PAIRS[kind](*tensors, backend=backend)
        (first,) = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), tensors[1:5]))
    for found, expected in zip(*second, strict=True):
        assert_matches_reference(found, expected.double())


@pytest.mark.parametrize("absent", ["in1", "in2", "out", "rank"])
def test_a_tucker_layer_that_does_not_fit_one_kernel_has_its_core_fused(absent, monkeypatch):
    rank = (17, 18, 7) if absent != "rank" else (_choice.MOST_RANK + 1, 3, 4)
    tensors = operands("tucker", SIZES[0], torch.float32, rank)
    names = ["x1", "x2", "in1", "in2", "core", "out", "bias"]
    arguments = [None if name == absent else t for name, t in zip(names, tensors, strict=True)]
    wide = [None if t is None else t.double() for t in arguments]
    found = ops.bilinear_tucker(*arguments, backend="triton")
    assert_matches_reference(found, ops.bilinear_tucker(*wide))


@pytest.mark.parametrize("kind", CALLS)
def test_graphs_are_captured_whole(kind):
    tensors = operands(kind, SIZES[0], torch.float32)
    for tensor in tensors:
        tensor.requires_grad_()
    call = lambda *args: CALLS[kind](*args, backend="triton")  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = call(*tensors)
    found = compiled(*tensors)
    assert_matches_reference(found.detach(), expected.detach().double())
    direction = normal(*expected.shape, dtype=torch.float32)
    ours, theirs = (torch.autograd.grad(y, tensors, direction) for y in (found, expected))
    for gradient, exact in zip(ours, theirs, strict=True):
        assert_matches_reference(gradient, exact.double())


@pytest.mark.parametrize("kind", CALLS)
def test_operators_are_registered_soundly(kind):
    tensors = [tensor.requires_grad_() for tensor in operands(kind, SIZES[0], torch.float32)]
    x1, x2, *rest, bias = tensors
    match kind:
        case "dense":
            args, op = (x1, x2, rest[0], None), _operators.fused_dense
        case "cp":
            args, op = (x1, x2, *rest, bias, None), _operators.fused_cp
        case _:
            args, op = (x1, x2, *rest, bias, None), _operators.fused_tucker
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.registered, args, test_utils=checks)


@pytest.mark.parametrize("kind", CALLS)
def test_autocast_casts_for_the_kernels_too(kind):
    tensors = leaves([0.3 * tensor for tensor in operands(kind, SIZES[0], torch.float32)])
    wide = wide_of([tensor.bfloat16() for tensor in tensors])
    with torch.autocast("cpu", torch.bfloat16):
        found = CALLS[kind](*tensors, backend="triton")
    assert found.dtype == torch.bfloat16
    exact = reference(kind, wide)
    assert_matches_reference(found.detach(), exact.detach())
    direction = normal(*found.shape)
    ours = torch.autograd.grad(found, tensors, direction.to(found.dtype))
    theirs = torch.autograd.grad(exact, wide, direction.to(found.dtype).double())
    for gradient, expected in zip(ours, theirs, strict=True):  # in float32, of products in bfloat16
        assert gradient.dtype == torch.float32
        assert_matches_reference(gradient.bfloat16(), expected)


@pytest.mark.parametrize("kind", CALLS)
def test_exported_graphs_have_the_operator_for_any_number_of_rows(kind):
    x1, x2, *rest = operands(kind, SIZES[0], torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return CALLS[kind](*tensors, backend="triton")

    rows = torch.export.Dim("rows")
    dynamic = {"tensors": ({0: rows}, {0: rows}, *({} for _ in rest))}
    program = torch.export.export(Layer(), (x1, x2, *rest), dynamic_shapes=dynamic)
    assert f"compress_bilinear.{kind}.default" in {str(node.target) for node in program.graph.nodes}
    more = [torch.cat([x, x[:2]]) for x in (x1, x2)]
    expected = reference(kind, [tensor.double() for tensor in (*more, *rest)])
    assert_matches_reference(program.module()(*more, *rest), expected)


@pytest.mark.parametrize("kind", CALLS)
def test_a_dispatch_mode_sees_the_operator_and_nothing_else_changes(kind):
    class Seen(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names += (str(func),)
            return func(*args, **(kwargs or {}))

    tensors = operands(kind, SIZES[0], torch.float32)
    with Seen() as seen:
        found = CALLS[kind](*tensors, backend="triton")
    assert f"compress_bilinear.{kind}.default" in seen.names
    assert torch.equal(found, CALLS[kind](*tensors, backend="triton"))


@pytest.mark.parametrize("kind", CALLS)
def test_second_derivatives_take_the_composed_path(kind):
    tensors = [tensor.requires_grad_() for tensor in operands(kind, (3, 4, 5, 2), torch.float32, (2, 3, 4))]
    second = []
    for backend in ("triton", "composed"):
        output = CALLS[kind](*tensors, backend=backend)
        (first,) = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), tensors[2])[0])
    assert_matches_reference(second[0], second[1].double())


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("kind", ["cp", "tucker"])
def test_second_derivatives_by_what_both_factors_are_computed_from(kind, derived):
    x1, x2, in1, _, *rest = operands(kind, (3, 4, 4, 2), torch.float32, (3, 3, 3))
    in1.requires_grad_()
    second = []
    for backend in ("triton", "composed"):
        factor = in1.tanh() if derived else in1
        output = CALLS[kind](x1, x2, factor, factor.sigmoid() if derived else factor, *rest, backend=backend)
        (first,) = torch.autograd.grad(output.square().sum(), in1, create_graph=True)
        second.append((first.detach(), torch.autograd.grad(first.square().sum(), in1)[0]))
    for found, expected in zip(*second, strict=True):
        assert_matches_reference(found, expected.double())


def test_what_the_kernels_cannot_do_is_an_error_with_the_reason():
    tensors = operands("cp", SIZES[0], torch.float64)
    with pytest.raises(ValueError, match="float64"):
        ops.bilinear_cp(*tensors, backend="triton")
    single = [tensor.float() for tensor in tensors]
    with pytest.raises(ValueError, match="no rows"):
        ops.bilinear_cp(single[0][:0], single[1][:0], *single[2:], backend="triton")
    with pytest.raises(ValueError, match="several dtypes"):
        ops.bilinear_cp(single[0].half(), single[1].half(), *single[2:5], single[5].bfloat16(), backend="triton")
    with pytest.raises(ValueError, match="no rows"):
        ops.pairwise_cp(single[0][:0], *[tensor.requires_grad_() for tensor in single[1:]], backend="triton")
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.vmap(lambda x1: ops.bilinear_cp(x1, *single[1:], backend="triton"))(single[0].unsqueeze(0))
