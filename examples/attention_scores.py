"""Attention scores: every query against every key by an `nn.Bilinear` with out_features=1, without expanding them."""

import torch
from torch import Tensor, nn

import compress_bilinear as cb

COMPRESSED = (cb.CPBilinear, cb.TuckerBilinear, cb.DenseBilinear)


class BilinearAttention(nn.Module):
    """Queries (B, L1, 96) attend to keys (B, L2, 64): (B, L1, 64)."""

    score: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Bilinear(96, 64, 1)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        if isinstance(self.score, COMPRESSED):
            scores = self.score.pairwise(queries, keys).squeeze(-1)
        else:  # all that nn.Bilinear offers
            lengths = queries.shape[0], queries.shape[1], keys.shape[1]
            left = queries.unsqueeze(2).expand(*lengths, -1).contiguous()
            right = keys.unsqueeze(1).expand(*lengths, -1).contiguous()
            scores = self.score(left, right).squeeze(-1)
        return scores.softmax(-1) @ keys


def main() -> cb.Report:
    torch.manual_seed(0)
    model = BilinearAttention().eval()
    with torch.no_grad():  # a trained score is often of low rank; this one is, up to noise
        model.get_parameter("score.weight").copy_(
            torch.randn(1, 96, 8) @ torch.randn(1, 8, 64) + 0.1 * torch.randn(1, 96, 64)
        )
    batches = [(torch.randn(4, 20, 96), torch.randn(4, 30, 64)) for _ in range(4)]
    model, report = cb.compress(model, cb.CPConfig(rank=cb.MaxError(0.05)), calibration=batches)
    print(report)
    assert model(*batches[0]).shape == (4, 20, 64)
    return report


if __name__ == "__main__":
    main()
