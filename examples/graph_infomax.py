"""The discriminator of Deep Graph Infomax, which tells whether a node belongs to a graph: one matrix, compressed 4x."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import compress_bilinear as cb


class Infomax(nn.Module):
    """Features (N, 64) and a normalised adjacency (N, N) to logits (2N,): true nodes, then shuffled ones.

    The form of Veličković et al., "Deep Graph Infomax" (2019), with one graph convolution.
    """

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.convolution, self.activation = nn.Linear(64, size), nn.PReLU()
        self.discriminator = nn.Bilinear(size, size, 1)

    def encode(self, features: Tensor, adjacency: Tensor) -> Tensor:
        return self.activation(adjacency @ self.convolution(features))

    def forward(self, features: Tensor, shuffled: Tensor, adjacency: Tensor) -> Tensor:
        true, false = self.encode(features, adjacency), self.encode(shuffled, adjacency)
        summary = torch.sigmoid(true.mean(0)).expand_as(true)
        return torch.cat([self.discriminator(nodes, summary) for nodes in (true, false)]).squeeze(1)


def main() -> cb.Report:
    torch.manual_seed(0)
    features = torch.as_tensor(load_digits().data[:400]).float() / 16
    near = torch.cdist(features, features).topk(6, largest=False).indices  # each image and its five nearest
    edges = torch.zeros(400, 400).scatter_(1, near, 1.0)
    adjacency = ((edges + edges.T) > 0).float()
    adjacency = adjacency / adjacency.sum(1, keepdim=True)
    wanted = torch.cat([torch.ones(400), torch.zeros(400)])

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        return features, features[torch.randperm(400)], adjacency

    model = Infomax()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(model(*batch()), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    held_out = batch()

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float(((network(*held_out) > 0) == (wanted > 0)).float().mean())

    config = cb.CPConfig(rank=cb.MaxSize(0.25))  # of one output: a matrix of low rank
    small, report = cb.compress(model, config, calibration=[batch() for _ in range(4)])
    print(report)
    print(f"True nodes told from shuffled ones: {accuracy(model):.4f} before, {accuracy(small):.4f} after")
    return report


if __name__ == "__main__":
    main()
