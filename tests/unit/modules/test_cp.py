import pytest
import torch
from support import DTYPES, assert_matches_reference, bilinear, low_rank, normal
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress_bilinear import CPBilinear, TuckerBilinear
from compress_bilinear.decomposition import CPDecomposition
from compress_bilinear.errors import ConfigError
from compress_bilinear.modules import QuantizedLinear
from compress_bilinear.ops import Tuning, reference, use_tuning


def test_a_projection_with_a_bias_of_its_own_keeps_it():
    layer, _ = example()
    layer.in1_proj = nn.Linear(9, 6, dtype=torch.float64)
    x1, x2 = normal(3, 9), normal(3, 7, seed=1)
    expected = layer.out_proj(layer.in1_proj(x1) * layer.in2_proj(x2))
    assert_matches_reference(layer(x1, x2).detach(), expected.detach())
    assert_matches_reference(layer.pairwise(x1, x2).diagonal().T.detach(), expected.detach())
    assert "`in1_proj` has a bias" in layer.explain()


class Negative(nn.Module):
    def forward(self, input):
        return -input


def example(rank=6, *, dtype=torch.float64, quantize=None):
    """From a decomposition with positive, negative and zero weights."""
    factors = tuple(normal(size, rank, dtype=dtype, seed=size) for size in (5, 9, 7))
    weights = normal(rank, dtype=torch.promote_types(dtype, torch.float32))
    weights[0] = 0
    decomposition = CPDecomposition(weights, factors)
    return CPBilinear.from_decomposition(decomposition, normal(5, dtype=dtype), quantize=quantize), decomposition


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_stands_for_the_tensor_of_its_decomposition(dtype):
    layer, decomposition = example(dtype=dtype)
    exact = torch.einsum(
        "r,or,ir,jr->oij", decomposition.weights.double(), *(factor.double() for factor in decomposition.factors)
    )
    assert_matches_reference(layer.to_dense().detach(), exact)
    assert layer.to_dense().dtype == dtype


@pytest.mark.parametrize("rank", [1, 6, 40])
def test_the_forward_is_the_reference_of_its_three_linear_layers(rank):
    layer, _ = example(rank)
    input1, input2 = normal(11, 9), normal(11, 7, seed=1)
    factors = (layer.out_proj.weight, layer.in1_proj.weight.T, layer.in2_proj.weight.T)
    expected = reference.bilinear_cp(input1, input2, factors, layer.bias)
    assert_matches_reference(layer(input1, input2).detach(), expected.detach())


def test_it_is_made_of_ordinary_linear_layers():
    layer = CPBilinear(9, 7, 5, 6)
    assert [type(part) for part in layer.children()] == [nn.Linear] * 3
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "in1_proj.weight": (6, 9),
        "in2_proj.weight": (6, 7),
        "out_proj.weight": (5, 6),
        "out_proj.bias": (5,),
    }


def test_it_shares_no_memory_with_its_decomposition():
    layer, decomposition = example()
    before = decomposition.to_tensor()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(decomposition.to_tensor(), before)


def test_int8_has_one_float32_scale_for_each_component():
    layer, _ = example(quantize="int8")
    assert all(isinstance(part, QuantizedLinear) for part in layer.children())
    assert {name: (value.dtype, tuple(value.shape)) for name, value in layer.named_buffers()} == {
        "in1_proj.weight.qdata": (torch.int8, (6, 9)),
        "in2_proj.weight.qdata": (torch.int8, (6, 7)),
        "out_proj.weight.qdata": (torch.int8, (5, 6)),
        "out_proj.sigma": (torch.float32, (6,)),
    }
    for part, components in ((layer.in1_proj, 1), (layer.in2_proj, 1), (layer.out_proj, 0)):
        assert bool((part.weight.qdata.abs().amax(components) == 127).all())  # no component wastes levels


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_composed_by_hand_the_inner_layers_give_the_same(quantize):
    layer, _ = example(quantize=quantize)
    input1, input2 = normal(4, 9), normal(4, 7, seed=1)
    by_hand = layer.out_proj(layer.in1_proj(input1) * layer.in2_proj(input2))
    assert_matches_reference(by_hand.detach(), layer(input1, input2).detach())


