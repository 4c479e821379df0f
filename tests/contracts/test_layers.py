"""What the layers of every method and storage format promise."""

import copy
import pickle
from itertools import product

import pytest
import torch
from layers import (
    BOUND,
    CP_RANK,
    EXACT,
    FEW,
    KINDS,
    LAYERS,
    PROJECTED,
    QUANTIZED,
    SMALL_BLOCKS,
    blank,
    expected,
    for_kinds,
    inputs,
    make,
    normal,
    rank_of,
)
from support import DTYPES, SHAPES, assert_matches_reference, assert_same_state, bilinear, low_rank, state_of
from torch import nn
from torch.nn.utils import prune

from compress_bilinear.decomposition import CPDecomposition, TuckerDecomposition, cp, tucker
from compress_bilinear.errors import CompressionError, ConfigError, InputError
from compress_bilinear.modules import CompressedBilinear
from compress_bilinear.ops import reference, use_tuning


def dtypes_of(shape, method, quantize):
    """float64, and one other dtype: every shape has every dtype with a third of the kinds."""
    return DTYPES[0], DTYPES[1:][(SHAPES.index(shape) + KINDS.index((method, quantize))) % 3]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@for_kinds()
class TestOutputs:
    def test_the_forward_is_that_of_the_dense_weight(self, method, quantize, shape):
        for dtype in dtypes_of(shape, method, quantize):
            layer = make(method, quantize, shape, dtype=dtype)
            for leading in ((), (0,), (1,), (5,), (2, 3)):
                values = inputs(layer, *leading, dtype=dtype)
                output = layer(*values)
                assert output.dtype == dtype
                assert output.is_contiguous()
                assert_matches_reference(output.detach(), expected(layer, *values))

    def test_pairs_are_the_forward_of_expanded_pairs(self, method, quantize, shape):
        lengths = (((), 4, 3), ((2,), 1, 5), ((2, 3), 2, 1), ((), 0, 3), ((), 3, 0), ((0,), 2, 3))
        for dtype in dtypes_of(shape, method, quantize):
            layer = make(method, quantize, shape, dtype=dtype)
            for leading, length1, length2 in lengths:
                input1, _ = inputs(layer, *leading, length1, dtype=dtype)
                _, input2 = inputs(layer, *leading, length2, dtype=dtype)
                pairs = layer.pairwise(input1, input2)
                assert pairs.dtype == dtype
                assert pairs.is_contiguous()
                sizes = (*leading, length1, length2, -1)
                expanded = expected(layer, input1.unsqueeze(-2).expand(sizes), input2.unsqueeze(-3).expand(sizes))
                assert_matches_reference(pairs.detach(), expanded)


@for_kinds()
class TestCalls:
    def test_without_a_bias(self, method, quantize):
        layer = make(method, quantize, bias=False)
        assert layer.bias is None
        assert not any("bias" in name for name in layer.state_dict())
        values = inputs(layer, 4)
        assert_matches_reference(layer(*values).detach(), expected(layer, *values))
        assert_matches_reference(layer.pairwise(*values).detach(), expected(layer, *values, reference.pairwise_dense))

    def test_strided_inputs(self, method, quantize):
        layer = make(method, quantize)
        input1, input2 = inputs(layer, 4, 3)
        values = input1.transpose(0, 1).contiguous().transpose(0, 1), input2[:, :1].expand(-1, 3, -1)
        assert_matches_reference(layer(*values).detach(), expected(layer, *values))
        assert_matches_reference(layer.pairwise(*values).detach(), expected(layer, *values, reference.pairwise_dense))

    def test_evaluation_equals_training(self, method, quantize):
        layer = make(method, quantize)
        values = inputs(layer, 3)
        assert torch.equal(layer.train()(*values), layer.eval()(*values))

    def test_without_gradients_the_output_is_the_same(self, method, quantize):
        layer = make(method, quantize)
        values = inputs(layer, 3)
        with torch.no_grad():
            quiet = layer(*values), layer.pairwise(*values)
        assert_matches_reference(quiet[0], layer(*values).detach())
        assert_matches_reference(quiet[1], layer.pairwise(*values).detach())

    @pytest.mark.parametrize("how", ["pruned", "parametrized", "a tensor", "none"])
    def test_a_bias_that_is_no_parameter_is_added_as_it_is(self, method, quantize, how):
        layer = make(method, quantize, (12, 11, 9))
        holder = layer if method == "dense" else layer.out_proj
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

    def test_a_bias_that_is_set_stays_the_same_parameter(self, method, quantize):
        layer = make(method, quantize)
        bias = nn.Parameter(torch.full((5,), 3.0, dtype=torch.float64))
        layer.set_bias(bias)
        assert layer.bias is bias
        values = inputs(layer, 2)
        assert_matches_reference(layer(*values).detach(), expected(layer, *values))
        layer.set_bias(None)
        assert layer.bias is None
        assert_matches_reference(layer(*values).detach(), expected(layer, *values))


