from dataclasses import replace

import pytest
import torch
from support import DTYPES, SHAPES, Memory, assert_matches_reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from compress_bilinear import ops
from compress_bilinear.errors import InputError
from compress_bilinear.quantization import FORMATS

ROWS = 11


def normal(*shape, dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


def operands(shape, leading=(ROWS,), leading2=None, **options):
    """Inputs, weight (O, I, J) and bias for a layer of `shape` (I, J, O)."""
    in1, in2, out = shape
    leading2 = leading if leading2 is None else leading2
    return [
        normal(*leading, in1, **options),
        normal(*leading2, in2, **options),
        normal(out, in1, in2, **options),
        normal(out, **options),
    ]


@pytest.fixture
def small_blocks():
    """Many blocks of rows and of outputs, even for small operands."""
    with ops.use_tuning(ops.Tuning(block=12, block_grad=12, pairs=12, outer=12, weight=12)):
        yield


@pytest.fixture(params=["whole", "blocks"])
def blocks(request):
    """Both with the real sizes of blocks, which hold a small problem whole, and with small ones."""
    if request.param == "blocks":
        request.getfixturevalue("small_blocks")


def assert_same_with_gradients(function, reference, tensors):
    output, expected = function(*tensors), reference(*tensors)
    assert_matches_reference(output.detach(), expected.detach())
    assert output.is_contiguous()
    direction = normal(*output.shape)
    found = torch.autograd.grad(output, tensors, direction)
    for gradient, exact in zip(found, torch.autograd.grad(expected, tensors, direction), strict=True):
        assert_matches_reference(gradient, exact)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("order", ops.ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_order_has_the_references_outputs_and_gradients(shape, order):
    assert_same_with_gradients(
        lambda *tensors: ops.bilinear_dense(*tensors, order=order),
        ops.reference.bilinear_dense,
        operands(shape, requires_grad=True),
    )


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("lengths", [(3, 8), (8, 3), (1, 1), (1, 30), (30, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_have_the_references_outputs_and_gradients(shape, lengths):
    tensors = operands(shape, (2, lengths[0]), (2, lengths[1]), requires_grad=True)
    assert_same_with_gradients(ops.pairwise_dense, ops.reference.pairwise_dense, tensors)


@pytest.mark.parametrize("lengths", [(3, 8), (8, 3), (1, 30), (30, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_are_projected_on_the_cheaper_side_first(shape, lengths):
    (in1, in2, out), (length1, length2) = shape, lengths
    with FlopCounterMode(display=False) as counter:
        ops.pairwise_dense(*operands(shape, (length1,), (length2,)))
    sides = length1 * in2 * (in1 + length2), length2 * in1 * (in2 + length1)
    assert counter.get_total_flops() == 2 * out * min(sides)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [*ops.ORDERS, None])
def test_outputs_without_gradients_in_every_dtype(order, dtype):
    tensors = operands((37, 63, 17), dtype=dtype)
    wide = [tensor.double() for tensor in tensors]
    assert_matches_reference(ops.bilinear_dense(*tensors, order=order), ops.reference.bilinear_dense(*wide))
    tensors[1] = tensors[1][:4]
    assert_matches_reference(
        ops.pairwise_dense(*tensors), ops.reference.pairwise_dense(*(tensor.double() for tensor in tensors))
    )


def assert_differentiable_twice(function, tensors):
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", ops.ORDERS)
def test_first_and_second_derivatives_in_blocks(order):
    tensors = operands((3, 2, 2), (5,), requires_grad=True)
    assert_differentiable_twice(lambda *args: ops.bilinear_dense(*args, order=order), tensors)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("lengths", [(4, 2), (2, 4)])
def test_first_and_second_derivatives_of_pairs_in_blocks(lengths):
    tensors = operands((2, 3, 4), (2, lengths[0]), (2, lengths[1]), requires_grad=True)
    assert_differentiable_twice(ops.pairwise_dense, tensors)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("order", ops.ORDERS)
def test_only_the_gradients_that_are_wanted_are_taken(order):
    for wanted in range(4):
        tensors = operands((5, 4, 3))
        tensors[wanted].requires_grad_()
        found = torch.autograd.grad(ops.bilinear_dense(*tensors, order=order).sum(), tensors[wanted])
        exact = torch.autograd.grad(ops.reference.bilinear_dense(*tensors).sum(), tensors[wanted])
        assert_matches_reference(found[0], exact[0])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_int8_weight_is_the_weight_it_stands_for(shape, dtype):
    input1, input2, weight, bias = operands(shape, dtype=dtype)
    stored = FORMATS["int8"].encode(weight, "weight")
    exact = stored.decode(torch.float64)
    wide = (input1.double(), input2.double(), exact, bias.double())
    expected = ops.reference.bilinear_dense(*wide)
    for order in ops.ORDERS:
        assert_matches_reference(ops.bilinear_dense(input1, input2, stored, bias, order=order), expected)
    found = ops.pairwise_dense(input1[:3], input2, stored, bias)
    assert_matches_reference(found, ops.reference.pairwise_dense(wide[0][:3], *wide[1:]))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("order", ops.ORDERS)
def test_gradients_pass_through_an_int8_weight(order):
    input1, input2, weight, bias = operands((9, 7, 5), requires_grad=True)
    stored = FORMATS["int8"].encode(weight, "weight")
    exact = stored.decode(torch.float64)
    assert_same_with_gradients(
        lambda *args: ops.bilinear_dense(args[0], args[1], stored, args[2], order=order),
        lambda *args: ops.reference.bilinear_dense(args[0], args[1], exact, args[2]),
        [input1, input2, bias],
    )
    assert_same_with_gradients(
        lambda *args: ops.pairwise_dense(args[0], args[1], stored, args[2]),
        lambda *args: ops.reference.pairwise_dense(args[0], args[1], exact, args[2]),
        [input1, input2, bias],
    )


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (1,), (3, 2)])
@pytest.mark.parametrize("order", ops.ORDERS)
def test_any_leading_dimensions(order, leading):
    assert_same_with_gradients(
        lambda *tensors: ops.bilinear_dense(*tensors, order=order),
        ops.reference.bilinear_dense,
        operands((5, 4, 3), leading, requires_grad=True),
    )


def test_rows_of_other_leading_dimensions_are_an_input_error():
    with pytest.raises(InputError, match="same leading dimensions"):
        ops.bilinear_dense(torch.ones(2, 3, 3), torch.ones(3, 2, 2), torch.ones(4, 3, 2))


def test_another_order_is_an_input_error():
    with pytest.raises(InputError, match="`order`"):
        ops.bilinear_dense(torch.ones(3), torch.ones(2), torch.ones(4, 3, 2), order="zz")


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("leading1", "leading2"), [((0, 3), (0, 2)), ((0,), (2,)), ((3,), (0,)), ((3,), (2,))])
def test_pairs_of_any_leading_dimensions(leading1, leading2):
    tensors = operands((5, 4, 3), leading1, leading2, requires_grad=True)
    assert_same_with_gradients(ops.pairwise_dense, ops.reference.pairwise_dense, tensors)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("order", ops.ORDERS)
def test_strided_operands(order):
    input1, input2, weight, bias = operands((6, 5, 4))
    strided = (
        input1.T.contiguous().T,
        input2[:1].expand(ROWS, -1),
        weight.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        bias.repeat_interleave(2)[::2],
    )
    assert_matches_reference(ops.bilinear_dense(*strided, order=order), ops.reference.bilinear_dense(*strided))
    assert_matches_reference(ops.pairwise_dense(*strided), ops.reference.pairwise_dense(*strided))


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((17, 63, 37), "in1_first"),
        ((17, 37, 63), "in2_first"),
        ((17, 40, 40), "in2_first"),
        ((80, 5, 7), "outer"),
        ((2000, 200, 300), "in2_first"),  # the products of the inputs would be too wide
    ],
)
def test_the_largest_dimension_is_eliminated_first(shape, order):
    assert ops.best_order(shape) == order


def test_products_of_inputs_are_not_formed_in_float16():
    assert ops.best_order((80, 5, 7), dtype=torch.bfloat16) == "outer"
    assert ops.best_order((80, 5, 7), dtype=torch.float16) == "in2_first"
    assert ops.best_order((80, 7, 5), dtype=torch.float16) == "in1_first"


@pytest.mark.parametrize("shape", [(17, 37, 63), (80, 5, 7), (1, 9, 3)])
def test_flops_are_those_of_the_weight_and_of_the_cheapest_second_product(shape):
    out, in1, in2 = shape
    assert ops.dense_flops(shape) == 2 * out * in1 * in2 + 2 * (out * in1 * in2) // max(shape)


def test_the_memory_of_the_reference_is_seen():
    # the recorder itself: einsum holds T whole
    tensors = operands((64, 64, 32), (512,), dtype=torch.float32, requires_grad=True)
    with Memory() as memory:
        ops.reference.bilinear_dense(*tensors).sum().backward()
    assert memory.largest >= 512 * 32 * 64


@pytest.mark.parametrize("order", ops.ORDERS)
def test_peak_memory_without_gradients_is_a_few_blocks(order):
    count, (in1, in2, out) = 4096, (64, 64, 32)
    tensors = operands((in1, in2, out), (count,), dtype=torch.float32)
    with Memory() as memory, torch.no_grad():
        ops.bilinear_dense(*tensors, order=order)
    block = ops.Tuning().outer if order == "outer" else ops.Tuning().block
    assert memory.largest <= max(block, count * out)
    assert memory.peak <= 3 * block + 4 * count * out
    assert memory.peak < count * in1 * (in2 if order == "outer" else out) / 4


@pytest.mark.parametrize("order", ops.ORDERS)
def test_peak_memory_of_training_is_a_few_blocks(order):
    count, (in1, in2, out) = 4096, (64, 64, 32)
    tensors = operands((in1, in2, out), (count,), dtype=torch.float32, requires_grad=True)
    with Memory() as memory, ops.use_tuning(ops.Tuning(block_grad=2**18, outer=2**18)):
        ops.bilinear_dense(*tensors, order=order).sum().backward()
    assert memory.largest < count * in1 * out / 8
    assert memory.peak < count * in1 * out / 2


def test_peak_memory_of_pairs_is_their_output_and_a_few_blocks():
    (length1, length2), (in1, in2, out) = (50, 4), (64, 64, 512)
    tensors = operands((in1, in2, out), (16, length1), (16, length2), dtype=torch.float32)
    with Memory() as memory, torch.no_grad():
        ops.pairwise_dense(*tensors)
    pairs = 16 * length1 * length2 * out
    assert memory.largest <= max(pairs, ops.Tuning().pairs)
    assert memory.peak <= pairs + 3 * ops.Tuning().pairs
    assert memory.peak < 16 * length1 * in2 * out / 2  # T whole


@pytest.mark.parametrize("order", ops.ORDERS)
def test_an_int8_weight_is_never_decoded_whole(order):
    input1, input2, weight, bias = operands((64, 64, 128), (3,), dtype=torch.float32)
    stored = FORMATS["int8"].encode(weight, "weight")
    for call in (
        lambda: ops.bilinear_dense(input1, input2, stored, bias, order=order),
        lambda: ops.pairwise_dense(input1, input2, stored, bias),
    ):
        with Memory() as memory, torch.no_grad(), ops.use_tuning(ops.Tuning(weight=2**13)):
            call()
        assert memory.largest <= stored.shape.numel() / 16
        assert memory.peak < stored.shape.numel() / 2


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def intel():
    """As where MKL has its fastest kernels, whatever the processor."""
    with ops.use_tuning(replace(ops.tuning(), onednn=False)):
        yield


@pytest.mark.usefixtures("blocks", "intel")
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(63, 37, 17), (9, 1, 3), (6, 6, 1)])
def test_the_weight_is_read_in_its_stored_layout(shape, dtype, rows):
    input1, input2, weight, bias = operands(shape, (1, rows), dtype=dtype)  # leading dimensions: not the small path
    stored = FORMATS["int8"].encode(weight, "weight")
    wide = [tensor.double() for tensor in (input1, input2, weight, bias)]
    with Operators() as operators:
        output = ops.bilinear_dense(input1, input2, weight, bias)
    assert "bmm" in operators.names
    assert not operators.names & {"mm", "addmm"}
    assert output.is_contiguous()
    assert_matches_reference(output, ops.reference.bilinear_dense(*wide))
    wide[2] = stored.decode(torch.float64)
    assert_matches_reference(ops.bilinear_dense(input1, input2, stored, bias), ops.reference.bilinear_dense(*wide))


