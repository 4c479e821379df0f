"""A trained bilinear weight from a public task: a TuckER link predictor on the Kinships triples.

Model and training follow TuckER (Balažević, Allen, Hospedales, EMNLP 2019): a relation turns an entity into a query,
here by an `nn.Bilinear`, that is scored against all entities; reciprocal relations; 1-N binary cross-entropy. The
triples (104 people, 25 relations) are read from the installed package files of PyKEEN, which itself is not imported.

python -m benchmarks.link_prediction  # train, print the test set's filtered mean reciprocal rank
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

ENTITY_DIM, RELATION_DIM = 64, 24
EPOCHS = 120
_BATCH = 128
_SMOOTHING = 0.1


@dataclass(frozen=True, eq=False)
class Triples:
    """Rows of (head, relation, tail) as indices, (N, 3) each; relations do not include the reciprocal ones."""

    train: Tensor
    valid: Tensor
    test: Tensor
    entities: int
    relations: int

    def reciprocal(self, part: Tensor) -> Tensor:
        """`part` followed by its triples reversed: (head, r, tail) becomes (tail, r + relations, head)."""
        head, relation, tail = part.T
        return torch.cat([part, torch.stack([tail, relation + self.relations, head], 1)])


class TuckER(nn.Module):
    """Scores of all entities as tails: (N,), (N,) indices of heads and relations -> (N, entities)."""

    def __init__(self, entities: int, relations: int) -> None:
        super().__init__()
        self.entities = nn.Embedding(entities, ENTITY_DIM)
        self.relations = nn.Embedding(2 * relations, RELATION_DIM)
        self.fusion = nn.Bilinear(ENTITY_DIM, RELATION_DIM, ENTITY_DIM, bias=False)
        self.input_norm, self.output_norm = nn.BatchNorm1d(ENTITY_DIM), nn.BatchNorm1d(ENTITY_DIM)
        self.input_dropout, self.output_dropout = nn.Dropout(0.3), nn.Dropout(0.4)
        self.bias = nn.Parameter(torch.zeros(entities))
        nn.init.xavier_normal_(self.entities.weight)
        nn.init.xavier_normal_(self.relations.weight)

    def forward(
        self,
        heads: Tensor,  # (N,)
        relations: Tensor,  # (N,)
    ) -> Tensor:  # (N, entities)
        head = self.input_dropout(self.input_norm(self.entities(heads)))
        query = self.fusion(head, self.relations(relations))
        query = self.output_dropout(self.output_norm(query))
        scores: Tensor = query @ self.entities.weight.T + self.bias
        return scores


def load_triples() -> Triples:
    """Read the Kinships triples. Raises: SystemExit where PyKEEN's files are not installed."""
    try:
        folder = Path(str(distribution("pykeen").locate_file("pykeen/datasets/kinships")))
        texts = [(folder / f"{part}.txt").read_text(encoding="utf-8") for part in ("train", "valid", "test")]
    except (PackageNotFoundError, OSError) as cause:
        raise SystemExit(
            "The Kinships triples come with PyKEEN's package. Found none: pip install 'compress-bilinear[bench]'."
        ) from cause
    parts = [[line.split("\t") for line in text.splitlines()] for text in texts]
    rows = [row for part in parts for row in part]
    entity = {name: k for k, name in enumerate(sorted({name for head, _, tail in rows for name in (head, tail)}))}
    relation = {name: k for k, name in enumerate(sorted({row[1] for row in rows}))}
    train, valid, test = (torch.tensor([[entity[h], relation[r], entity[t]] for h, r, t in part]) for part in parts)
    return Triples(train, valid, test, len(entity), len(relation))


def queries(triples: Triples) -> tuple[Tensor, Tensor]:
    """The (head, relation) pairs of the training set (N, 2), and for each the smoothed targets (N, entities)."""
    rows = triples.reciprocal(triples.train)
    pairs, pair = rows[:, :2].unique(dim=0, return_inverse=True)
    tails = torch.zeros(len(pairs), triples.entities)
    tails[pair, rows[:, 2]] = 1.0
    return pairs, (1 - _SMOOTHING) * tails + _SMOOTHING / triples.entities


def train(seed: int = 0, epochs: int = EPOCHS, progress: bool = False) -> TuckER:
    """Train by Adam on all (head, relation) pairs of the training set; the caller's random state is left alone."""
    triples = load_triples()
    pairs, targets = queries(triples)
    console = Console(stderr=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TuckER(triples.entities, triples.relations)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in track(range(epochs), "Training", console=console, transient=True, disable=not progress):
            for batch in torch.randperm(len(pairs)).split(_BATCH):
                scores = model(pairs[batch, 0], pairs[batch, 1])
                loss = nn.functional.binary_cross_entropy_with_logits(scores, targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    return model.eval()


def metrics(model: nn.Module, triples: Triples) -> dict[str, float]:
    """Of the test triples, in both directions, filtered: other entities known to be right are not counted.

    Returns:
        "mrr", the mean reciprocal rank, and "hits@1", the share of rank 1. Of equal scores the mean rank is taken.
    """
    known = torch.zeros(2 * triples.relations, triples.entities, triples.entities, dtype=torch.bool)
    for part in (triples.train, triples.valid, triples.test):
        head, relation, tail = triples.reciprocal(part).T
        known[relation, head, tail] = True
    head, relation, tail = triples.reciprocal(triples.test).T
    with torch.no_grad():
        scores = model(head, relation)
    own = scores.gather(1, tail[:, None])
    others = scores.masked_fill(known[relation, head], -torch.inf)
    rank = 1 + (others > own).sum(1) + (others == own).sum(1) / 2
    return {"mrr": float((1 / rank.double()).mean()), "hits@1": float((rank == 1).double().mean())}


def mean_reciprocal_rank(model: nn.Module, triples: Triples) -> float:
    """The "mrr" of `metrics`."""
    return metrics(model, triples)["mrr"]


def main() -> None:
    """Train and print the filtered mean reciprocal rank on the test set."""
    print(f"Filtered MRR on the test set: {mean_reciprocal_rank(train(progress=True), load_triples()):.4f}")


if __name__ == "__main__":
    main()
