"""The label scorer of a biaffine parser is no `nn.Bilinear`. It is recognised by its structure, stored in 8 bits."""

import torch
from torch import Tensor, nn

import compress_bilinear as cb

WORDS, LABELS = 60, 20


class Biaffine(nn.Module):
    """[x; 1]ᵀ W_o [y; 1] for all pairs (Dozat and Manning, 2017): (B, L, 100), (B, L, 100) -> (B, O, L, L)."""

    def __init__(self, size: int, labels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(labels, size + 1, size + 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = (torch.cat([value, torch.ones_like(value[..., :1])], dim=-1) for value in (x, y))
        return torch.einsum("bxi,oij,byj->boxy", x, self.weight, y)


class Labeller(nn.Module):
    """Words (B, L) to the scores of the labels of each dependent and head (B, labels, L, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 64)
        self.dependent = nn.Sequential(nn.Linear(64, 100), nn.LeakyReLU(0.1))
        self.head = nn.Sequential(nn.Linear(64, 100), nn.LeakyReLU(0.1))
        self.biaffine = Biaffine(100, LABELS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words)
        return self.biaffine(self.dependent(x), self.head(x))


def main() -> cb.Report:
    torch.manual_seed(0)
    grammar = torch.randint(LABELS, (WORDS, WORDS))  # the label between two words: what is to be learnt

    def sentences(count: int) -> tuple[Tensor, Tensor]:
        words = torch.randint(WORDS, (count, 12))
        return words, grammar[words.unsqueeze(2), words.unsqueeze(1)]

    model = Labeller()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(250):
        words, labels = sentences(16)
        loss = nn.functional.cross_entropy(model(words), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    words, labels = sentences(100)

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(words).argmax(1) == labels).float().mean())

    small, report = cb.compress(model, cb.DenseConfig(quantize="int8"), calibration=words.split(16))
    print(report)
    print(small.biaffine)  # still a Biaffine; `biaffine.compressed` holds the weight now
    print(f"Labels: {accuracy(model):.4f} before, {accuracy(small):.4f} after")
    return report


if __name__ == "__main__":
    main()
