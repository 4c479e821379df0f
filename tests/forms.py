"""Small modules that carry a bilinear weight in other forms than `nn.Bilinear`'s, and some that only seem to."""

import torch
from torch import Tensor, nn


class Biaffine(nn.Module):
    """The form of yzhangcs/parser: (O, I + 1, J + 1), all pairs, outputs before the pairs."""

    def __init__(self, in1, in2, out, ones=(True, True)):
        super().__init__()
        self.ones = ones
        self.weight = nn.Parameter(torch.randn(out, in1 + ones[0], in2 + ones[1]))

    def forward(self, x, y):
        x, y = (with_one(value) if one else value for value, one in zip((x, y), self.ones, strict=True))
        return torch.einsum("bxi,oij,byj->boxy", x, self.weight, y).squeeze(1)


class PairwiseBilinear(nn.Module):
    """The form of Stanza's parser: (I, J, O) and a bias, all pairs, outputs last."""

    def __init__(self, in1, in2, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in1, in2, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, input1, input2):
        return torch.einsum("bxi,ijo,byj->bxyo", input1, self.weight, input2) + self.bias


class MiddleOutput(nn.Module):
    """(I, O, J), outputs between the pairs, as the first biaffine parsers had it."""

    def __init__(self, in1, in2, out):
        super().__init__()
        self.U = nn.Parameter(torch.randn(in1, out, in2))

    def forward(self, x, y):
        return torch.einsum("bxi,ioj,byj->bxoy", x, self.U, y)


class Rows(nn.Module):
    """(I, J, O), pair by pair."""

    def __init__(self, in1, in2, out):
        super().__init__()
        self.W = nn.Parameter(torch.randn(in1, in2, out))

    def forward(self, a, b):
        return torch.einsum("ni,ijo,nj->no", a, self.W, b)


class Grouped(nn.Module):
    """One flat `nn.Linear` on the products within blocks."""

    def __init__(self, size, out, block):
        super().__init__()
        self.block = block
        self.linear = nn.Linear(size * block, out)

    def forward(self, x, y):
        x, y = (value.view(len(value), -1, self.block) for value in (x, y))
        return self.linear((x.unsqueeze(3) * y.unsqueeze(2)).flatten(1))


class Flat(nn.Module):
    """One flat `nn.Linear` on the whole product, whose sizes it alone does not tell."""

    def __init__(self, in1, in2, out):
        super().__init__()
        self.sizes = in1, in2
        self.fc = nn.Linear(in1 * in2, out)

    def forward(self, x, y):
        return self.fc((x.unsqueeze(2) * y.unsqueeze(1)).flatten(1))


class Relu(Rows):
    def forward(self, a, b):
        return super().forward(a, b).relu()


class Dropped(Rows):
    def forward(self, a, b):
        return super().forward(nn.functional.dropout(a, 0.5, self.training), b)


class Clamped(Rows):
    def forward(self, a, b):
        return super().forward(a, b).clamp(-1e4, 1e4)


class Squeezed(Rows):
    def forward(self, a, b):
        return super().forward(a, b).squeeze()


class Masked(Rows):
    def forward(self, a, b, mask=None):
        return super().forward(a, b) if mask is None else super().forward(a, b) * mask


class Noisy(Rows):
    def forward(self, a, b):
        return super().forward(a, b) + 1e-6 * torch.randn(len(a), 1)


class Diagonal(Rows):
    def forward(self, a, b):
        return super().forward(a, a) if a.shape == b.shape else super().forward(a, b)


def with_one(value: Tensor) -> Tensor:
    return torch.cat([value, torch.ones_like(value[..., :1])], -1)
