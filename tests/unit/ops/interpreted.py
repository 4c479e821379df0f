"""Every Triton kernel under Triton's interpreter, against float64 references; `test_triton.py` runs this file.

It is not collected by itself: TRITON_INTERPRET has to be set before Triton is imported, and holds for the process.
Fresh memory is filled with NaN, which shows what a kernel leaves unwritten. Operands are views of larger tensors of
NaN, which shows what it reads outside of them.
"""

import itertools

import pytest
import torch
from support import assert_matches_reference
from torch.utils._python_dispatch import TorchDispatchMode

from compress_bilinear import ops
from compress_bilinear.errors import InputError
from compress_bilinear.ops import _choice
from compress_bilinear.ops.triton import _operators
from compress_bilinear.quantization import FORMATS, QuantizedTensor

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


def operands(kind, sizes, dtype, rank=20):
    """Inputs, the layer's tensors and bias."""
    rows, in1, in2, out = sizes
    inputs = [normal(rows, in1), normal(rows + 1, in2)[:rows]]
    rest = [normal(out, in1, in2)]
    if kind == "cp":
        rest = [normal(rank, in1), normal(rank + 1, in2)[:rank], normal(out, rank)]
    return [tensor.to(dtype) for tensor in [*inputs, *rest, normal(out)]]


def reference(kind, tensors):
    x1, x2, *rest, bias = tensors
    if kind == "dense":
        return ops.reference.bilinear_dense(x1, x2, rest[0], bias)
    return ops.reference.bilinear_cp(x1, x2, (rest[2], rest[0].mT, rest[1].mT), bias)


CALLS = {"dense": ops.bilinear_dense, "cp": ops.bilinear_cp}
OPERATORS = {"dense": "compress_bilinear.dense.default", "cp": "compress_bilinear.cp_product.default"}


@pytest.mark.parametrize(("sizes", "turned"), covering(SIZES, [False, True, False, True]))
@pytest.mark.parametrize("kind", CALLS)
def test_outputs_and_gradients(kind, sizes, turned):
    tensors = leaves(operands(kind, sizes, torch.float32), turned)
    wide = wide_of(tensors)
    found = CALLS[kind](*tensors, backend="triton")
    exact = reference(kind, wide)
    assert_matches_reference(found.detach(), exact.detach())
    assert_gradients(found, exact, tensors, wide)


@pytest.mark.parametrize(("kind", "dtype"), [("cp", torch.float16), ("cp", torch.bfloat16), ("dense", torch.bfloat16)])
def test_half_precision(kind, dtype):
    tensors = leaves([0.3 * tensor for tensor in operands(kind, SIZES[0], dtype)])
    wide = wide_of(tensors)
    found = CALLS[kind](*tensors, backend="triton")
    exact = reference(kind, wide)
    assert_matches_reference(found.detach(), exact.detach())
    assert_gradients(found, exact, tensors, wide)


def test_a_dense_layer_in_float16_takes_the_composed_path():
    # whose products of inputs do not overflow
    x1, x2 = (torch.full((5, width), 300, dtype=torch.float16) for width in (18, 7))
    weight = normal(17, 18, 7, dtype=torch.float16, scale=1e-4)
    exact = ops.reference.bilinear_dense(x1.double(), x2.double(), weight.double())
    assert_matches_reference(ops.bilinear_dense(x1, x2, weight), exact)
    with pytest.raises(InputError, match="overflow in float16"):
        ops.bilinear_dense(x1, x2, weight, backend="triton")
    wide = [tensor.bfloat16() for tensor in (x1, x2, weight)]
    exact = ops.reference.bilinear_dense(*(tensor.double() for tensor in wide))
    assert_matches_reference(ops.bilinear_dense(*wide, backend="triton"), exact)


@pytest.mark.parametrize("sigma", [None, normal(20, dtype=torch.float32)])
def test_only_the_gradients_that_are_wanted_are_taken(sigma):
    for wanted in ([0], [1], [2], [3], [4], [5], [0, 3]):
        tensors = operands("cp", (6, 40, 7, 5), torch.float32)
        for index in wanted:
            tensors[index].requires_grad_()
        found = ops.bilinear_cp(*tensors, sigma=sigma, backend="triton")
        exact = ops.bilinear_cp(*tensors, sigma=sigma, backend="composed")
        chosen = [tensors[index] for index in wanted]
        for ours, theirs in zip(*(torch.autograd.grad(y.sum(), chosen) for y in (found, exact)), strict=True):
            assert_matches_reference(ours, theirs.double())


def test_one_kernel_and_several_programs_sum_the_same_dense_layer():
    tensors = operands("dense", SIZES[3], torch.float32)
    expected = reference("dense", [tensor.double() for tensor in tensors])
    for programs in (1, 128):  # whole sums over i, and parts of them
        with ops.use_tuning(ops.Tuning(programs=programs)):
            assert_matches_reference(ops.bilinear_dense(*tensors, backend="triton"), expected)


