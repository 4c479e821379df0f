"""What CPBilinear, TuckerBilinear and DenseBilinear have in common, with and without int8."""

import copy
import itertools
import os
import shutil
import warnings

import pytest
import torch
from support import DTYPES, SHAPES, assert_matches_reference, assert_same_state, bilinear, low_rank, state_of
from torch import nn
from torch.nn.utils import prune

from compress_bilinear import CPBilinear, DenseBilinear, TuckerBilinear, ops
from compress_bilinear.decomposition import CPDecomposition, TuckerDecomposition, cp, tucker
from compress_bilinear.errors import CompressionError, ConfigError, InputError
from compress_bilinear.ops import reference

KINDS = tuple(itertools.product((CPBilinear, TuckerBilinear, DenseBilinear), (None, "int8", "nf4")))
EXACT = tuple(kind for kind in KINDS if kind[1] is None)
PROJECTED = tuple(kind for kind in KINDS if kind[0] is not DenseBilinear)


def name_of(kind):
    return f"{kind[0].method}-{kind[1]}"


def for_kinds(kinds=KINDS):
    return pytest.mark.parametrize("kind", kinds, ids=name_of)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tucker_rank(shape):
    in1, in2, out = shape
    return min(out, 4), min(in1, 6), min(in2, 5)


def make(kind, shape=(7, 6, 5), *, bias=True, dtype=torch.float64):
    """A layer of `shape` (I, J, O) with random contents."""
    module_class, quantize = kind
    in1, in2, out = shape
    added = normal(out, dtype=dtype, seed=9) if bias else None
    if module_class is DenseBilinear:
        return DenseBilinear.from_weight(normal(out, in1, in2, dtype=dtype), added, quantize=quantize)
    if module_class is CPBilinear:
        factors = tuple(normal(size, 8, dtype=dtype, seed=size) for size in (out, in1, in2))
        decomposition = CPDecomposition(normal(8, dtype=dtype), factors)
    else:
        ranks = tucker_rank(shape)
        factors = tuple(normal(size, r, dtype=dtype) for size, r in zip((out, in1, in2), ranks, strict=True))
        decomposition = TuckerDecomposition(normal(*ranks, dtype=dtype), factors)
    return module_class.from_decomposition(decomposition, added, quantize=quantize)


def blank(kind, shape=(7, 6, 5), **options):
    """A layer by its constructor."""
    module_class, quantize = kind
    rank = {DenseBilinear: (), CPBilinear: (8,), TuckerBilinear: (tucker_rank(shape),)}[module_class]
    return module_class(*shape, *rank, quantize=quantize, **options)


def inputs(layer, *leading, dtype=torch.float64, requires_grad=False):
    sizes = (layer.in1_features, layer.in2_features)
    return tuple(
        normal(*leading, size, dtype=dtype, seed=seed).requires_grad_(requires_grad)
        for seed, size in enumerate(sizes, 1)
    )


def expected(layer, input1, input2, define=reference.bilinear_dense):
    """By definition, from the weight that the layer stands for, in float64."""
    bias = None if layer.bias is None else layer.bias.detach().double()
    return define(input1.double(), input2.double(), layer.to_dense(torch.float64).detach(), bias)


@for_kinds()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_forward_is_that_of_the_dense_weight(shape, dtype, kind):
    layer = make(kind, shape, dtype=dtype)
    for leading in ((), (0,), (5,), (2, 3)):
        values = inputs(layer, *leading, dtype=dtype)
        output = layer(*values)
        assert output.dtype == dtype
        assert output.is_contiguous()
        assert_matches_reference(output.detach(), expected(layer, *values))


