"""Storage formats: bytes, error and latency on the shape suite, and what they cost trained networks.

On the suite, weights and factors are Gaussian, so all of the error is that of rounding. On the two trained networks a
CP of an eighth and a Tucker of a third of each size are solved for; the error is the weight's, with its parts, and the
metric that of the whole network: the digits' accuracy, and the filtered mean reciprocal rank of the link predictor.
"nf4" has a CP solved under the penalty of that format, "nf4, int8's penalty" under that of int8. "Tucker core" sets an
int8 core beside one in bfloat16, of a lower rank so that both take as many bytes, also on power-law weights.

python -m benchmarks.quantization           # the row-wise cases within 1e11 FLOPs and the trained networks, on the CPU
python -m benchmarks.quantization docred    # only this case
python -m benchmarks.quantization --quick   # a small case and a briefly trained network, in seconds
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import link_prediction
from benchmarks.cases import SUITE, Case, cp_rank, tucker_rank
from benchmarks.quantized import (
    Source,
    built,
    computing,
    finished,
    gaussian,
    held_bytes,
    linear8bit,
    output_error,
    per_tensor,
    torchao,
    with_core,
)
from benchmarks.rows import write
from benchmarks.weights import power_law
from compress_bilinear import AmplificationWarning, decomposition
from compress_bilinear.cli import _demo as demo
from compress_bilinear.config import Quantize
from compress_bilinear.fitting import Latency, environment, latencies, weight_error
from compress_bilinear.modules import CompressedBilinear

RESULTS = Path(__file__).parent / "results"
MOST_FLOPS = 1e11
FRACTION = 0.25  # of the weight's parameters, in a CP or Tucker layer of the suite
FIELDS = (
    *("case", "in1", "in2", "out", "rows", "form", "rank", "contestant", "status", "bytes", "bytes_vs_fp32"),
    *("error", "truncation_error", "quantization_error", "metric", "metric_change"),
    *("median_ms", "lower_quartile_ms", "upper_quartile_ms", "speedup_vs_fp32"),
)

Contestants = dict[str, Callable[[], CompressedBilinear]]


def suite_contestants(source: Source) -> Contestants:
    """Every format of a form; those of libraries where the form has linear layers."""
    floating, int8 = built(source), built(source, "int8")
    found: Contestants = {
        "fp32": lambda: floating,
        "bf16": lambda: copy.deepcopy(floating).bfloat16(),
        "int8": lambda: int8,
    }
    if "int8" in int8.computes:
        found["int8 x int8"] = lambda: computing(int8, "int8")
    nf4 = built(source, "nf4")
    found["nf4"] = lambda: nf4
    if "bitsandbytes" in nf4.computes:
        found["nf4, bitsandbytes"] = lambda: computing(nf4, "bitsandbytes")
    found["int8 per tensor"] = lambda: per_tensor(floating)
    if not isinstance(source, Tensor):
        found["torchao int8 weight-only"] = lambda: torchao(floating)
        found["bitsandbytes Linear8bitLt"] = lambda: linear8bit(floating)
    return found


def run_case(case: Case, seconds: float) -> list[dict[str, Any]]:
    """A row for each form and format of one case."""
    rows: list[dict[str, Any]] = []
    ranks: dict[str, int | tuple[int, int, int] | None]
    ranks = {"dense": None, "cp": cp_rank(case, FRACTION), "tucker": tucker_rank(case, FRACTION)}
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(case.rows, size, generator=generator) for size in (case.in1, case.in2)]
    for form, rank in ranks.items():
        source = gaussian(case.shape, rank)
        floating = built(source)
        layers, known = _made(suite_contestants(source))
        with torch.no_grad():
            measured = latencies({n: _call(layer, inputs) for n, layer in layers.items()}, torch.device("cpu"), seconds)
        for name, row in known.items():
            if name in layers:
                row |= _bytes(layers[name], floating) | _latency(measured, name)
                call = _call_in(layers[name], torch.bfloat16 if name == "bf16" else torch.float32)
                row["error"] = _figure(0.0 if name == "fp32" else output_error(call, floating))
            sizes = {"in1": case.in1, "in2": case.in2, "out": case.out, "rows": case.rows}
            rows.append({"case": case.name, "form": form, "rank": _rank(rank), "contestant": name} | sizes | row)
    return rows


def trained_contestants(source: Source, weight: Tensor, tied: Source | None = None) -> Contestants:
    """The formats whose effect on a network is measured; `tied` is a CP that was solved for nf4."""
    floating = built(source)
    found: Contestants = {"fp32": lambda: floating}
    for quantize in get_args(Quantize):
        own = tied if quantize == "nf4" and tied is not None else source
        found[quantize] = partial(finished, own, weight, quantize)
        if own is not source:
            found[f"{quantize}, int8's penalty"] = partial(finished, source, weight, quantize)
        if not isinstance(source, Tensor):
            found[f"{quantize}, rounded one by one"] = partial(built, source, quantize)
    found["int8 per tensor"] = lambda: per_tensor(floating)
    return found


def run_trained(
    name: str, model: nn.Module, metric: Callable[[nn.Module], float], max_seconds: float | None = None
) -> list[dict[str, Any]]:
    """A row for each form and format of a trained network's `fusion`, with its bias, and the network's metric."""
    fusion = model.get_submodule("fusion")
    assert isinstance(fusion, nn.Bilinear)
    weight, before = fusion.weight.detach(), metric(model)
    count, sizes = weight.numel(), tuple(weight.shape)
    sources: dict[str, Source] = {"dense": weight}
    rank = count // 8 // sum(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AmplificationWarning)  # the figures show what it says
        sources["cp"] = decomposition.cp(weight, rank, max_seconds=max_seconds)
        tied = decomposition.cp(weight, rank, quantize="nf4", max_seconds=max_seconds)
    out, in1, in2 = (size // 3 for size in sizes)
    sources["tucker"] = decomposition.tucker(weight, (out, in1, in2))
    rows: list[dict[str, Any]] = []
    for form, source in sources.items():
        floating = built(source)
        layers, known = _made(trained_contestants(source, weight, tied if form == "cp" else None))
        for contestant, layer in layers.items():
            own = tied if form == "cp" and contestant == "nf4" else source
            truncation = 0.0 if isinstance(own, Tensor) else own.error or 0.0
            exact = built(own).to_dense(torch.float64).detach()
            apart = float((layer.to_dense(torch.float64).detach() - exact).norm() / weight.double().norm())
            errors = {"error": weight_error(weight, layer), "truncation_error": truncation, "quantization_error": apart}
            known[contestant] |= {what: _figure(value) for what, value in errors.items()} | _bytes(layer, floating)
            changed = copy.deepcopy(model)
            if fusion.bias is not None:
                layer.set_bias(fusion.bias)
            changed.add_module("fusion", layer)
            after = metric(changed)
            known[contestant] |= {"metric": f"{after:.4f}", "metric_change": f"{after - before:+.4f}"}
        same: dict[str, Any] = {"case": name, "form": form, "rank": _rank(layers["fp32"].rank)}
        same |= {"in1": sizes[1], "in2": sizes[2], "out": sizes[0]}
        rows += [same | {"contestant": contestant} | row for contestant, row in known.items()]
    return rows


def trained(quick: bool) -> list[dict[str, Any]]:
    """The rows of both networks; without PyKEEN's triples one says so."""
    data = demo.load_digits()
    model = demo.train(data, epochs=2 if quick else demo.EPOCHS)
    rows = run_trained("digits", model, lambda changed: demo.accuracy(changed, data), 1.0 if quick else None)
    if quick:
        return rows
    try:
        triples = link_prediction.load_triples()
    except SystemExit as missing:
        return [*rows, {"case": "link_prediction", "status": str(missing)}]
    ranked = partial(_reciprocal_rank, triples=triples)
    return rows + run_trained("link_prediction", link_prediction.train(), ranked)