def test_the_stored_layout_is_read_without_a_copy_of_the_weight():
    tensors = operands((64, 64, 96), (1, 32), dtype=torch.float32)
    tensors[2].requires_grad_()
    with Memory() as memory, torch.no_grad(), ops.use_tuning(ops.Tuning(onednn=False, block=2**13)):
        ops.bilinear_dense(*tensors)
    assert memory.peak <= 2**13 + 3 * 32 * 96


@pytest.mark.usefixtures("intel")
@pytest.mark.parametrize("wanted", range(4))
def test_a_gradient_does_without_the_stored_layout(wanted):
    tensors = operands((9, 7, 3))
    tensors[wanted].requires_grad_()
    found = torch.autograd.grad(ops.bilinear_dense(*tensors).sum(), tensors[wanted])
    exact = torch.autograd.grad(ops.reference.bilinear_dense(*tensors).sum(), tensors[wanted])
    assert_matches_reference(found[0], exact[0])


# every value with every other, by turns
SMALL_CALLS = [
    (out, leading, DTYPES[(index + turn) % 4], onednn)
    for index, leading in enumerate([(), (1,), (5,), (1, 1), (2, 3)])
    for turn, out in enumerate([1, 2, 3, 6])
    for onednn in (False, True)
]


@pytest.mark.parametrize(("out", "leading", "dtype", "onednn"), SMALL_CALLS)
def test_small_calls(out, leading, dtype, onednn):
    tensors = operands((9, 7, out), leading, dtype=dtype)
    wide = [tensor.double() for tensor in tensors]
    with ops.use_tuning(ops.Tuning(onednn=onednn)):
        with torch.no_grad():
            assert_matches_reference(ops.bilinear_dense(*tensors), ops.reference.bilinear_dense(*wide))
        assert_matches_reference(ops.bilinear_dense(*tensors[:3]), ops.reference.bilinear_dense(*wide[:3]))


