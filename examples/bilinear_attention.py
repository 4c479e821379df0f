"""Bilinear attention: a digit looks for its like among ten others. All pairs are scored without expanding them."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import compress_bilinear as cb


class Attention(nn.Module):
    """Queries (B, L1, 64) and keys (B, L2, 64) to the logits of attention (B, L1, L2)."""

    score: nn.Bilinear | cb.CPBilinear | cb.TuckerBilinear | cb.DenseBilinear

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
        self.score = nn.Bilinear(64, 64, 1, bias=False)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        queries, keys = self.encoder(queries), self.encoder(keys)
        if not isinstance(self.score, nn.Bilinear):  # compressed
            return self.score.pairwise(queries, keys).squeeze(-1)
        pairs = (*queries.shape[:2], keys.shape[1], -1)  # all that nn.Bilinear offers
        left, right = queries.unsqueeze(2).expand(pairs), keys.unsqueeze(1).expand(pairs)
        return self.score(left.contiguous(), right.contiguous()).squeeze(-1)


def main() -> cb.Report:
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images = images.float() / 8 - 1
    of_class = [(labels == digit).nonzero().squeeze(1) for digit in range(10)]

    def batch(count: int) -> tuple[Tensor, Tensor]:
        """An image of each digit as queries and another as keys, in order: query k belongs to key k."""
        chosen = [members[torch.randint(len(members), (count, 2))] for members in of_class]
        indices = torch.stack(chosen, dim=1)
        return images[indices[..., 0]], images[indices[..., 1]]

    model = Attention()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(300):
        logits = model(*batch(8))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(10).repeat(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    queries, keys = batch(100)

    def found(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(queries, keys).argmax(2) == torch.arange(10)).float().mean())

    small, report = cb.compress(model, cb.CPConfig(rank=32, quantize="int8"), calibration=[batch(8) for _ in range(8)])
    print(report)
    print(f"Right key found: {found(model):.4f} before, {found(small):.4f} after")
    return report


if __name__ == "__main__":
    main()