CORE_FRACTIONS = (1 / 8, 1 / 16, 1 / 64)  # of the weight's float32 bytes


def run_cores(name: str, weight: Tensor) -> list[dict[str, Any]]:
    """A row for each size and core of a Tucker decomposition of a weight."""
    rows: list[dict[str, Any]] = []
    out, in1, in2 = weight.shape
    for fraction in CORE_FRACTIONS:
        for core, bits in (("int8", 8), ("bfloat16", 16)):
            row: dict[str, Any] = {"case": name, "form": "tucker core", "in1": in1, "in2": in2, "out": out}
            row["contestant"] = f"{core} core, 1/{1 / fraction:g}"
            try:
                stored, size = with_core(weight, fraction, bits)
            except RuntimeError as error:
                rows.append(row | {"status": str(error)})
                continue
            floating = decomposition.tucker(weight, stored.rank)
            share = f"{size / (4 * weight.numel()):.4f}"
            errors = {"error": stored.relative_error(weight), "truncation_error": floating.error or 0.0}
            told = {what: _figure(value) for what, value in errors.items()}
            rows.append(
                row | {"status": "ok", "rank": _rank(stored.rank), "bytes": size, "bytes_vs_fp32": share} | told
            )
    return rows


def cores(quick: bool) -> list[dict[str, Any]]:
    """The rows of a trained weight and of weights whose spectra fall as k^-1 (as trained ones at most do) and k^-2."""
    epochs = 2 if quick else demo.EPOCHS
    fusion = demo.train(demo.load_digits(), epochs=epochs).get_submodule("fusion")
    assert isinstance(fusion, nn.Bilinear)
    weights = {"digits": fusion.weight.detach()}
    shape = (16, 20, 18) if quick else (48, 64, 64)
    weights |= {f"power {power:g}": power_law(shape, power) for power in (1.0, 2.0)}
    return [row for name, weight in weights.items() for row in run_cores(name, weight)]


