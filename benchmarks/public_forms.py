"""Networks in the forms of public projects that do not use `nn.Bilinear`, each trained, compressed 4x and scored.

The code is written anew in each project's form; the weights are trained here.

- biaffine parser: weights (O, I, J) on all pairs, a 1 appended to each input; the `Biaffine` of yzhangcs/parser
  (Dozat and Manning, "Deep biaffine attention for neural dependency parsing", 2017). Sentences are synthetic.
- neural tensor network: a weight (I, J, O) beside a linear map; SimGNN's tensor network module (Bai et al., 2019; after
  Socher et al., "Reasoning with neural tensor networks", 2013). Pairs of scikit-learn's digits: the same one or not?
- grouped bilinear classifier: one flat `nn.Linear` on the products within blocks; ATLOP's (Zhou et al., "Document-level
  relation extraction with adaptive thresholding and localized context pooling", 2021). Two halves of a digit.
- outer-product fusion: one flat `nn.Linear` on the whole outer product of two gated embeddings, a 1 appended to each;
  Pathomic Fusion's of two modalities (Chen et al., 2020; after Zadeh et al., "Tensor fusion network for multimodal
  sentiment analysis", 2017). Two halves of a digit.
- RESCAL: an `nn.Embedding` of d x d relation matrices (Nickel, Tresp, Kriegel, 2011), scored 1-N on PyKEEN's Kinships.

python -m benchmarks.public_forms  # about 40 seconds
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import compress_bilinear as cb
from benchmarks.link_prediction import load_triples, mean_reciprocal_rank
from compress_bilinear.cli._demo import load_digits

CONFIGS: dict[str, cb.DenseConfig | cb.TuckerConfig | cb.CPConfig] = {
    "int8": cb.DenseConfig(quantize="int8"),
    "Tucker int8": cb.TuckerConfig(rank=cb.MaxSize(0.25), quantize="int8"),
    "CP int8": cb.CPConfig(rank=cb.MaxSize(0.25), quantize="int8"),
}


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network, what it takes, and its task's metric (higher is better)."""

    model: nn.Module
    batches: Sequence[tuple[Tensor, ...]]
    metric: Callable[[nn.Module], float]


class Biaffine(nn.Module):
    """s_o(x, y) = [x; 1]ᵀ W_o [y; 1] on all pairs: (B, L, n_in), (B, L, n_in) -> (B, n_out, L, L), or (B, L, L)."""

    def __init__(self, n_in: int, n_out: int = 1, bias_x: bool = True, bias_y: bool = True) -> None:
        super().__init__()
        self.bias_x, self.bias_y = bias_x, bias_y
        self.weight = nn.Parameter(torch.zeros(n_out, n_in + bias_x, n_in + bias_y))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.bias_x:
            x = torch.cat((x, torch.ones_like(x[..., :1])), -1)
        if self.bias_y:
            y = torch.cat((y, torch.ones_like(y[..., :1])), -1)
        return torch.einsum("bxi,oij,byj->boxy", x, self.weight, y).squeeze(1)