@pytest.mark.usefixtures("intel")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9, 7, 6), (7, 9, 6), (1, 5, 1), (5, 1, 300)])
def test_a_small_call_reads_weights_of_any_strides(shape, bias):
    input1, input2, weight, added = operands(shape, (40,), dtype=torch.float32)
    tensors = [input1.T.contiguous().T, input2, weight.mT.contiguous().mT, added if bias else None]
    with torch.no_grad(), Operators() as operators:
        found = ops.bilinear_dense(*tensors)
    assert "bmm" in operators.names
    assert found.is_contiguous()
    wide = [tensor if tensor is None else tensor.double() for tensor in tensors]
    assert_matches_reference(found, ops.reference.bilinear_dense(*wide))


@pytest.mark.parametrize("wide", [0, 1])
@pytest.mark.parametrize("shape", [(9, 7, 3), (7, 9, 3), (9, 7, 6)])
def test_a_small_call_rounds_no_input_to_the_weights_dtype(shape, wide):
    tensors = operands(shape, dtype=torch.float32)
    tensors[wide] = tensors[wide].double()
    with torch.no_grad(), pytest.raises(InputError, match="should have the same dtype"):
        ops.bilinear_dense(*tensors)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("out", [3, 6])
def test_a_single_row_copies_no_weight(out, contiguous):
    tensors = operands((90, 70, out), (1,))
    if not contiguous:
        tensors[2] = tensors[2].transpose(0, 1).contiguous().transpose(0, 1)
    with Memory() as memory:
        found = ops.bilinear_dense(*tensors)
    assert memory.largest < tensors[2].numel() / 2 or not contiguous
    assert_matches_reference(found, ops.reference.bilinear_dense(*tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("out", [1, 6, 80])
def test_products_of_inputs_that_overflow_in_16_bits(out, rows, dtype):
    input1, input2 = torch.full((rows, 5), 300, dtype=dtype), torch.full((rows, 4), 400, dtype=dtype)
    weight = torch.full((out, 5, 4), 2.0**-10, dtype=dtype)
    exact = ops.reference.bilinear_dense(input1.double(), input2.double(), weight.double())
    assert_matches_reference(ops.bilinear_dense(input1, input2, weight), exact)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("out", [1, 3, 6])
def test_the_output_has_the_inputs_dtype_whatever_the_bias_has(out, rows, grad):
    tensors = operands((9, 7, out), (rows,), dtype=torch.bfloat16)
    tensors[3] = tensors[3].float()
    wide = [tensor.double() for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        found, pairs = ops.bilinear_dense(*tensors), ops.pairwise_dense(tensors[0][:4], *tensors[1:])
    assert found.dtype == pairs.dtype == torch.bfloat16
    assert_matches_reference(found.detach(), ops.reference.bilinear_dense(*wide))
    assert_matches_reference(pairs.detach(), ops.reference.pairwise_dense(wide[0][:4], *wide[1:]))