# of shapes that `nn.Bilinear(7, 6, 5)` refuses
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
BAD_PAIRS = [((7,), (2, 6)), ((2, 7), (6,)), ((7,), (6,)), ((2, 3, 7), (3, 3, 6)), ((2, 3, 7), (3, 6))]


@for_kinds()
class TestErrors:
    def test_inputs_that_nn_bilinear_refuses(self, method, quantize):
        layer = make(method, quantize, dtype=torch.float32)
        for values in BAD_INPUTS.values():
            with pytest.raises(RuntimeError):
                bilinear(7, 6, 5)(*values)
            with pytest.raises(InputError, match=r"`input1`|`input2`") as caught:
                layer(*values)
            assert isinstance(caught.value, RuntimeError)
            assert isinstance(caught.value, ValueError)

    def test_messages_say_what_was_required_and_found(self, method, quantize):
        layer = make(method, quantize)
        with pytest.raises(InputError, match=r"`input2` should have shape \(\.\.\., 6\)\. Found \(2, 9\)\."):
            layer(normal(2, 7), normal(2, 9))

    def test_pairs_of_other_shapes(self, method, quantize):
        layer = make(method, quantize)
        for shape1, shape2 in [*BAD_PAIRS, ((2, 8), (2, 6))]:
            with pytest.raises(InputError, match="Found"):
                layer.pairwise(normal(*shape1), normal(*shape2))

    def test_sizes_below_1(self, method, quantize):
        names = ("in1_features", "in2_features", "out_features")
        for axis, size in product(range(3), [0, -1, 2.0, True]):
            shape = [3, 4, 5]
            shape[axis] = size
            with pytest.raises(CompressionError, match=f"`{names[axis]}` should be a positive int. Found {size!r}."):
                blank(method, quantize, shape, {"cp": 1, "tucker": (1, 1, 1), "dense": None}[method])


@for_kinds(EXACT)
def test_inputs_of_another_dtype_than_the_layers_are_an_input_error(method, quantize):
    layer = make(method, quantize, dtype=torch.float32)
    for dtype, call in product((torch.float64, torch.bfloat16), (layer, layer.pairwise)):
        values = inputs(layer, 2, dtype=dtype)
        with pytest.raises(RuntimeError):
            bilinear(7, 6, 5)(*values)
        with pytest.raises(InputError, match=f"torch.float32.*Found {dtype}"):
            call(*values)


@for_kinds(QUANTIZED)
def test_a_quantized_layer_computes_in_the_dtype_of_its_inputs(method, quantize):
    layer = make(method, quantize, dtype=torch.float32)
    for dtype in DTYPES:
        values = inputs(layer, 3, dtype=dtype)
        output, pairs = layer(*values), layer.pairwise(*values)
        assert output.dtype == pairs.dtype == dtype
        assert_matches_reference(output.detach(), expected(layer, *values))
        assert_matches_reference(pairs.detach(), expected(layer, *values, reference.pairwise_dense))


