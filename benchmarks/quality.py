"""What compression costs the task: metrics against bytes, on networks trained from scratch on real data.

python -m benchmarks.quality            # three seeds of both networks; about half an hour on two cores
python -m benchmarks.quality kinships --seeds 0  # only this one; other rows stay
python -m benchmarks.quality --quick    # a barely trained network at one size, under a minute

By hand: the weight in 8 or 4 bits; TensorLy's Tucker and CP of the weight, and an SVD of each output's slice, all in
the layer's own dtype. Ours: automatic plans, fitted to the layer's outputs on the training inputs, without labels.
Writes results/quality_cpu.csv and .png: one row for each network, seed, method and size.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorly
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tensorly.decomposition import parafac
from tensorly.decomposition import tucker as tensorly_tucker
from torch import Tensor, nn

import compress_bilinear as cb
from benchmarks import link_prediction
from benchmarks.quality_plot import plot
from benchmarks.rows import write
from compress_bilinear.cli import _demo as demo
from compress_bilinear.decomposition import tucker_parameters
from compress_bilinear.fitting import environment, stored_bytes

RESULTS = Path(__file__).parent / "results"
SIZES = (4, 8, 12, 16, 24, 32, 48)
REFINED = (16, 24)
"""Sizes at which the network is trained to its own outputs too, for `REFINE_SECONDS`."""
ERRORS = (0.1, 0.2)
REFINE_SECONDS = 60.0


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network, its inputs for calibration, and its metrics on test data; the layer is `fusion`."""

    name: str
    model: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]
    metrics: Callable[[nn.Module], dict[str, float]]


def kinships(seed: int, epochs: int = link_prediction.EPOCHS) -> Network:
    """TuckER on Kinships: filtered mean reciprocal rank and Hits@1."""
    triples = link_prediction.load_triples()
    model = link_prediction.train(seed, epochs)
    pairs = triples.reciprocal(triples.train)[:, :2].unique(dim=0)
    # as a data loader gives them: sorted, a batch that is held out would have heads that no fit has seen
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))]
    batches = list(zip(pairs[:, 0].split(256), pairs[:, 1].split(256), strict=True))
    return Network("kinships", model, batches, lambda other: link_prediction.metrics(other, triples))


def digits(seed: int, epochs: int = demo.EPOCHS) -> Network:
    """The demo's network on two halves of a digit: accuracy."""
    data = demo.load_digits(seed)
    model = demo.train(data, seed, epochs)
    return Network("digits", model, data.batches, lambda other: {"accuracy": demo.accuracy(other, data)})


def by_hand(weight: Tensor, times: int) -> Iterator[tuple[str, Tensor, int]]:
    """What a user would do with the weight alone: a name, the new weight, and its bytes; nothing that does not fit."""
    out, in1, in2 = weight.shape
    budget = weight.numel() // times
    tensorly.set_backend("pytorch")
    rank = budget // (out + in1 + in2)
    if rank:
        weights, factors = parafac(weight, rank, n_iter_max=100, init="random", random_state=0, normalize_factors=False)
        dense = tensorly.cp_to_tensor((weights, factors))
        yield "TensorLy CP", dense, rank * (out + in1 + in2) * weight.element_size()
    ranks = proportional_ranks(weight.shape, budget)
    if ranks is not None:
        core, parts = tensorly_tucker(weight, rank=ranks)
        yield (
            "TensorLy Tucker",
            tensorly.tucker_to_tensor((core, parts)),
            int((core.numel() + sum(part.numel() for part in parts)) * weight.element_size()),
        )
    kept = budget // (out * (in1 + in2))
    if kept:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        yield (
            "SVD per output",
            (left[..., :kept] * values[:, None, :kept]) @ right[:, :kept],
            (kept * out * (in1 + in2) * weight.element_size()),
        )


