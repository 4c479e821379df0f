"""Forms that are known by structure, and modules that only seem to have one."""

import forms
import pytest
import torch
from support import assert_matches_reference, assert_same_state, state_of
from torch import nn

from compress_bilinear.errors import InputError
from compress_bilinear.modules import DenseBilinear, adapted_module, recognise

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
    weight = adapted_module(module).bilinear().weight
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
    adapted = adapted_module(module)
    layer = adapted.bilinear()
    inputs = inputs_for(module, name)
    replaced = adapted.replaced({"": DenseBilinear.from_bilinear(layer)})
    assert_matches_reference(replaced(*inputs).detach(), module(*inputs).detach().double(), 10)
    assert_same_state(module, before)
    adapted.verify()


def test_the_odd_sizes_of_parsers_are_kept():
    layer = adapted_module(forms.Biaffine(100, 100, 5)).bilinear()
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
    adapted = adapted_module(module)
    replaced = adapted.replaced({"": DenseBilinear.from_bilinear(adapted.bilinear())})
    with pytest.raises(InputError, match=r"should have 2 dimensions.* Found \(2, 1, 12\)"):
        replaced(torch.randn(2, 1, 12), torch.randn(2, 1, 12))


class Formula(nn.Module):
    """An einsum of two inputs and a weight, times a factor."""

    def __init__(self, equation, *shape, factor=1.0, bias=None, equal=False):
        super().__init__()
        self.equation, self.factor, self.equal = equation, factor, equal
        self.table = nn.Parameter(torch.randn(shape))
        self.register_parameter("offset", None if bias is None else nn.Parameter(torch.randn(bias)))

    def forward(self, x, y):
        assert not self.equal or x.shape[:-1] == y.shape[:-1]
        output = torch.einsum(self.equation, x, self.table, y)
        return (output if self.offset is None else output + self.offset) * self.factor


class LinearFirst(nn.Module):
    """A linear layer of O·J outputs, which are multiplied by the second input; with a 1 last in some."""

    def __init__(self, equation, sizes, bias=False, ones=(False, False)):
        super().__init__()
        self.equation, self.sizes, self.ones = equation, sizes, ones
        self.linear = nn.Linear(6 + ones[0], sizes[0] * sizes[1], bias=bias)

    def forward(self, x, y):
        x, y = (forms.with_one(value) if one else value for value, one in zip((x, y), self.ones, strict=True))
        return torch.einsum(self.equation, self.linear(x).unflatten(-1, self.sizes), y)


class AnySize(LinearFirst):
    """Linear in each input, of which the second may have any size."""

    def __init__(self):
        super().__init__("", (4, 5))

    def forward(self, x, y):
        return self.linear(x) * y.sum(-1, keepdim=True)


class ByNumber(nn.Module):
    """A matrix chosen by a number."""

    def __init__(self, *shape, turned=False, bias=None):
        super().__init__()
        self.matrices, self.turned = nn.Parameter(torch.randn(shape)), turned
        self.register_parameter("offset", None if bias is None else nn.Parameter(torch.randn(bias)))

    def forward(self, x, k):
        matrix = self.matrices[k].mT if self.turned else self.matrices[k]
        output = (x.unsqueeze(-2) @ matrix).squeeze(-2)
        return output if self.offset is None else output + self.offset


def two(*leading, sizes=(6, 5)):
    return tuple(torch.randn(*leading, size) for size in sizes)


OTHERS = {
    "scaled pairs": (Formula("bxi,oij,byj->boxy", 4, 6, 5, factor=0.25), two(2, 3)),
    "scaled rows": (Formula("ni,ijo,nj->no", 6, 5, 4, factor=6**-0.5), two(7)),
    "scaled with a bias": (Formula("ni,oij,nj->no", 4, 6, 5, factor=-3.0, bias=4), two(7)),
    "equal lengths": (Formula("bxi,oij,byj->bxyo", 4, 6, 5, equal=True), (torch.randn(2, 3, 6), torch.randn(2, 3, 5))),
    "equal sizes and lengths": (Formula("bxi,oij,byj->byxo", 4, 5, 5, equal=True), two(2, 3, sizes=(5, 5))),
    "a matrix, pairs": (Formula("bxi,ij,byj->bxy", 6, 5), two(2, 3)),
    "a matrix, pairs turned": (Formula("bxi,ji,byj->byx", 5, 6), two(2, 3)),
    "a matrix, rows": (Formula("ni,ij,nj->n", 6, 5), two(7)),
    "a matrix with a bias": (Formula("bxi,ij,byj->bxy", 6, 5, bias=1), two(2, 3)),
    "linear first, pairs": (LinearFirst("bxoj,byj->boxy", (4, 5)), two(2, 3)),
    "linear first, outputs last": (LinearFirst("bxjo,byj->bxyo", (5, 4)), two(2, 3)),
    "linear first, rows": (LinearFirst("noj,nj->no", (4, 5)), two(7)),
    "linear first, with a bias": (LinearFirst("bxoj,byj->boxy", (4, 5), bias=True), two(2, 3)),
    "linear first, rows with a bias": (LinearFirst("njo,nj->no", (5, 4), bias=True), two(7)),
    "linear first, one output and a bias": (LinearFirst("noj,nj->no", (1, 5), bias=True), two(7)),
    "linear first, ones": (LinearFirst("bxoj,byj->boxy", (4, 6), ones=(True, True)), two(2, 3)),
    "linear first, a one and a bias": (LinearFirst("bxoj,byj->boxy", (4, 6), bias=True, ones=(False, True)), two(2, 3)),
    "one bias for all outputs": (Formula("bxi,oij,byj->boxy", 4, 6, 5, bias=1), two(2, 3)),
    "one bias for all outputs, scaled": (Formula("ni,oij,nj->no", 4, 6, 5, bias=1, factor=0.5), two(7)),
    "by number": (ByNumber(8, 6, 4), (torch.randn(7, 6), torch.randint(8, (7,)))),
    "by number, turned": (ByNumber(8, 4, 6, turned=True), (torch.randn(7, 6), torch.randint(8, (7,)))),
    "by number, with a bias": (ByNumber(8, 6, 4, bias=4), (torch.randn(7, 6), torch.randint(8, (7,)))),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_ways_to_write_a_form_are_recognised_and_reproduced(case):
    module, inputs = OTHERS[case]
    module.double()
    inputs = [value.double() if value.is_floating_point() else value for value in inputs]
    adapted = adapted_module(module)
    assert adapted is not None
    adapted.verify()
    replaced = adapted.replaced(memo={})
    assert_matches_reference(replaced(*inputs).detach(), module(*inputs).detach(), 10)


@pytest.mark.parametrize(
    "module",
    [
        AnySize(),
        Formula("bxi,oij,byj->boxy", 4, 6, 5, factor=0.0),
        nn.ModuleList([nn.Linear(6, 20)]),
    ],
)
def test_what_only_seems_to_be_one_is_not(module):
    assert recognise(module) is None


def test_a_large_table_is_not_tried(monkeypatch):
    table = Formula("bxi,ij,byj->bxy", 1, 1)
    table.table = nn.Parameter(torch.empty(2**12, 2**11, device="meta"))
    assert recognise(table) is None