def test_a_product_beyond_the_range_of_float16_is_formed_in_float32():
    original = bilinear(64, 64, 3)
    with torch.no_grad():
        original.weight.mul_(1e-3)
    layer = CPBilinear.from_bilinear(original, 4, quantize="int8")
    input1, input2 = (200 * normal(8, 64, seed=seed).half() for seed in (1, 2))
    product = layer.in1_proj(input1) * layer.in2_proj(input2)
    assert bool(torch.isinf(product).any())  # what the layer has to avoid
    expected = reference.bilinear_dense(input1.double(), input2.double(), layer.to_dense(torch.float64), layer.bias)
    assert_matches_reference(layer(input1, input2).detach(), expected.detach())


def test_the_freedom_to_move_scale_between_factors_costs_int8_no_accuracy():
    _, decomposition = example()
    moved = 10.0 ** torch.arange(-3, 3, dtype=torch.float64)
    out, in1, in2 = decomposition.factors
    skewed = CPDecomposition(decomposition.weights, (out * moved, in1 / moved.square(), in2 * moved))
    exact = decomposition.to_tensor()
    for unbalanced in (decomposition, skewed):
        layer = CPBilinear.from_decomposition(unbalanced, quantize="int8")
        assert float((layer.to_dense(torch.float64) - exact).norm() / exact.norm()) < 0.02


def test_large_weights_stay_in_the_range_of_float16():
    weights = torch.tensor([3e5, 1e5])
    factors = tuple((normal(size, 2, seed=size) / 4).half() for size in (5, 9, 7))
    layer = CPBilinear.from_decomposition(CPDecomposition(weights, factors))
    assert all(bool(torch.isfinite(parameter).all()) for parameter in layer.parameters())
    exact = torch.einsum("r,or,ir,jr->oij", weights.double(), *(factor.double() for factor in factors))
    found = layer.to_dense(torch.float64).detach()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-2 * float(exact.abs().max()))


@pytest.fixture
def small_blocks():
    with use_tuning(Tuning(cp=50, cp_grad=50)):
        yield


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize(("leading", "length1", "length2"), [((), 13, 3), ((2,), 7, 4), ((0,), 3, 4), ((3, 2), 5, 1)])
def test_pairs_in_blocks_have_the_references_outputs_and_gradients(leading, length1, length2, quantize):
    layer, _ = example(quantize=quantize)
    input1 = normal(*leading, length1, 9).requires_grad_()
    input2 = normal(*leading, length2, 7, seed=1).requires_grad_()
    weight, tensors = layer.to_dense(torch.float64), (input1, input2, *layer.parameters())
    found, exact = layer.pairwise(input1, input2), reference.pairwise_dense(input1, input2, weight, layer.bias)
    assert_matches_reference(found.detach(), exact.detach())
    with torch.no_grad():
        assert_matches_reference(layer.pairwise(input1, input2), found.detach())
    direction = normal(*exact.shape)
    gradients = torch.autograd.grad(found, tensors, direction)
    for gradient, own in zip(gradients, torch.autograd.grad(exact, tensors, direction), strict=True):
        assert_matches_reference(gradient, own)