def _reciprocal_rank(model: nn.Module, triples: link_prediction.Triples) -> float:
    return link_prediction.mean_reciprocal_rank(model, triples)


def _made(contestants: Contestants) -> tuple[dict[str, CompressedBilinear], dict[str, dict[str, Any]]]:
    """The layers that could be made, and a row for each with its status."""
    layers: dict[str, CompressedBilinear] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in contestants.items():
        try:
            layers[name] = make().eval()
            rows[name] = {"status": "ok"}
        except ImportError as error:
            rows[name] = {"status": f"not installed: {error.name or error}"}
        except RuntimeError as error:  # a library's, on a size that it does not take
            rows[name] = {"status": f"fails: {error}"}
    return layers, rows


def _call(layer: CompressedBilinear, inputs: list[Tensor]) -> Callable[[], Tensor]:
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.float32)
    input1, input2 = (value.to(dtype) for value in inputs)
    return lambda: layer(input1, input2)


def _call_in(layer: CompressedBilinear, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda input1, input2: layer(input1.to(dtype), input2.to(dtype))


def _bytes(layer: CompressedBilinear, floating: CompressedBilinear) -> dict[str, Any]:
    """Without the bias, which is stored as it was."""
    return {"bytes": held_bytes(layer), "bytes_vs_fp32": f"{held_bytes(layer) / held_bytes(floating):.4f}"}


def _latency(measured: Mapping[str, Latency], name: str) -> dict[str, Any]:
    latency = measured[name]
    return {
        "median_ms": f"{latency.median:.5g}",
        "lower_quartile_ms": f"{latency.lower:.5g}",
        "upper_quartile_ms": f"{latency.upper:.5g}",
        "speedup_vs_fp32": f"{measured['fp32'].median / latency.median:.3f}",
    }


def _figure(value: float) -> str:
    return f"{value:.5f}"


def _rank(rank: object) -> str:
    return "" if rank is None else "x".join(map(str, rank)) if isinstance(rank, tuple) else str(rank)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("Case", "Form", "Format", "Bytes", "Error", "Median ms", "vs fp32", "Metric")
    for row in rows:
        change = f"{row['metric']} ({row['metric_change']})" if "metric" in row else ""
        shown = (row.get(key, "") for key in ("case", "form", "contestant", "bytes_vs_fp32", "error", "median_ms"))
        speedup = f"{row['speedup_vs_fp32']}x" if "speedup_vs_fp32" in row else row.get("status", "")
        table.add_row(*(str(value) for value in shown), "" if speedup == "ok" else speedup, change)
    return table


def main() -> None:
    """Run, print a table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = {case.name: case for case in SUITE if not case.pairs}
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(cases)}; those up to 1e11 FLOPs where none is given")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long to time each form of a case")
    parser.add_argument("--quick", action="store_true", help="a small case and a briefly trained network")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of quantization_cpu.csv")
    options = parser.parse_args()
    unknown = set(options.cases) - set(cases)
    if unknown:
        parser.error(f"cases should be among {', '.join(cases)}. Found {', '.join(sorted(unknown))}.")
    chosen = [c for c in cases.values() if c.name in options.cases or (not options.cases and c.flops <= MOST_FLOPS)]
    chosen = [cases["simgnn_ntn"]] if options.quick else chosen
    rows: list[dict[str, Any]] = []
    for case in chosen:
        print(f"{case.name} ...", file=sys.stderr)
        rows += run_case(case, 0.2 if options.quick else options.seconds)
    if not options.cases:
        print("trained networks ...", file=sys.stderr)
        rows += trained(options.quick)
        rows += cores(options.quick)
    Console(width=120).print(_table(rows))
    path = options.out / "quantization_cpu.csv"
    facts = environment(torch.device("cpu"), torch.float32)
    try:
        facts["torchao"] = version("torchao")
    except PackageNotFoundError:
        facts["torchao"] = "not installed"
    write(path, [dict.fromkeys(FIELDS, "") | row for row in rows], facts)
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