class Parser(nn.Module):
    """Words (B, L) to arc scores (B, L, L) and label scores (B, labels, L, L), of each dependent's heads."""

    def __init__(self, words: int, labels: int, width: int = 100) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 64)
        self.arc_dep, self.arc_head, self.label_dep, self.label_head = (
            nn.Sequential(nn.Linear(64, width), nn.LeakyReLU(0.1)) for _ in range(4)
        )
        self.arc = Biaffine(width, 1, True, False)
        self.label = Biaffine(width, labels)

    def forward(self, words: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(words)
        return self.arc(self.arc_dep(x), self.arc_head(x)), self.label(self.label_dep(x), self.label_head(x))


class TensorNetwork(nn.Module):
    """relu(x1ᵀ W x2 + V [x1; x2] + b): (N, F), (N, F) -> (N, K)."""

    def __init__(self, filters: int, neurons: int) -> None:
        super().__init__()
        self.weight_matrix = nn.Parameter(torch.empty(filters, filters, neurons))
        self.weight_matrix_block = nn.Parameter(torch.empty(neurons, 2 * filters))
        self.bias = nn.Parameter(torch.zeros(neurons))
        nn.init.xavier_uniform_(self.weight_matrix)
        nn.init.xavier_uniform_(self.weight_matrix_block)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        scoring = torch.einsum("ni,ijk,nj->nk", x1, self.weight_matrix, x2)
        return torch.relu(scoring + self.block(x1, x2) + self.bias)

    def block(self, x1: Tensor, x2: Tensor) -> Tensor:
        return torch.cat((x1, x2), 1) @ self.weight_matrix_block.T


cb.register_adapter(
    TensorNetwork,
    to_weight=lambda module: module.weight_matrix.permute(2, 0, 1),
    to_bias=lambda module: module.bias,
    call=lambda module, layer, x1, x2: torch.relu(layer(x1, x2) + module.block(x1, x2)),
)


class SameDigit(nn.Module):
    """Two images (N, 64), (N, 64) to the logit (N,) that they show the same digit."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh())
        self.tensor_network = TensorNetwork(32, 16)
        self.scoring = nn.Linear(16, 1)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        scores: Tensor = self.scoring(self.tensor_network(self.encoder(x1), self.encoder(x2)))
        return scores.squeeze(1)


class GroupedBilinear(nn.Module):
    """An `nn.Linear` on the products within blocks: (N, H), (N, H) -> (N, labels)."""

    def __init__(self, size: int, labels: int, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size
        self.bilinear = nn.Linear(size * block_size, labels)

    def forward(self, heads: Tensor, tails: Tensor) -> Tensor:
        b1 = heads.view(-1, heads.shape[1] // self.block_size, self.block_size)
        b2 = tails.view(-1, tails.shape[1] // self.block_size, self.block_size)
        products = (b1.unsqueeze(3) * b2.unsqueeze(2)).view(len(heads), -1)
        logits: Tensor = self.bilinear(products)
        return logits


class PairClassifier(nn.Module):
    """The halves of a digit (N, 32), (N, 32) as head and tail, to class logits (N, 10)."""

    def __init__(self, size: int = 64, block_size: int = 16) -> None:
        super().__init__()
        self.head_extractor, self.tail_extractor = nn.Linear(32, size), nn.Linear(32, size)
        self.classifier = GroupedBilinear(size, 10, block_size)

    def forward(self, heads: Tensor, tails: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.tanh(self.head_extractor(heads)), torch.tanh(self.tail_extractor(tails)))
        return logits


class OuterFusion(nn.Module):
    """A ReLU of an `nn.Linear` on [g(x); 1] ⊗ [g(y); 1], g a gate: (N, in1), (N, in2) -> (N, size)."""

    def __init__(self, in1: int, in2: int, size: int) -> None:
        super().__init__()
        self.gate1, self.gate2 = nn.Linear(in1 + in2, in1), nn.Linear(in1 + in2, in2)
        self.dropout = nn.Dropout(0.1)
        self.encoder = nn.Linear((in1 + 1) * (in2 + 1), size)

    def gated(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((x, y), 1)
        x, y = torch.sigmoid(self.gate1(both)) * x, torch.sigmoid(self.gate2(both)) * y
        one = torch.ones_like(x[:, :1])
        return torch.cat((x, one), 1), torch.cat((y, one), 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.gated(x, y)
        product = torch.bmm(x.unsqueeze(2), y.unsqueeze(1)).flatten(1)
        return torch.relu(self.encoder(self.dropout(product)))


# dropout of the product, which is never written out, is left out: the replacement is for inference
cb.register_adapter(
    OuterFusion,
    to_weight=lambda module: module.encoder.weight.unflatten(
        1, (module.gate1.out_features + 1, module.gate2.out_features + 1)
    ),
    to_bias=lambda module: module.encoder.bias,
    call=lambda module, layer, x, y: torch.relu(layer(*module.gated(x, y))),
)


class TwoHalves(nn.Module):
    """The halves of a digit (N, 32), (N, 32) to class logits (N, 10)."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.top, self.bottom = (nn.Sequential(nn.Linear(32, width), nn.ReLU()) for _ in range(2))
        self.fusion = OuterFusion(width, width, 32)
        self.classifier = nn.Linear(32, 10)

    def forward(self, top: Tensor, bottom: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.fusion(self.top(top), self.bottom(bottom)))
        return logits


class Rescal(nn.Module):
    """h W_r t for every entity t: (N,), (N,) indices of heads and relations -> (N, entities)."""

    def __init__(self, entities: int, relations: int, size: int = 40) -> None:
        super().__init__()
        self.size = size
        self.entities = nn.Embedding(entities, size)
        self.relations = nn.Embedding(relations, size * size)
        self.dropout = nn.Dropout(0.3)
        nn.init.xavier_normal_(self.entities.weight)
        nn.init.xavier_normal_(self.relations.weight)

    def forward(self, heads: Tensor, relations: Tensor) -> Tensor:
        matrices = self.relations(relations).view(-1, self.size, self.size)
        query = torch.bmm(self.dropout(self.entities(heads)).unsqueeze(1), matrices).squeeze(1)
        return query @ self.entities.weight.T


# the tail is the output and the relation the second input, so that a row is looked up by one index
cb.register_adapter(
    Rescal,
    to_weight=lambda module: module.relations.weight.view(-1, module.size, module.size).permute(2, 1, 0),
    call=lambda module, layer, heads, relations: (
        layer.indexed(module.dropout(module.entities(heads)), relations) @ module.entities.weight.T
    ),
)


def _fit(
    model: nn.Module, steps: int, lr: float, loss_of: Callable[[int], Tensor], weight_decay: float = 1e-2
) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def parser() -> Trained:
    """Its metric is the labelled attachment score on 500 new sentences.

    A sentence has ten words of different classes, three words a class. A word's head is the first of its class's three
    favourite classes that is there, otherwise the root; the label depends on both classes.
    """
    classes, synonyms, labels, length = 30, 3, 24, 10
    favourites = torch.stack([torch.randperm(classes - 1)[:3] + 1 for _ in range(classes)])
    label_of = torch.randint(labels, (classes, classes))

    def sentences(count: int) -> tuple[Tensor, Tensor, Tensor]:
        kinds = torch.stack([torch.randperm(classes - 1)[:length] + 1 for _ in range(count)])
        kinds = torch.cat([torch.zeros(count, 1, dtype=torch.long), kinds], 1)  # the root is class 0
        is_favourite = favourites[kinds].unsqueeze(3) == kinds[:, None, None, :]  # (B, dependent, choice, head)
        there = is_favourite.any(3)
        first = is_favourite[torch.arange(count)[:, None], torch.arange(length + 1), there.long().argmax(2)]
        heads = torch.where(there.any(2), first.long().argmax(2), 0)
        words = kinds * synonyms + torch.randint(synonyms, kinds.shape)
        return words, heads, label_of[kinds, kinds.gather(1, heads)]

    model = Parser(classes * synonyms, labels)
    train, test = sentences(4000), sentences(500)

    def loss_of(step: int) -> Tensor:
        words, heads, gold = (part[torch.arange(step * 64, step * 64 + 64) % 4000] for part in train)
        arcs, scores = model(words)
        chosen = scores.permute(0, 2, 3, 1).gather(2, heads[..., None, None].expand(-1, -1, 1, labels)).squeeze(2)
        return nn.functional.cross_entropy(arcs[:, 1:].flatten(0, 1), heads[:, 1:].flatten()) + (
            nn.functional.cross_entropy(chosen[:, 1:].flatten(0, 1), gold[:, 1:].flatten())
        )

    def attachment(network: nn.Module) -> float:
        words, heads, gold = test
        with torch.no_grad():
            arcs, scores = network(words)
        found = arcs.argmax(2)
        label = scores.argmax(1).gather(2, found.unsqueeze(2)).squeeze(2)
        right = (found == heads) & (label == gold)
        return float(right[:, 1:].double().mean())

    _fit(model, 250, 5e-3, loss_of)
    return Trained(model, [(part,) for part in train[0][:512].split(64)], attachment)


def tensor_network() -> Trained:
    """Its metric is the accuracy on pairs of test digits, half of them of the same class."""
    data = load_digits()
    model = SameDigit()

    def pairs(part: tuple[Tensor, Tensor, Tensor], count: int) -> tuple[Tensor, Tensor, Tensor]:
        images, classes = torch.cat(part[:2], 1), part[2]
        first = torch.randint(len(images), (count,))
        same = classes[first, None] == classes
        wanted = torch.rand(count) < 0.5
        second = torch.where(wanted[:, None], same, ~same).double().multinomial(1).squeeze(1)
        return images[first], images[second], wanted.float()

    def loss_of(step: int) -> Tensor:
        x1, x2, same = pairs(data.train, 128)
        return nn.functional.binary_cross_entropy_with_logits(model(x1, x2), same)

    test = pairs(data.test, 4000)

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float(((network(*test[:2]) > 0) == (test[2] > 0)).double().mean())

    _fit(model, 800, 3e-3, loss_of)
    return Trained(model, [pairs(data.train, 128)[:2] for _ in range(8)], accuracy)


def grouped() -> Trained:
    """Its metric is the accuracy on 540 test digits."""
    return _on_digits(PairClassifier())


def outer_product() -> Trained:
    """Its metric is the accuracy on 540 test digits."""
    return _on_digits(TwoHalves())


def _on_digits(model: nn.Module) -> Trained:
    data = load_digits()
    top, bottom, classes = data.train

    def loss_of(step: int) -> Tensor:
        batch = torch.randint(len(classes), (64,))
        return nn.functional.cross_entropy(model(top[batch], bottom[batch]), classes[batch])

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(*data.test[:2]).argmax(1) == data.test[2]).double().mean())

    _fit(model, 600, 3e-3, loss_of)
    return Trained(model, data.batches, accuracy)