@pytest.mark.parametrize("method", LAYERS)
def test_another_storage_format_is_an_error(method):
    with pytest.raises(ConfigError, match="Found 'nf3'"):
        blank(method, "nf3")


@for_kinds(fast=FEW)
@pytest.mark.parametrize("call", ["forward", "pairwise"])
def test_first_and_second_derivatives_also_in_blocks(method, quantize, call):
    layer = make(method, quantize, (3, 2, 2))
    names, parameters = zip(
        *((n, p.detach().clone().requires_grad_()) for n, p in layer.named_parameters()), strict=True
    )
    if call == "pairwise":
        layer.forward = layer.pairwise

    def function(input1, input2, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (input1, input2))

    values = (*inputs(layer, 3, requires_grad=True), *parameters)
    with use_tuning(SMALL_BLOCKS):
        assert torch.autograd.gradcheck(function, values)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


class TestDenseWeight:
    @for_kinds(EXACT)
    def test_it_is_differentiable_in_what_is_stored(self, method, quantize):
        layer = make(method, quantize)
        values, direction = inputs(layer, 4), normal(4, 5, seed=3)
        parameters = [parameter for name, parameter in layer.named_parameters() if "bias" not in name]
        by_forward = torch.autograd.grad(layer(*values), parameters, direction)
        by_weight = torch.autograd.grad(reference.bilinear_dense(*values, layer.to_dense()), parameters, direction)
        for found, exact in zip(by_forward, by_weight, strict=True):
            assert_matches_reference(found, exact)

    @for_kinds()
    def test_by_rows_and_in_any_dtype(self, method, quantize):
        layer = make(method, quantize, dtype=torch.bfloat16)
        whole = layer.to_dense(torch.float64).detach()
        assert whole.shape == (5, 7, 6)
        assert layer.to_dense().dtype == (torch.bfloat16 if quantize is None else torch.float32)
        parts = [layer.dense_rows(slice(start, start + 2), torch.float64).detach() for start in range(0, 5, 2)]
        assert_matches_reference(torch.cat(parts), whole)
        assert_matches_reference(layer.to_dense(torch.float32).detach(), whole)

    @for_kinds(PROJECTED)
    def test_it_is_the_weight_of_a_projected_layer(self, method, quantize):
        layer = make(method, quantize)
        assert torch.equal(layer.weight, layer.to_dense())
        assert layer.bias is layer.out_proj.bias

    @for_kinds(PROJECTED)
    def test_setting_what_is_computed_is_an_attribute_error(self, method, quantize):
        layer = make(method, quantize)
        before = state_of(layer)
        for name, value in product(("weight", "bias"), (None, torch.ones(5), nn.Parameter(torch.ones(5)))):
            with pytest.raises(AttributeError, match=f"`{name}` of a {LAYERS[method].__name__} is computed"):
                setattr(layer, name, value)
        assert_same_state(layer, before)