@pytest.mark.usefixtures("small_blocks")
def test_second_derivatives_of_pairs_in_blocks():
    layer, _ = example(rank=3)
    values = normal(9, 9).requires_grad_(), normal(4, 7, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(layer.pairwise, values, fast_mode=True)


@pytest.mark.usefixtures("small_blocks")
def test_pairs_in_blocks_are_differentiated_at_the_parameters_of_the_call():
    layer, _ = example()
    other, _ = example()
    given = {name: (2 * value.detach()).requires_grad_() for name, value in layer.named_parameters()}
    other.load_state_dict(given)
    input1, input2 = normal(13, 9).requires_grad_(), normal(4, 7, seed=1)
    layer.forward = layer.pairwise
    found = torch.func.functional_call(layer, given, (input1, input2))
    exact = other.pairwise(input1, input2)
    assert_matches_reference(found.detach(), exact.detach())
    direction = normal(*exact.shape)
    gradients = torch.autograd.grad(found, (input1, *given.values()), direction)
    for gradient, own in zip(
        gradients, torch.autograd.grad(exact, (input1, *other.parameters()), direction), strict=True
    ):
        assert_matches_reference(gradient, own)


PROJECTED = (CPBilinear, TuckerBilinear)
HOOKS = {
    "forward pre-hook": lambda linear, seen: linear.register_forward_pre_hook(lambda *_: seen.append(1)),
    "forward hook": lambda linear, seen: linear.register_forward_hook(lambda *_: seen.append(1)),
    "backward pre-hook": lambda linear, seen: linear.register_full_backward_pre_hook(lambda *_: seen.append(1)),
    "backward hook": lambda linear, seen: linear.register_full_backward_hook(lambda *_: seen.append(1)),
}


@pytest.mark.parametrize("hook", [*HOOKS, "global", "forward of its own"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in PROJECTED for name in kind.part_names])
def test_a_call_of_few_rows_calls_the_hooks_of_the_inner_layers(kind, name, hook):
    layer = kind(9, 7, 5, rank=3 if kind is CPBilinear else (2, 3, 3))
    input1, input2 = (value.float().requires_grad_() for value in (normal(3, 9), normal(3, 7, seed=1)))
    part, seen = layer.get_submodule(name), []
    handle = None
    if hook == "global":
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    elif hook == "forward of its own":
        own = part.forward
        part.forward = lambda *inputs: seen.append(part) or own(*inputs)
    else:
        HOOKS[hook](part, seen)
    try:
        layer(input1, input2).sum().backward()
    finally:
        if handle is not None:
            handle.remove()
    assert part in seen if hook == "global" else seen


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["in1_proj", "in2_proj", "out_proj"])
def test_pairs_in_blocks_call_the_hooks_of_the_linear_layers(name, hook):
    layer, _ = example()
    input1, input2 = normal(13, 9).requires_grad_(), normal(4, 7, seed=1).requires_grad_()
    seen = []
    HOOKS[hook](layer.get_submodule(name), seen)
    output = layer.pairwise(input1, input2)
    output.sum().backward()
    assert seen
    exact = reference.pairwise_dense(input1, input2, layer.to_dense(), layer.bias)
    assert_matches_reference(output.detach(), exact.detach())


@pytest.mark.usefixtures("small_blocks")
def test_pairs_in_blocks_pass_through_a_wrapped_linear_layer():
    layer, _ = example()
    input1, input2 = normal(13, 9), normal(4, 7, seed=1)
    expected = -layer.pairwise(input1, input2)
    layer.out_proj = nn.Sequential(layer.out_proj, Negative())
    assert_matches_reference(layer.pairwise(input1, input2).detach(), expected.detach())


def elements_saved(call):
    """How many elements the graph of a call keeps for the backward, each once."""
    saved = {}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = call()
    assert output.requires_grad  # and its graph is alive up to here
    return sum(saved.values())


def test_blocks_of_pairs_are_not_kept_for_the_backward():
    layer, _ = example(rank=40)
    input1, input2 = normal(30, 9).requires_grad_(), normal(20, 7, seed=1).requires_grad_()
    product = 30 * 20 * 40
    assert elements_saved(lambda: layer.pairwise(input1, input2)) >= product  # one block is kept
    with use_tuning(Tuning(cp_grad=2000)):
        assert elements_saved(lambda: layer.pairwise(input1, input2)) < product / 4


def test_flops_are_those_of_the_matrix_products_and_one_product_a_component():
    layer, _ = example()
    with FlopCounterMode(display=False) as counter:
        layer(normal(1, 9), normal(1, 7))
    assert layer.flops_per_row == counter.get_total_flops() + layer.rank


@pytest.mark.parametrize("rank", [0, 2.0, (1, 2, 3)])
def test_a_bad_rank_is_an_error(rank):
    with pytest.raises(ConfigError, match=r"positive int\. Found"):
        CPBilinear(9, 7, 5, rank)


def test_steps_of_training_lower_the_loss():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = CPBilinear(9, 7, 5, 6, dtype=torch.float64)
    input1, input2 = normal(64, 9), normal(64, 7, seed=1)
    wanted = reference.bilinear_dense(input1, input2, low_rank((5, 9, 7), 3) / 10)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(input1, input2) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_an_identity_may_take_a_projections_place():
    layer = CPBilinear(4, 5, 3, rank=4)
    layer.in1_proj = nn.Identity()
    input1, input2 = torch.randn(6, 4), torch.randn(6, 5)
    expected = layer.out_proj(input1 * layer.in2_proj(input2))
    assert torch.allclose(layer(input1, input2), expected)
    pairs = layer.pairwise(input1, input2)
    assert torch.allclose(pairs.diagonal().T, expected, atol=1e-6)