def rescal() -> Trained:
    """Its metric is the filtered mean reciprocal rank of the Kinships test triples, in both directions."""
    triples = load_triples()
    model = Rescal(triples.entities, 2 * triples.relations)
    rows = triples.reciprocal(triples.train)
    pairs, pair = rows[:, :2].unique(dim=0, return_inverse=True)
    tails = torch.zeros(len(pairs), triples.entities)
    tails[pair, rows[:, 2]] = 1.0

    def loss_of(step: int) -> Tensor:
        batch = torch.randint(len(pairs), (256,))
        scores = model(pairs[batch, 0], pairs[batch, 1])
        return nn.functional.binary_cross_entropy_with_logits(scores, 0.9 * tails[batch] + 0.1 / triples.entities)

    _fit(model, 1000, 5e-3, loss_of)
    batches = [(part[:, 0], part[:, 1]) for part in pairs.split(256)[:8]]
    return Trained(model, batches, lambda network: mean_reciprocal_rank(network, triples))


NETWORKS: dict[str, Callable[[], Trained]] = {
    "biaffine parser": parser,
    "tensor network": tensor_network,
    "grouped bilinear": grouped,
    "outer-product fusion": outer_product,
    "RESCAL": rescal,
}


def trained(name: str, seed: int = 0) -> Trained:
    """Train one of `NETWORKS`; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name]()


def main() -> None:
    """Print each network's metric before and after each of `CONFIGS`."""
    table = Table("Network", "Layers", "Method", "Bytes", "Output error", "Speedup", "Metric before", "After")
    for name in NETWORKS:
        network = trained(name)
        before = network.metric(network.model)
        for method, config in CONFIGS.items():
            small, report = cb.compress(network.model, config, calibration=network.batches, max_seconds=5)
            worst = max(report.layers, key=lambda layer: layer.output_error or 0.0)
            sizes = sum(x.bytes_before for x in report.layers) / sum(x.bytes_after for x in report.layers)
            row: list[Any] = [name, ", ".join(f"{x.label} {x.shape}" for x in report.layers), method, f"{sizes:.2f}x"]
            row += [f"{worst.output_error:.4f}", " ".join(f"{x.speedup or 0:.2f}x" for x in report.layers)]
            table.add_row(*row, f"{before:.4f}", f"{network.metric(small):.4f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
