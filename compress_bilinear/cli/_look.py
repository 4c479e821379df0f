"""The commands that change nothing: `demo` and `inspect`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..files import read_state
from ..modules import FoundLayer
from ..planning import maybe_convolution, stored_weights, unknown_weights
from ..report import compact_table, figure, size
from ._shared import FILE, SEED, as_json, examples, key, printing, show


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
@key
@as_json
def inspect(path: Path, key: str | None, as_json: bool) -> None:
    """List the layers of a checkpoint that may be nn.Bilinear, and those that are compressed already."""
    state, compressed = read_state(path, key, verify=False)
    found = stored_weights(state)
    inside = tuple(f"{name}." if name else "" for layer in compressed for name in layer.names)
    if inside:
        found = [stored for stored in found if not f"{stored.names[0]}.weight".startswith(inside)]
    if as_json:
        listed = {
            "compressed": [dataclasses.asdict(layer) for layer in compressed],
            "layers": [{"name": name, **_facts(stored)} for stored in found for name in stored.names],
        }
        print(json.dumps(listed, indent=2))
        return
    if compressed:
        rows = [
            (
                ", ".join(name or "(root)" for name in layer.names),
                _joined(layer.shape),
                *(figure(value) for value in (layer.method, layer.rank, layer.quantize)),
            )
            for layer in compressed
        ]
        show(compact_table(str(path), ("Compressed layer", "Shape", "Method", "Rank", "Format"), rows, left=5))
    if found:
        rows = []
        for stored in found:
            shape, dtype, nbytes, bias, short = _facts(stored).values()
            note = "may be a Conv1d's (out, in, kernel)" if short else ""
            rows.append((", ".join(stored.labels), _joined(shape), dtype, size(nbytes), "yes" if bias else "no", note))
        columns = ("Layer", "Shape (out, in1, in2)", "Dtype", "Bytes", "Bias", "Note")
        show(compact_table(str(path), columns, rows, left=6))
    elif not compressed:
        show("No three-dimensional weight: nothing here can be an nn.Bilinear's." + unknown_weights(state))


def _facts(stored: FoundLayer) -> dict[str, Any]:
    weight = stored.layer.weight
    return {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "bytes": weight.nbytes,
        "bias": stored.layer.bias is not None,
        "maybe_convolution": maybe_convolution(stored),
    }


def _joined(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
