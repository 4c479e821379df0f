"""Fusion of two views: the halves of a handwritten digit, fused by an `nn.Bilinear`, which is compressed 16x."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import compress_bilinear as cb


class TwoViews(nn.Module):
    """Two views (N, 32), (N, 32) to class logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Sequential(nn.Linear(32, 64), nn.Tanh())
        self.bottom = nn.Sequential(nn.Linear(32, 64), nn.Tanh())
        self.fusion = nn.Bilinear(64, 64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, top: Tensor, bottom: Tensor) -> Tensor:
        return self.head(torch.relu(self.fusion(self.top(top), self.bottom(bottom))))


def main() -> cb.Report:
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(images))
    top, bottom = (images[order].float() / 8 - 1).split(32, dim=1)
    labels = labels[order]
    train, test = slice(0, 1250), slice(1250, None)

    model = TwoViews()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(12):
        for rows in torch.randperm(1250).split(64):
            loss = nn.functional.cross_entropy(model(top[rows], bottom[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(top[test], bottom[test]).argmax(1) == labels[test]).float().mean())

    batches = list(zip(top[train].split(64), bottom[train].split(64), strict=True))  # what it takes, without labels
    config = cb.TuckerConfig(rank=cb.MaxSize(1 / 16), quantize="int8")
    small, report = cb.compress(model, config, calibration=batches)
    print(report)
    print(f"Accuracy: {accuracy(model):.4f} before, {accuracy(small):.4f} after")
    return report


if __name__ == "__main__":
    main()