@for_kinds()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_are_the_forward_of_expanded_pairs(shape, dtype, kind):
    layer = make(kind, shape, dtype=dtype)
    for leading, length1, length2 in (((), 4, 3), ((2,), 1, 5), ((2, 3), 2, 1), ((), 0, 3), ((), 3, 0), ((0,), 2, 3)):
        input1, _ = inputs(layer, *leading, length1, dtype=dtype)
        _, input2 = inputs(layer, *leading, length2, dtype=dtype)
        pairs = layer.pairwise(input1, input2)
        assert pairs.dtype == dtype
        assert pairs.is_contiguous()
        sizes = (*leading, length1, length2, -1)
        expanded = expected(layer, input1.unsqueeze(-2).expand(sizes), input2.unsqueeze(-3).expand(sizes))
        assert_matches_reference(pairs.detach(), expanded)


@for_kinds()
def test_without_a_bias(kind):
    layer = make(kind, bias=False)
    assert layer.bias is None
    assert not any("bias" in name for name in layer.state_dict())
    values = inputs(layer, 4)
    assert_matches_reference(layer(*values).detach(), expected(layer, *values))
    assert_matches_reference(layer.pairwise(*values).detach(), expected(layer, *values, reference.pairwise_dense))


@for_kinds()
def test_strided_inputs(kind):
    layer = make(kind)
    input1, input2 = inputs(layer, 4, 3)
    strided = input1.transpose(0, 1).contiguous().transpose(0, 1), input2[:, :1].expand(-1, 3, -1)
    assert_matches_reference(layer(*strided).detach(), expected(layer, *strided))
    assert_matches_reference(layer.pairwise(*strided).detach(), expected(layer, *strided, reference.pairwise_dense))


BAD_INPUTS = {
    "input1 is wider": (torch.ones(2, 8), torch.ones(2, 6)),
    "input2 is narrower": (torch.ones(2, 7), torch.ones(2, 5)),
    "swapped": (torch.ones(2, 6), torch.ones(2, 7)),
    "a scalar": (torch.tensor(1.0), torch.ones(6)),
    "rows differ": (torch.ones(2, 7), torch.ones(3, 6)),
    "rows do not broadcast": (torch.ones(1, 7), torch.ones(3, 6)),
    "dimensions differ": (torch.ones(2, 7), torch.ones(1, 2, 6)),
    "dtypes differ": (torch.ones(2, 7), torch.ones(2, 6, dtype=torch.float64)),
    "halves differ": (torch.ones(2, 7, dtype=torch.half), torch.ones(2, 6, dtype=torch.bfloat16)),
    "integers": (torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)),
}


@for_kinds()
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_nn_bilinear_refuses_are_an_input_error(case, kind):
    values = BAD_INPUTS[case]
    with pytest.raises(RuntimeError):
        bilinear(7, 6, 5)(*values)
    with pytest.raises(InputError, match=r"`input1`|`input2`") as caught:
        make(kind, dtype=torch.float32)(*values)
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, ValueError)


