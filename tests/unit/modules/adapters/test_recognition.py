"""Forms that are known by structure, and modules that only seem to have one."""

import forms
import pytest
import torch
from support import assert_matches_reference, assert_same_state, state_of
from torch import nn

from compress_bilinear.errors import InputError
from compress_bilinear.modules import DenseBilinear, adapted_layer, recognise

PAIRS, ROWS = (2, 3, 4), (5,)

# module, the form's name, its weight (O, I, J), inputs
KNOWN = {
    "ones in both": (lambda: forms.Biaffine(6, 4, 3), "pairs oij -> oxy, 1 last in input1, 1 last in input2"),
    "ones in one": (lambda: forms.Biaffine(6, 6, 3, (True, False)), "pairs oij -> oxy, 1 last in input1"),
    "no ones": (lambda: forms.Biaffine(3, 3, 3, (False, False)), "pairs oij -> oxy"),
    "arcs": (lambda: forms.Biaffine(7, 7, 1, (True, False)), "pairs oij -> xy, 1 last in input1"),
    "outputs last": (lambda: forms.PairwiseBilinear(5, 6, 4), "pairs ijo -> xyo"),
    "cube": (lambda: forms.PairwiseBilinear(4, 4, 4), "pairs ijo -> xyo"),
    "outputs between": (lambda: forms.MiddleOutput(5, 6, 4), "pairs ioj -> xoy"),
    "rows": (lambda: forms.Rows(5, 7, 3), "rows ijo -> o"),
    "a size of one": (lambda: forms.Rows(5, 1, 3), "rows ijo -> o"),
    "several readings of the same": (lambda: forms.Rows(3, 1, 1), "rows ioj -> o"),
    "blocks": (lambda: forms.Grouped(12, 5, 4), "blocks of 4 o(kij) -> o"),
}


def inputs_for(module, name):
    weight = adapted_layer(module).bilinear().weight
    sizes = [weight.shape[1] - ("in input1" in name), weight.shape[2] - ("in input2" in name)]
    if name.startswith("blocks"):
        sizes = [weight.shape[1]] * 2
    if name.startswith("pairs"):
        return torch.randn(2, 3, sizes[0]), torch.randn(2, 4, sizes[1])
    return torch.randn(5, sizes[0]), torch.randn(5, sizes[1])


@pytest.mark.parametrize("case", KNOWN)
def test_known_forms_are_recognised_and_reproduced(case):
    torch.manual_seed(0)
    make, name = KNOWN[case]
    module = make()
    before = state_of(module)
    form = recognise(module)
    assert form is not None
    assert form.name == name
    adapted = adapted_layer(module)
    layer = adapted.bilinear()
    inputs = inputs_for(module, name)
    replaced = adapted.replaced(DenseBilinear.from_bilinear(layer))
    assert_matches_reference(replaced(*inputs).detach(), module(*inputs).detach().double(), 10)
    assert_same_state(module, before)
    adapted.verify()


def test_the_odd_sizes_of_parsers_are_kept():
    layer = adapted_layer(forms.Biaffine(100, 100, 5)).bilinear()
    assert (layer.out_features, layer.in1_features, layer.in2_features) == (5, 101, 101)


@pytest.mark.parametrize(
    "make",
    [
        lambda: forms.Relu(7, 5, 3),
        lambda: forms.Dropped(7, 5, 3),
        lambda: forms.Clamped(7, 5, 3),
        lambda: forms.Squeezed(7, 5, 3),
        lambda: forms.Squeezed(7, 5, 1),
        lambda: forms.Masked(7, 5, 3),
        lambda: forms.Noisy(7, 5, 3),
        lambda: forms.Diagonal(7, 7, 3),
        lambda: forms.Flat(6, 4, 3),
        lambda: nn.Conv1d(5, 5, 3),
        lambda: nn.Embedding(9, 16),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.Bilinear(4, 4, 4),
    ],
)
def test_what_does_anything_else_is_not_recognised(make):
    torch.manual_seed(0)
    assert recognise(make()) is None


def test_recognition_does_not_look_at_values_and_leaves_the_random_state():
    module = forms.PairwiseBilinear(5, 6, 4)
    with torch.device("meta"):
        empty = forms.PairwiseBilinear(5, 6, 4)
    nn.init.zeros_(module.weight)  # every form would give the same outputs
    state = torch.get_rng_state()
    assert recognise(module) == recognise(empty)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_module_itself_is_never_called():
    class Counting(forms.Rows):
        calls = 0

        def forward(self, a, b):
            self.calls += 1
            return super().forward(a, b)

    module = Counting(4, 3, 2)
    assert recognise(module) is not None
    assert module.calls == 0


def test_inputs_of_dimensions_that_were_not_compared_are_an_error():
    module = forms.Grouped(12, 5, 4)  # which merges more leading dimensions into the blocks
    adapted = adapted_layer(module)
    replaced = adapted.replaced(DenseBilinear.from_bilinear(adapted.bilinear()))
    with pytest.raises(InputError, match=r"should have 2 dimensions.* Found \(2, 1, 12\)"):
        replaced(torch.randn(2, 1, 12), torch.randn(2, 1, 12))
