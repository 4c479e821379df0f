"""Relation scoring on Kinships (TuckER): compressed 16x without labels, then fine-tuned with them for a minute."""

# The triples come with PyKEEN's package: pip install "compress-bilinear[bench]". From the repository's root:
# python -m examples.relation_fine_tuning --size 24 --seed 1

import argparse
import time

import torch
from torch import Tensor, nn

import compress_bilinear as cb
from benchmarks import link_prediction


def fine_tune(model: nn.Module, triples: link_prediction.Triples, seconds: float) -> None:
    """Train all parameters on the training triples, as the network was trained in the first place."""
    pairs, targets = link_prediction.queries(triples)
    rate = 1e-3
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    begun = time.perf_counter()
    model.train()
    while (done := (time.perf_counter() - begun) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - done)
        for batch in torch.randperm(len(pairs)).split(128):
            scores: Tensor = model(pairs[batch, 0], pairs[batch, 1])
            loss = nn.functional.binary_cross_entropy_with_logits(scores, targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def main(size: float = 16, seed: int = 0, seconds: float = 60, epochs: int = link_prediction.EPOCHS) -> cb.Report:
    triples = link_prediction.load_triples()
    model = link_prediction.train(seed, epochs)
    ranks = {"dense": link_prediction.mean_reciprocal_rank(model, triples)}

    heads, relations = link_prediction.queries(triples)[0].T  # what it is asked, without answers
    batches = list(zip(heads.split(256), relations.split(256), strict=True))
    config = cb.TuckerConfig(rank=cb.MaxSize(1 / size), quantize="nf4")
    small, report = cb.compress(model, config, calibration=batches)
    print(report)
    ranks["compressed"] = link_prediction.mean_reciprocal_rank(small, triples)

    chosen = report.layers[0]
    torch.manual_seed(seed)
    trainable = cb.dequantize(small)  # the factors are ordinary parameters again
    fine_tune(trainable, triples, seconds)
    small = cb.quantize(trainable, "nf4")
    ranks["fine-tuned"] = link_prediction.mean_reciprocal_rank(small, triples)
    print(f"The layer is {chosen.bytes_before / chosen.bytes_after:.1f}x smaller. Filtered mean reciprocal rank:")
    print(", ".join(f"{rank:.4f} {name}" for name, rank in ranks.items()))
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=16, help="times smaller")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="of fine-tuning")
    options = parser.parse_args()
    main(options.size, options.seed, options.seconds)
