"""Modules of no known form that may hold a bilinear weight: `Report.unknown` names them, with the line to write."""

import itertools

import pytest
import torch
from forms import Flat, with_one
from torch import nn

import compress_bilinear as cb
from compress_bilinear.modules.adapters import unknown_forms


class Two(nn.Module):
    """What `compute(module, x, y)` gives, of named parts or parameters."""

    def __init__(self, compute, **parts):
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.randn(part)) if isinstance(part, tuple) else part)

    def forward(self, x, y):
        return self.compute(self, x, y)


class Optional(Two):
    def forward(self, x, y, scale=1.0):
        return scale * self.compute(self, x, y)


class Places(nn.Module):
    """What has places of (1, N, d) and takes one input."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, 7, 6))

    def forward(self, x):
        return x + self.places


class Fields(nn.Module):
    """Each pair of fields has a matrix of its own: (N, F, d) -> (N, pairs, d)."""

    def __init__(self, fields=5, size=6, square=False):
        super().__init__()
        self.pairs, self.square = list(itertools.combinations(range(fields), 2)), square
        self.matrices = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in self.pairs)

    def forward(self, x):
        fields = torch.split(x, 1, dim=1)
        terms = [(linear(fields[i]), fields[j]) for linear, (i, j) in zip(self.matrices, self.pairs, strict=True)]
        return torch.cat([left.relu().square() if self.square else left * right for left, right in terms], 1)


class OuterProductMean(nn.Module):
    def __init__(self, size=20, hidden=8, out=12):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.left, self.right, self.out = nn.Linear(size, hidden), nn.Linear(size, hidden), nn.Linear(hidden**2, out)

    def forward(self, m):
        left, right = self.left(self.norm(m)), self.right(self.norm(m))
        return self.out(torch.einsum("sic,sjd->ijcd", left, right).flatten(-2)) / len(m)


class Relations(nn.Module):
    def __init__(self):
        super().__init__()
        self.entities, self.relations = nn.Embedding(30, 6), nn.Embedding(5, 36)

    def forward(self, heads, relations):
        return self.relations(relations).view(-1, 6, 6) @ self.entities(heads).unsqueeze(-1)


class Blocks(nn.Module):
    """A grouped classifier beside what makes its inputs."""

    def __init__(self):
        super().__init__()
        self.block = 4
        self.left, self.right, self.bilinear = nn.Linear(9, 6), nn.Linear(9, 6), nn.Linear(24, 3)

    def forward(self, x):
        return x


TOLD = {
    "a matrix beside a linear term": (
        Two(lambda m, x, y: x @ m.W @ y.mT + m.u(y).mT, W=(6, 5), u=nn.Linear(5, 1)),
        "computes with products of its two inputs, of sizes 6 and 5, and has `W` (6x5)",
        "module.W.view(-1, 6, 5)",
    ),
    "a matrix, then a product": (Two(lambda m, x, y: x @ m.W * y, W=(6, 6)), "`W` (6x6)", "module.W.view(-1, 6, 6)"),
    "with another argument": (
        Optional(lambda m, x, y: x @ m.W @ y.mT, W=(6, 5)),
        "and 5, and has `W` (6x5)",
        "x, y, scale: ...",
    ),
    "ones and a matrix in parts": (
        Two(lambda m, x, y: with_one(x) @ torch.cat([m.a, m.b]) @ y.mT, a=(6, 5), b=(1, 5)),
        "of sizes 6 and 5, and has `a` (6x5)",
        "lambda module, layer, x, y: ...",
    ),
    "a whole outer product": (
        Flat(6, 4, 3),
        "of sizes I and J, and has `fc.weight` (3x24)",
        "module.fc.weight.view(-1, I, J)",
    ),
    "a linear layer on the second input": (
        Two(lambda m, x, y: torch.einsum("noi,ni->no", m.fc(y).view(-1, 3, 6), x), fc=nn.Linear(4, 18)),
        "of sizes I and J, and has `fc.weight` (18x4)",
        "module.fc.weight.view(-1, I, J)",
    ),
    "a list of linear layers": (
        Two(
            lambda m, x, y: torch.stack([(each(x) * y).sum(-1) for each in m.fc], -1),
            fc=nn.ModuleList([nn.Linear(6, 5, bias=False) for _ in range(3)]),
        ),
        "of sizes 6 and 5, and has `fc.0.weight` (5x6)",
        "module.get_parameter('fc.0.weight')",
    ),
    "an outer product summed before its weight": (
        Two(lambda m, x, y: m.fc(torch.einsum("sic,sjd->ijcd", x, y).flatten(-2)), fc=nn.Linear(24, 3)),
        "of sizes I and J, and has `fc.weight` (3x24)",
        "module.fc.weight.view(-1, I, J)",
    ),
    "the same of one input": (
        OuterProductMean(),
        "`out.weight` (12x64), with a column for each of 8 x 8 products",
        "module.out.weight.view(-1, 8, 8), call=lambda module, layer, m: ...",
    ),
    "a table of matrices": (
        Relations(),
        "`relations.weight` (5x36), with a column for each of 6 x 6 products",
        "(-1, 6, 6)",
    ),
    "of other parts, with ones": (
        Two(
            lambda m, x, y: x,
            a=nn.Sequential(nn.Linear(9, 5), nn.ReLU()),
            b=nn.Linear(9, 6),
            out=nn.Sequential(nn.Linear(42, 3)),
        ),
        "has `out.0.weight` (3x42), with a column for each of 7 x 6 products",
        "module.get_parameter('out.0.weight').view(-1, 7, 6)",
    ),
    "within blocks of a stated size": (
        Blocks(),
        "has `bilinear.weight` (3x24), with a column for each of 6 x 4 products",
        "module.bilinear.weight.view(-1, 6, 4)",
    ),
    "one output and an activation": (
        Two(lambda m, x, y: torch.einsum("ni,oij,nj->no", x, m.W, y).tanh(), W=(1, 6, 5)),
        "`W` (1x6x5), of 3",
        "module.W, call",
    ),
    "a matrix and an activation": (
        Two(lambda m, x, y: (x @ m.W @ y.mT).sigmoid(), W=(6, 5)),
        "products of its two inputs, of sizes 6 and 5, and has `W` (6x5)",
        "module.W.view(-1, 6, 5)",
    ),
    "an outer product and an activation": (
        Two(lambda m, x, y: m.fc((x.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2)).relu(), fc=nn.Linear(24, 3)),
        "of sizes I and J, and has `fc.weight` (3x24)",
        "module.fc.weight.view(-1, I, J)",
    ),
    "four axes": (
        Two(lambda m, x, y: torch.einsum("ni,goij,nj->ngo", x, m.W, y), W=(2, 3, 6, 5)),
        "`W` (2x3x6x5), of 4",
        "",
    ),
    "an activation": (
        Two(lambda m, x, y: torch.einsum("ni,oij,nj->no", x, m.W, y).tanh(), W=(3, 6, 5)),
        "`W` (3x6x5), of 3",
        "",
    ),
    "a list of weights": (
        Two(lambda m, x, y: x, W=nn.ParameterList([torch.randn(3, 6, 5)])),
        "has `W.0` (3x6x5), of 3 axes",
        "module.get_parameter('W.0')",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_may_be_bilinear_is_named_with_the_line_to_write(case):
    module, what, line = TOLD[case]
    planned = cb.plan(
        nn.ModuleDict({"part": module, "known": nn.Bilinear(4, 4, 4)}),
        cb.DenseConfig(quantize="int8"),
        progress=False,
        measure_latency=False,
    )
    (told,) = planned.report.unknown
    assert told.startswith(f"part ({type(module).__name__}) ")
    assert what in told
    assert f"write cb.register_adapter({type(module).__name__}, to_weight=lambda module: " in told
    assert line in told


@pytest.mark.parametrize(
    "module",
    [
        Two(lambda m, x, y: m.a(x) + m.a(y), a=nn.Linear(6, 6)),
        Two(lambda m, x, y: m.a(torch.cat([x, y], -1)), a=nn.Linear(12, 6)),
        Two(lambda m, x, y: (m.q(x) @ m.q(y).mT).softmax(-1) @ y, q=nn.Linear(6, 6)),
        Two(lambda m, x, y: nn.functional.normalize(x @ m.W, dim=-1) * nn.functional.normalize(y, dim=-1), W=(6, 6)),
        Two(lambda m, x, y: torch.cdist(x @ m.W, y), W=(6, 6)),
        Two(lambda m, x, y: m.c(m.a(x) * m.b(y)), a=nn.Linear(6, 2), b=nn.Linear(6, 2), c=nn.Linear(2, 6)),  # a CP
        Two(lambda m, x, y: m.d(m.a(x)), a=nn.Linear(16, 4), d=nn.Linear(4, 16)),
        Two(lambda m, x, y: x, a=nn.Linear(36, 6), b=nn.Linear(36, 6), c=nn.Linear(36, 3)),  # heads
        Two(lambda m, x, y: x, q=nn.Linear(9, 36), k=nn.Linear(9, 6), out=nn.Linear(36, 9)),
        Two(lambda m, x, y: x + m.place, place=(1, 1, 6)),
        Places(),
        nn.Conv1d(3, 3, 3),
        nn.MultiheadAttention(8, 2),
    ],
)
def test_what_is_not_bilinear_or_stores_no_weight_of_one_is_not_named(module):
    assert unknown_forms(nn.ModuleDict({"part": module}), []) == []


def test_each_of_several_weights_is_named():
    module = Two(lambda m, x, y: x, up=(3, 6, 5), down=(3, 5, 6), scale=(6,))
    assert [told.split("`")[1] for told in unknown_forms(module, [])] == ["up", "down"]


def test_modules_that_are_alike_share_a_sentence():
    relu, others = [Two(lambda m, x, y: x, W=(3, 6, 5)) for _ in range(2)], Two(lambda m, x, y: x, W=(3, 6, 6))
    told = unknown_forms(nn.ModuleList([*relu, others]), [])
    assert [sentence.split(" has ")[0] for sentence in told] == ["0, 1 (Two)", "2 (Two)"]


def test_what_is_known_or_inside_of_it_is_not_named():
    module = OuterProductMean()
    assert unknown_forms(nn.ModuleDict({"part": module}), [module]) == []


def test_neither_the_module_nor_the_random_state_nor_a_default_is_touched():
    calls = []
    module = Two(lambda m, x, y: calls.append(m is module) or x @ m.W @ y.mT + y.sum(), W=(6, 5))
    state = torch.get_rng_state()
    with torch.device("meta"):
        assert len(unknown_forms(module, [])) == 1
    assert calls
    assert not any(calls)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_module_that_cannot_be_copied_or_has_no_shapes_is_left_out():
    class Fixed(Two):
        def __deepcopy__(self, memo):
            raise TypeError("not this one")

    assert unknown_forms(Fixed(lambda m, x, y: x @ m.W @ y.mT + 1, W=(6, 5)), []) == []
    assert unknown_forms(Two(lambda m, x, y: m.a(x) * y, a=nn.LazyLinear(6)), []) == []


def test_matrices_of_pairs_of_fields_are_named_with_the_line_to_write():
    (told,) = unknown_forms(nn.Sequential(Fields()), [])
    assert "0 (Fields) computes with products of parts of its input, and has `matrices.0.weight` (6x6) and 9" in told
    assert "to_weight=lambda module: torch.stack([part.weight for part in module.matrices], -1), call=" in told
    assert unknown_forms(nn.Sequential(Fields(square=True)), []) == []
