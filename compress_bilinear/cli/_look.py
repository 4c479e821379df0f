"""The commands that change nothing: `demo` and `inspect`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from ..files import LayerDescription, read_layers, read_state
from ..planning import StoredWeight, stored_weights, unknown_weights
from ..report import printable, size
from ._shared import FILE, SEED, as_json, examples, printing, show


@click.command(epilog=examples("demo", "demo -o networks --seed 1", "demo --json"))
@click.option("-o", "--output", type=FILE, help="A folder for the compressed networks.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the split and the training.")
@printing
def demo(output: Path | None, seed: int, as_json: bool, quiet: bool) -> None:
    """Train a small network on scikit-learn's bundled digits, compress it in five ways, and compare the results."""
    from ._demo import run, table

    rows, report = run(output, seed, progress=sys.stderr.isatty() and not quiet)
    if as_json:
        plain = [{"name": row.name, "accuracy": row.accuracy, **dataclasses.asdict(row.layer)} for row in rows]
        print(json.dumps({"environment": dict(report.environment), "rows": plain}, indent=2))
        return
    measured_on = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    show(
        table(rows),
        "Output errors are on training inputs, accuracy is on 540 test images. Every compressed network was saved, "
        "reloaded into a fresh one, and gave bit-equal outputs."
        + (f" They are in {output}." if output is not None else ""),
        f"Measured on: {measured_on}",
        hidden=quiet,
    )


@click.command(epilog=examples("inspect model.pt", "inspect small.safetensors --json"))
@click.argument("path", metavar="CHECKPOINT", type=FILE)
@as_json
def inspect(path: Path, as_json: bool) -> None:
    """List the layers of a checkpoint that may be nn.Bilinear, and those that are compressed already."""
    state = read_state(path)
    compressed = read_layers(path)
    found = stored_weights(state)
    inside = tuple(f"{name}." if name else "" for layer in compressed for name in layer.names)
    if inside:
        found = [stored for stored in found if not f"{stored.names[0]}.weight".startswith(inside)]
    if as_json:
        listed = {
            "compressed": [dataclasses.asdict(layer) for layer in compressed],
            "layers": [_plain(name, stored) for stored in found for name in stored.names],
        }
        print(json.dumps(listed, indent=2))
        return
    if compressed:
        columns = ["Compressed layer", "Shape", "Method", "Rank", "Format"]
        show(_table(path, columns, [_compressed_row(layer) for layer in compressed]))
    if found:
        columns = ["Layer", "Shape (out, in1, in2)", "Dtype", "Bytes", "Bias", "Note"]
        show(_table(path, columns, [_weight_row(stored) for stored in found]))
    elif not compressed:
        show("No three-dimensional weight: nothing here can be an nn.Bilinear's." + unknown_weights(state))


def _plain(name: str, stored: StoredWeight) -> dict[str, object]:
    return {
        "name": name,
        "shape": list(stored.weight.shape),
        "dtype": str(stored.weight.dtype).removeprefix("torch."),
        "bytes": stored.weight.nbytes,
        "bias": stored.bias is not None,
        "maybe_convolution": stored.maybe_convolution,
    }


def _compressed_row(layer: LayerDescription) -> tuple[str, ...]:
    shape = f"{layer.out_features}x{layer.in1_features}x{layer.in2_features}"
    name = ", ".join(name or "(root)" for name in layer.names)
    return name, shape, layer.method, str(layer.rank or "–"), layer.quantize or "–"


def _weight_row(stored: StoredWeight) -> tuple[str, ...]:
    return (
        ", ".join(stored.labels),
        "x".join(map(str, stored.weight.shape)),
        str(stored.weight.dtype).removeprefix("torch."),
        size(stored.weight.nbytes),
        "yes" if stored.bias is not None else "no",
        "may be a Conv1d's (out, in, kernel)" if stored.maybe_convolution else "",
    )


def _table(path: Path, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(*columns, title=Text(str(path)), title_justify="left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