def test_an_int8_weight_is_left_to_torch():
    x1, x2, weight, _ = operands("dense", SIZES[0], torch.float32)
    stored = FORMATS["int8"].encode(weight, "weight")
    with pytest.raises(InputError, match="read int8 without scales"):
        ops.bilinear_dense(x1, x2, stored, backend="triton")
    with pytest.raises(InputError, match="reads weights in floating point"):
        ops.bilinear_dense(x1, x2, FORMATS["int8"].zeros(weight.shape, "factor"), backend="triton")


def unit_factor(factor):
    """int8 of step 2⁻⁷, and what it stands for."""
    qdata = (factor / factor.abs().max() * 127).round().to(torch.int8)
    return QuantizedTensor(FORMATS["int8"], "factor", qdata.shape, framed(qdata)), qdata.double() / 128


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_cp(dtype):
    x1, x2, *factors, bias = operands("cp", (5, 18, 7, 21), torch.float32)
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


@pytest.mark.parametrize("place", [2, 3])
def test_one_factor_of_a_cp_in_int8(place):
    tensors = operands("cp", SIZES[0], torch.float32)
    wide = wide_of(tensors)
    tensors[place], wide[place] = unit_factor(tensors[place])
    floating = [index for index in range(6) if index != place]
    for index in floating:
        tensors[index].requires_grad_()
    found, exact = ops.bilinear_cp(*tensors, backend="triton"), reference("cp", wide)
    assert_matches_reference(found.detach(), exact.detach())
    assert_gradients(found, exact, [tensors[index] for index in floating], [wide[index] for index in floating])


def test_the_last_factor_of_a_cp_may_have_any_format():
    x1, x2, in1, in2, out, bias = operands("cp", (5, 18, 7, 21), torch.float32)
    stored = FORMATS["nf4"].encode(out, "factor")
    found = ops.bilinear_cp(x1, x2, in1, in2, stored, bias, backend="triton")
    wide = [tensor.double() for tensor in (x1, x2, in1, in2, stored.decode(torch.float32), bias)]
    assert_matches_reference(found, reference("cp", wide))
    with pytest.raises(InputError, match="read int8 without scales"):
        ops.bilinear_cp(x1, x2, FORMATS["nf4"].encode(in1, "factor"), in2, out, bias, backend="triton")


def test_scales_that_want_a_gradient_are_left_to_torch():
    sigma = normal(20, dtype=torch.float32).requires_grad_()
    with pytest.raises(InputError, match="take scales as constants"):
        ops.bilinear_cp(*operands("cp", SIZES[0], torch.float32), sigma=sigma, backend="triton")


@pytest.mark.parametrize(("kind", "shapes"), [("dense", [(3, 4, 5)]), ("cp", [(3, 4), (3, 5)])])
def test_the_operators_take_no_rows(kind, shapes):
    # as a compiled graph, recorded for any number of rows, may hand them
    tensors = [normal(*shape, dtype=torch.float32).requires_grad_() for shape in [(0, 4), (0, 5), *shapes]]
    output = _operators.fused_dense(*tensors) if kind == "dense" else _operators.fused_product(*tensors, None)
    assert output.shape == (0, 3)
    for gradient, tensor in zip(torch.autograd.grad(output.sum(), tensors), tensors, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


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
    op = {"dense": torch.ops.compress_bilinear.dense, "cp": torch.ops.compress_bilinear.cp_product}[kind]
    args = tensors[:3] if kind == "dense" else (*tensors[:4], None)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(op.default, args, test_utils=checks)


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
    assert OPERATORS[kind] in {str(node.target) for node in program.graph.nodes}
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
    assert OPERATORS[kind] in seen.names
    assert torch.equal(found, CALLS[kind](*tensors, backend="triton"))


@pytest.mark.parametrize("kind", CALLS)
def test_second_derivatives(kind):
    tensors = [tensor.requires_grad_() for tensor in operands(kind, (3, 4, 5, 2), torch.float32, 4)]
    second = []
    for backend in ("triton", "composed"):
        output = CALLS[kind](*tensors, backend=backend)
        first = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
        second.append(torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors[:-1]))
    for found, expected in zip(*second, strict=True):
        assert_matches_reference(found, expected.double())


@pytest.mark.parametrize("derived", [False, True])
def test_second_derivatives_by_what_both_factors_are_computed_from(derived):
    x1, x2, in1, _, *rest = operands("cp", (3, 4, 4, 2), torch.float32, 3)
    in1.requires_grad_()
    second = []
    for backend in ("triton", "composed"):
        factor = in1.tanh() if derived else in1
        output = ops.bilinear_cp(x1, x2, factor, factor.sigmoid() if derived else factor, *rest, backend=backend)
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
    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.vmap(lambda x1: ops.bilinear_cp(x1, *single[1:], backend="triton"))(single[0].unsqueeze(0))