@for_kinds()
class TestState:
    def test_a_copy_and_a_pickle_are_equal_and_independent(self, method, quantize):
        layer = make(method, quantize)
        before, values = state_of(layer), inputs(layer, 3)
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert_same_state(copied, before)
            assert torch.equal(copied(*values), layer(*values))
            for tensor in copied.state_dict().values():
                tensor.zero_()
            assert_same_state(layer, before)

    def test_casting(self, method, quantize):
        for dtype in DTYPES:
            layer = make(method, quantize, dtype=torch.float32)
            before = state_of(layer)
            assert layer.to(dtype) is layer
            values = inputs(layer, 3, dtype=dtype)
            assert_matches_reference(layer(*values).detach(), expected(layer, *values))
            state = {name: value for name, value in layer.state_dict().items() if not name.endswith("bias")}
            if quantize is None:  # an index stays one
                assert {value.dtype for value in state.values()} - {torch.int32} == {dtype}
            else:
                assert all(torch.equal(value, before[name]) for name, value in state.items())
                assert all(value.dtype == before[name].dtype for name, value in state.items())

    def test_a_state_dict_loads_into_a_new_layer(self, method, quantize):
        for bias, assign in product((False, True), repeat=2):
            layer = make(method, quantize, bias=bias, dtype=torch.float32)
            new = blank(method, quantize, bias=bias, device="meta" if assign else None)
            new.load_state_dict(layer.state_dict(), assign=assign)
            assert_same_state(new, state_of(layer))
            values = inputs(layer, 3, dtype=torch.float32)
            assert torch.equal(new(*values), layer(*values))

    def test_the_attributes_are_those_of_nn_bilinear_and_what_was_asked_for(self, method, quantize):
        layer, original = blank(method, quantize, (9, 4, 5)), bilinear(9, 4, 5)
        for name in ("in1_features", "in2_features", "out_features"):
            assert getattr(layer, name) == getattr(original, name)
        assert layer.to_dense().shape == original.weight.shape
        assert layer.bias.shape == original.bias.shape
        assert isinstance(layer.bias, nn.Parameter)
        assert isinstance(layer, CompressedBilinear)
        assert (layer.method, layer.quantize) == (method, quantize)
        assert layer.rank == {"cp": CP_RANK, "tucker": (4, 6, 4), "dense": None}[method]

    def test_the_repr_says_what_the_layer_is(self, method, quantize):
        shown, rank = repr(make(method, quantize)), rank_of(method, (7, 6, 5))
        assert shown.startswith(LAYERS[method].__name__)
        rank, stored = f"rank={rank}, " if rank else "", f", quantize='{quantize}'" if quantize else ""
        assert f"in1_features=7, in2_features=6, out_features=5, {rank}bias=True{stored}" in shown


SOLVED = {"dense": (), "cp": (3,), "tucker": ((3, 3, 3),)}


@pytest.fixture(scope="module")
def of_rank_3():
    layer = bilinear(12, 10, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(low_rank((8, 12, 10), 3))
    weight = layer.weight.detach()
    return layer, {"cp": cp(weight, 3), "tucker": tucker(weight, (3, 3, 3))}


class TestMaking:
    @for_kinds()
    def test_from_a_layer_and_from_a_decomposition(self, method, quantize, of_rank_3):
        layer, decompositions = of_rank_3
        weight, kind = layer.weight.detach(), LAYERS[method]
        made = [kind.from_bilinear(layer, *SOLVED[method], quantize=quantize)]
        for decomposition in decompositions.values() if method == "dense" else [decompositions[method]]:
            made.append(kind.from_decomposition(decomposition, layer.bias, quantize=quantize))
        bound = BOUND.get(quantize, 1e-5)  # the solver stops at about 1e-7
        for new in made:
            assert float((new.to_dense(torch.float64).detach() - weight).norm() / weight.norm()) < bound
            assert torch.equal(new.bias, layer.bias)
            assert new.bias is not layer.bias

    def test_factors_are_read_as_the_reference_defines_them(self, of_rank_3):
        values, bias = (normal(5, 12), normal(5, 10, seed=1)), normal(8, seed=2)
        found: CPDecomposition = of_rank_3[1]["cp"]
        scaled = (found.factors[0] * found.weights, *found.factors[1:])
        layer = LAYERS["cp"].from_decomposition(found, bias)
        assert_matches_reference(layer(*values).detach(), reference.bilinear_cp(*values, scaled, bias))
        core: TuckerDecomposition = tucker(low_rank((8, 12, 10), 3), (2, 3, 2))
        layer = LAYERS["tucker"].from_decomposition(core, bias)
        exact = reference.bilinear_tucker(*values, core.core, core.factors, bias)
        assert_matches_reference(layer(*values).detach(), exact)