@for_kinds(EXACT)
@pytest.mark.parametrize("call", ["forward", "pairwise"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_of_another_dtype_than_the_layers_are_an_input_error(dtype, call, kind):
    layer = make(kind, dtype=torch.float32)
    values = inputs(layer, 2, dtype=dtype)
    with pytest.raises(RuntimeError):
        bilinear(7, 6, 5)(*values)
    with pytest.raises(InputError, match=f"torch.float32.*Found {dtype}"):
        getattr(layer, call)(*values)


@for_kinds([kind for kind in KINDS if kind[1] is not None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_int8_layer_computes_in_the_dtype_of_its_inputs(dtype, kind):
    layer = make(kind, dtype=torch.float32)
    values = inputs(layer, 3, dtype=dtype)
    for output, define in (
        (layer(*values), reference.bilinear_dense),
        (layer.pairwise(*values), reference.pairwise_dense),
    ):
        assert output.dtype == dtype
        assert_matches_reference(output.detach(), expected(layer, *values, define))


@for_kinds()
@pytest.mark.parametrize(
    ("shape1", "shape2"),
    [((7,), (2, 6)), ((2, 7), (6,)), ((7,), (6,)), ((2, 3, 7), (3, 3, 6)), ((2, 3, 7), (3, 6)), ((2, 8), (2, 6))],
)
def test_pairs_of_other_shapes_are_an_input_error(shape1, shape2, kind):
    with pytest.raises(InputError, match="Found"):
        make(kind).pairwise(normal(*shape1), normal(*shape2))


@for_kinds()
def test_messages_say_what_was_required_and_found(kind):
    layer = make(kind)
    with pytest.raises(InputError, match=r"`input2` should have shape \(\.\.\., 6\)\. Found \(2, 9\)\."):
        layer(normal(2, 7), normal(2, 9))


@pytest.fixture
def small_blocks():
    with ops.use_tuning(ops.Tuning(block=12, block_grad=12, pairs=12, outer=12, weight=12, cp=12, cp_grad=12)):
        yield


@pytest.mark.usefixtures("small_blocks")
@for_kinds()
@pytest.mark.parametrize("call", ["forward", "pairwise"])
def test_first_and_second_derivatives(call, kind):
    layer = make(kind, (3, 2, 2))
    names, parameters = zip(
        *((n, p.detach().clone().requires_grad_()) for n, p in layer.named_parameters()), strict=True
    )
    if call == "pairwise":
        layer.forward = layer.pairwise

    def function(input1, input2, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (input1, input2))

    values = (*inputs(layer, 3, requires_grad=True), *parameters)
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@for_kinds(EXACT)
def test_the_dense_weight_is_differentiable_in_what_is_stored(kind):
    layer = make(kind)
    values, direction = inputs(layer, 4), normal(4, 5, seed=3)
    parameters = [parameter for name, parameter in layer.named_parameters() if "bias" not in name]
    by_forward = torch.autograd.grad(layer(*values), parameters, direction)
    by_weight = torch.autograd.grad(reference.bilinear_dense(*values, layer.to_dense()), parameters, direction)
    for found, exact in zip(by_forward, by_weight, strict=True):
        assert_matches_reference(found, exact)


@for_kinds()
def test_the_dense_weight_by_rows_and_in_any_dtype(kind):
    layer = make(kind, dtype=torch.bfloat16)
    whole = layer.to_dense(torch.float64).detach()
    assert whole.shape == (5, 7, 6)
    assert layer.to_dense().dtype == (torch.bfloat16 if kind[1] is None else torch.float32)
    parts = [layer.dense_rows(slice(start, start + 2), torch.float64).detach() for start in range(0, 5, 2)]
    assert_matches_reference(torch.cat(parts), whole)
    assert_matches_reference(layer.to_dense(torch.float32).detach(), whole)


def test_every_class_is_made_from_a_layer_and_from_a_decomposition():
    layer = bilinear(12, 10, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(low_rank((8, 12, 10), 3))
    values = normal(5, 12), normal(5, 10, seed=1)
    of_rank_3, tucker_of_rank_3 = cp(layer.weight, 3), tucker(layer.weight, (3, 3, 3))
    for module in (
        CPBilinear.from_bilinear(layer, 3),
        TuckerBilinear.from_bilinear(layer, (3, 3, 3)),
        DenseBilinear.from_bilinear(layer),
        CPBilinear.from_decomposition(of_rank_3, layer.bias),
        TuckerBilinear.from_decomposition(tucker_of_rank_3, layer.bias),
        DenseBilinear.from_decomposition(of_rank_3, layer.bias),
        DenseBilinear.from_decomposition(tucker_of_rank_3, layer.bias),
    ):
        # the solver stops at about 1e-7
        assert_matches_reference(module(*values).detach(), layer(*values).detach(), factor=1e6)


def test_factors_are_read_as_the_reference_ops_define_them():
    values, bias = (normal(5, 12), normal(5, 10, seed=1)), normal(8, seed=2)
    found = cp(low_rank((8, 12, 10), 3), 3)
    scaled = (found.factors[0] * found.weights, *found.factors[1:])
    assert_matches_reference(
        CPBilinear.from_decomposition(found, bias)(*values), reference.bilinear_cp(*values, scaled, bias)
    )
    core = tucker(low_rank((8, 12, 10), 3), (2, 3, 2))
    assert_matches_reference(
        TuckerBilinear.from_decomposition(core, bias)(*values),
        reference.bilinear_tucker(*values, core.core, core.factors, bias),
    )


@for_kinds()
def test_a_deepcopy_is_equal_and_independent(kind):
    layer = make(kind)
    before, values = state_of(layer), inputs(layer, 3)
    copied = copy.deepcopy(layer)
    assert_same_state(copied, before)
    assert torch.equal(copied(*values), layer(*values))
    for tensor in copied.state_dict().values():
        tensor.zero_()
    assert_same_state(layer, before)


@for_kinds()
@pytest.mark.parametrize("dtype", DTYPES)
def test_casting(dtype, kind):
    layer = make(kind, dtype=torch.float32)
    before = state_of(layer)
    assert layer.to(dtype) is layer
    values = inputs(layer, 3, dtype=dtype)
    assert_matches_reference(layer(*values).detach(), expected(layer, *values))
    if kind[1] is not None:
        stored = {name: value for name, value in layer.state_dict().items() if not name.endswith("bias")}
        assert all(torch.equal(value, before[name]) for name, value in stored.items())
        assert all(value.dtype == before[name].dtype for name, value in stored.items())
    else:  # an index stays one
        assert {value.dtype for value in layer.state_dict().values()} - {torch.int32} == {dtype}


@for_kinds()
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_state_dict_loads_into_a_new_layer(bias, assign, kind):
    layer = make(kind, bias=bias, dtype=torch.float32)
    new = blank(kind, bias=bias, device="meta" if assign else None)
    new.load_state_dict(layer.state_dict(), assign=assign)
    assert_same_state(new, state_of(layer))
    values = inputs(layer, 3, dtype=torch.float32)
    assert torch.equal(new(*values), layer(*values))


@for_kinds()
def test_the_attributes_are_those_of_nn_bilinear_and_what_was_asked_for(kind):
    layer = blank(kind, (9, 4, 5))
    original = bilinear(9, 4, 5)
    for name in ("in1_features", "in2_features", "out_features"):
        assert getattr(layer, name) == getattr(original, name)
    assert layer.to_dense().shape == original.weight.shape
    assert layer.bias.shape == original.bias.shape
    assert isinstance(layer.bias, nn.Parameter)
    assert layer.quantize == kind[1]
    assert layer.rank == {"cp": 8, "tucker": (4, 6, 4), "dense": None}[layer.method]


@for_kinds()
def test_a_bias_that_is_set_stays_the_same_parameter(kind):
    layer = make(kind)
    bias = nn.Parameter(torch.full((5,), 3.0, dtype=torch.float64))
    layer.set_bias(bias)
    assert layer.bias is bias
    values = inputs(layer, 2)
    assert_matches_reference(layer(*values).detach(), expected(layer, *values))
    layer.set_bias(None)
    assert layer.bias is None
    assert_matches_reference(layer(*values).detach(), expected(layer, *values))


@for_kinds()
@pytest.mark.parametrize("how", ["pruned", "parametrized", "a tensor", "none"])
def test_a_bias_that_is_no_parameter_is_added_as_it_is(how, kind):
    layer = make(kind, (12, 11, 9))
    holder = layer if kind[0] is DenseBilinear else layer.out_proj
    bias = holder.bias.detach().clone()
    if how == "pruned":
        prune.l1_unstructured(holder, "bias", 0.4)
        bias = bias * holder.bias_mask
    elif how == "parametrized":
        nn.utils.parametrize.register_parametrization(holder, "bias", nn.Tanh(), unsafe=True)
        bias = bias.tanh()
    else:
        del holder.bias
        holder.bias = bias if how == "a tensor" else None
        bias = bias if how == "a tensor" else 0 * bias
    input1, input2 = inputs(layer, 3)
    exact = reference.bilinear_dense(input1, input2, layer.to_dense(torch.float64), bias)
    assert_matches_reference(layer(input1, input2).detach(), exact.detach())


@for_kinds()
def test_the_repr_says_what_the_layer_is(kind):
    shown = repr(make(kind))
    rank = {"cp": "rank=8, ", "tucker": "rank=(4, 6, 5), ", "dense": ""}[kind[0].method]
    quantize = f", quantize='{kind[1]}'" if kind[1] else ""
    assert shown.startswith(kind[0].__name__)
    assert f"in1_features=7, in2_features=6, out_features=5, {rank}bias=True{quantize}" in shown


@for_kinds()
def test_evaluation_equals_training(kind):
    layer = make(kind)
    values = inputs(layer, 3)
    assert torch.equal(layer.train()(*values), layer.eval()(*values))


@for_kinds()
def test_without_gradients_the_output_is_the_same(kind):
    layer = make(kind)
    values = inputs(layer, 3)
    with torch.no_grad():
        quiet = layer(*values), layer.pairwise(*values)
    assert_matches_reference(quiet[0], layer(*values).detach())
    assert_matches_reference(quiet[1], layer.pairwise(*values).detach())


@for_kinds()
@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_a_size_below_1_is_an_error(size, axis, kind):
    shape = [3, 4, 5]
    shape[axis] = size
    name = ("in1_features", "in2_features", "out_features")[axis]
    with pytest.raises(CompressionError, match=f"`{name}` should be a positive int. Found {size!r}."):
        kind[0](*shape, *{"cp": (1,), "tucker": ((1, 1, 1),), "dense": ()}[kind[0].method], quantize=kind[1])


@pytest.mark.parametrize("module_class", [CPBilinear, TuckerBilinear, DenseBilinear])
def test_another_storage_format_is_an_error(module_class):
    with pytest.raises(ConfigError, match="Found 'nf3'"):
        blank((module_class, "nf3"))


@for_kinds(PROJECTED)
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "value", [None, torch.ones(5), nn.Parameter(torch.ones(5))], ids=["none", "tensor", "parameter"]
)
def test_setting_what_is_computed_is_an_attribute_error(value, name, kind):
    layer = make(kind)
    before = state_of(layer)
    with pytest.raises(AttributeError, match=f"`{name}` of a {kind[0].__name__} is computed"):
        setattr(layer, name, value)
    assert_same_state(layer, before)


@for_kinds(PROJECTED)
def test_the_weight_of_a_projected_layer_is_its_dense_weight(kind):
    layer = make(kind)
    assert torch.equal(layer.weight, layer.to_dense())
    assert layer.bias is layer.out_proj.bias


@pytest.mark.parametrize("blocks", ["whole", "blocks"])
@for_kinds()
@pytest.mark.parametrize("call", ["forward", "pairwise"])
def test_functional_gradients_are_those_of_autograd(call, kind, blocks, request):
    if blocks == "blocks":
        request.getfixturevalue("small_blocks")
    function = getattr(make(kind), call)
    input1, input2 = inputs(make(kind), 6)
    found = torch.func.grad(lambda values: function(values, input2).sum())(input1)
    input1.requires_grad_()
    assert_matches_reference(found, torch.autograd.grad(function(input1, input2).sum(), input1)[0])


@for_kinds()
@pytest.mark.parametrize("call", ["forward", "pairwise"])
def test_vmap_is_a_loop(call, kind):
    layer = make(kind)
    values = inputs(layer, 3, 4)
    looped = torch.stack([getattr(layer, call)(*pair) for pair in zip(*values, strict=True)])
    assert_matches_reference(torch.func.vmap(getattr(layer, call))(*values).detach(), looped.detach())


@for_kinds()
def test_shapes_are_inferred_on_the_meta_device(kind):
    layer, values = make(kind).to("meta"), [value.to("meta") for value in inputs(make(kind), 4)]
    assert layer(*values).shape == (4, 5)
    assert layer.pairwise(*values).shape == (4, 4, 5)
    assert layer(*values).device.type == "meta"


@for_kinds()
@pytest.mark.parametrize("call", ["forward", "pairwise"])
def test_compiling_needs_one_graph(call, kind):
    layer = make(kind)
    torch.compiler.reset()
    compiled = torch.compile(getattr(layer, call), fullgraph=True, backend="aot_eager")
    for rows in (3, 5, 8):
        values = inputs(layer, rows, requires_grad=True)
        found, exact = compiled(*values), getattr(layer, call)(*values)
        assert_matches_reference(found.detach(), exact.detach())
        for gradient, own in zip(
            torch.autograd.grad(found.sum(), values), torch.autograd.grad(exact.sum(), values), strict=True
        ):
            assert_matches_reference(gradient, own)


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None, reason="no C++ compiler"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it imports the compiler
def test_compiling_to_code():
    layer = make((DenseBilinear, "int8"), dtype=torch.float32)
    values = inputs(layer, 5, dtype=torch.float32)
    torch.compiler.reset()
    with torch.no_grad():
        assert_matches_reference(torch.compile(layer, fullgraph=True)(*values), expected(layer, *values))


class Pairs(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, input1, input2):
        return self.layer.pairwise(input1, input2)


@for_kinds()
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("shape", [(7, 6, 5), (3, 4, 80), (63, 37, 150)])
def test_an_exported_graph_takes_other_batch_sizes(shape, pairs, kind):
    layer = make(kind, shape, dtype=torch.float32).eval()
    count1 = count2 = torch.export.Dim("batch", min=1, max=4096)
    if pairs:
        count1, count2 = torch.export.Dim("count1", min=1, max=4096), torch.export.Dim("count2", min=1, max=4096)
    module = Pairs(layer) if pairs else layer
    program = torch.export.export(
        module, inputs(layer, 3, dtype=torch.float32), dynamic_shapes=({0: count1}, {0: count2})
    )
    for rows in (3, 1, 17):
        values = inputs(layer, rows, dtype=torch.float32)
        define = reference.pairwise_dense if pairs else reference.bilinear_dense
        assert_matches_reference(program.module()(*values).detach(), expected(layer, *values, define))


@for_kinds()
def test_a_trace_takes_other_batch_sizes(kind):
    layer = make(kind, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated, and that it records the checks of shapes
        traced = torch.jit.trace(layer, inputs(layer, 2, dtype=torch.float32))
    values = inputs(layer, 9, dtype=torch.float32)
    assert_matches_reference(traced(*values).detach(), expected(layer, *values))


@for_kinds()
@pytest.mark.parametrize(("dtype1", "dtype2"), [*itertools.product((torch.float32, torch.bfloat16), repeat=2)])
def test_autocast_takes_mixed_inputs_where_nn_bilinear_does_not(dtype1, dtype2, kind):
    layer = make(kind, dtype=torch.float32)
    input1, input2 = inputs(layer, 4)
    values = input1.to(dtype1), input2.to(dtype2)
    with torch.autocast("cpu", torch.bfloat16):
        if dtype1 != dtype2:
            with pytest.raises(RuntimeError, match="dtype"):
                bilinear(7, 6, 5)(*values)
        output, pairs = layer(*values), layer.pairwise(*values)
        output.sum().backward()
    assert output.dtype == pairs.dtype == torch.bfloat16
    assert_matches_reference(output.detach(), expected(layer, *values))
    assert_matches_reference(pairs.detach(), expected(layer, *values, reference.pairwise_dense))
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@for_kinds()
def test_autocast_leaves_float64_alone(kind):
    layer = make(kind)
    values = inputs(layer, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(*values)
    assert_matches_reference(output.detach(), expected(layer, *values))
    assert output.dtype == torch.float64
