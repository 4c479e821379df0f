"""Experts, y = x W_k: a layer with one matrix for each of the ways in which an image is turned, compressed 8x."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import compress_bilinear as cb


class Experts(nn.Module):
    """Rows (N, I), each times the matrix of its expert: an index (N,) in 0..J − 1. To (N, O).

    The form of mixtures of experts, and of R-GCN (Schlichtkrull et al. 2018) with relations for experts. It is a
    bilinear layer whose second input is one-hot, and recognised by its structure.
    """

    def __init__(self, experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, in_features, out_features) / in_features**0.5)

    def forward(self, rows: Tensor, expert: Tensor) -> Tensor:
        return torch.einsum("ni,nio->no", rows, self.weight[expert])


class Turned(nn.Module):
    """Images (N, 64) and how they are turned (N,), in 0..7, to class logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts(8, 64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor, turn: Tensor) -> Tensor:
        return self.head(torch.relu(self.experts(images, turn)))


def turned(images: Tensor, turn: Tensor) -> Tensor:
    """Each image turned by a multiple of 90 degrees, and mirrored from 4 on."""
    square = images.unflatten(1, (8, 8))
    ways = [torch.rot90(side, quarter, (1, 2)) for side in (square, square.flip(2)) for quarter in range(4)]
    return torch.stack(ways)[turn, torch.arange(len(turn))].flatten(1)


def main() -> cb.Report:
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order, turn = torch.randperm(len(images)), torch.randint(0, 8, (len(images),))
    images, labels = turned(images[order].float() / 8 - 1, turn), labels[order]
    train, test = slice(0, 1250), slice(1250, None)

    model = Turned()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(40):
        for rows in torch.randperm(1250).split(64):
            loss = nn.functional.cross_entropy(model(images[rows], turn[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(images[test], turn[test]).argmax(1) == labels[test]).float().mean())

    batches = list(zip(images[train].split(64), turn[train].split(64), strict=True))  # without labels
    small, report = cb.compress(model, cb.AutoConfig(size=1 / 8), calibration=batches)
    print(report)
    print(f"Accuracy: {accuracy(model):.4f} before, {accuracy(small):.4f} after")
    return report


if __name__ == "__main__":
    main()