def proportional_ranks(shape: Sequence[int], budget: int) -> list[int] | None:
    """Tucker ranks in proportion to the sizes, the largest whose plain factors and core are within a budget, if any."""
    best = None
    for step in range(1, 1001):
        ranks = [max(1, step * size // 1000) for size in shape]
        plain = tucker_parameters(ranks, shape) if max(4 * r > 3 * d for r, d in zip(ranks, shape, strict=True)) else 0
        plain = max(plain, sum(r * d for r, d in zip(ranks, shape, strict=True)) + ranks[0] * ranks[1] * ranks[2])
        if plain <= budget:
            best = ranks
    return best


def with_weight(network: Network, weight: Tensor) -> nn.Module:
    """The network with another weight in its layer."""
    layer = network.model.fusion
    assert isinstance(layer, nn.Bilinear)
    before = layer.weight.detach().clone()
    try:
        with torch.no_grad():
            layer.weight.copy_(weight)
        return copy.deepcopy(network.model)
    finally:
        with torch.no_grad():
            layer.weight.copy_(before)


def rows_of(network: Network, seed: int, quick: bool) -> Iterator[dict[str, Any]]:
    """All measurements of one network."""
    layer = network.model.fusion
    assert isinstance(layer, nn.Bilinear)
    original = stored_bytes(layer)
    bias = 0 if layer.bias is None else layer.bias.numel() * layer.bias.element_size()
    before = network.metrics(network.model)

    def row(kind: str, method: str, times: float | None, used: int, model: nn.Module, **known: Any) -> dict[str, Any]:
        found = network.metrics(model)
        measured = {name: round(value, 5) for name, value in found.items()}
        losses = {f"{name}_lost": round(before[name] - value, 5) for name, value in found.items()}
        size = {"asked_x": times, "smaller_x": round(original / used, 3), "bytes": used}
        return (
            {"network": network.name, "seed": seed, "kind": kind, "method": method} | size | measured | losses | known
        )

    yield row("original", "nn.Bilinear", None, original, network.model)
    for quantize in ("int8", "nf4"):
        model, report = compressed(network, cb.DenseConfig(quantize=quantize), calibration=None)
        yield row("by hand", f"dense {quantize}", None, report.bytes_after, model)
    for times in (SIZES[1],) if quick else SIZES:
        for method, weight, used in by_hand(layer.weight.detach(), times):
            yield row("by hand", method, times, used + bias, with_weight(network, weight))
        begun = time.perf_counter()
        model, report = compressed(network, cb.AutoConfig(size=1 / times))
        known = told(report, begun)
        yield row("ours", "automatic", times, report.bytes_after, model, **known)
        if times in REFINED and not quick:
            begun = time.perf_counter()
            model, report = compressed(network, chosen_config(report), refine="network", max_seconds=REFINE_SECONDS)
            yield row("ours", "automatic, refined", times, report.bytes_after, model, **told(report, begun))
    for error in ERRORS if seed == 0 and not quick else ():
        limit = cb.MaxError(error, on="output")
        kinds: list[Any] = [cb.AutoConfig(error=limit)]
        kinds += [
            kind(rank=limit, quantize=q) for kind in (cb.CPConfig, cb.TuckerConfig) for q in (None, "int8", "nf4")
        ]
        for config in kinds:
            begun = time.perf_counter()
            model, report = compressed(network, config)
            if report.decision == "kept":
                continue
            name = (
                "automatic" if isinstance(config, cb.AutoConfig) else f"{report.method} {report.quantize or ''}".strip()
            )
            known = told(report, begun) | {"error_limit": error}
            yield row("to an error", name, None, report.bytes_after, model, **known)


def compressed(network: Network, config: Any, **options: Any) -> tuple[nn.Module, cb.LayerReport]:
    """The network with its layer replaced, and the report on that."""
    known: dict[str, Any] = {"calibration": network.batches, "measure_latency": False, "progress": False}
    model, report = cb.compress(network.model, config, **known | options)
    return model, report.layers[0]


def chosen_config(report: cb.LayerReport) -> Any:
    """What asks for the same again."""
    quantize: Any = report.quantize
    if report.decision == "kept" or report.method == "dense":
        return cb.DenseConfig(quantize=quantize)
    kind: Any = cb.CPConfig if report.method == "cp" else cb.TuckerConfig
    return kind(rank=report.rank, quantize=quantize)


def told(report: cb.LayerReport, begun: float) -> dict[str, Any]:
    """What a report says, and the seconds since `begun`."""
    rank = ",".join(map(str, report.rank)) if isinstance(report.rank, tuple) else report.rank
    choice = f"{report.method if report.decision == 'replaced' else 'keep'} {report.quantize or ''}".strip()
    errors = {"output_error": report.output_error, "weight_error": report.weight_error}
    return {"choice": choice, "rank": rank, **errors, "seconds": round(time.perf_counter() - begun, 2)}


def main() -> None:
    """Train, compress in every way, print the means, write the CSV and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one barely trained network at one size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("networks", nargs="*", default=["kinships", "digits"], help="of kinships and digits")
    options = parser.parse_args()
    makers: dict[str, Callable[..., Network]] = {"kinships": kinships, "digits": digits}
    unknown = set(options.networks) - set(makers)
    if unknown:
        parser.error(f"networks should be among {', '.join(makers)}. Found {', '.join(sorted(unknown))}.")
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for name in ["digits"] if options.quick else options.networks:
        for seed in options.seeds[:1] if options.quick else options.seeds:
            network = makers[name](seed, **({"epochs": 1} if options.quick else {}))
            work = rows_of(network, seed, options.quick)
            rows += track(work, f"{name} {seed}", console=console, transient=True)
    path = options.out / "quality_cpu.csv"
    rows = write(path, rows, environment(torch.device("cpu"), torch.float32), keys=("network", "seed"))
    Console(width=120).print(summary(rows))
    if not options.quick:
        plot(path)
    print(f"Wrote {path}")


def summary(rows: Sequence[dict[str, Any]]) -> Table:
    """Means over the seeds of what the main metric lost."""
    table = Table("Network", "Kind", "Method", "Asked", "Smaller", "Metric", "Lost", "Choice")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["network"], row["kind"], row["method"], row.get("asked_x"), row.get("error_limit"))
        groups.setdefault(key, []).append(row)
    for (network, kind, method, times, limit), group in groups.items():
        metric = "mrr" if network == "kinships" else "accuracy"

        def mean(name: str, group: list[dict[str, Any]] = group) -> float:
            return sum(float(row[name]) for row in group) / len(group)

        asked = f"{times}x" if times else f"error {limit}" if limit else ""
        choices = ", ".join(dict.fromkeys(str(row.get("choice", "")) for row in group))
        figures = (f"{mean('smaller_x'):.2f}x", f"{mean(metric):.4f}", f"{mean(f'{metric}_lost'):+.4f}")
        table.add_row(network, kind, method, asked, *figures, choices)
    return table


if __name__ == "__main__":
    main()
