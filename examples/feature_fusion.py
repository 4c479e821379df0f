"""Feature fusion: two views of an input, fused by an `nn.Bilinear`, compressed with one call."""

import torch
from torch import Tensor, nn

import compress_bilinear as cb


class Fusion(nn.Module):
    """An image and a text embedding to class logits: (N, 128), (N, 96) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(128, 48)
        self.text = nn.Linear(96, 48)
        self.fuse = nn.Bilinear(48, 48, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.head(torch.relu(self.fuse(self.image(image), self.text(text))))


def main() -> cb.Report:
    torch.manual_seed(0)
    model = Fusion().eval()  # yours comes trained
    batches = [(torch.randn(64, 128), torch.randn(64, 96)) for _ in range(8)]  # unlabelled inputs
    model, report = cb.compress(model, cb.DenseConfig(quantize="int8"), calibration=batches)
    print(report)
    assert model(*batches[0]).shape == (64, 10)
    return report


if __name__ == "__main__":
    main()
