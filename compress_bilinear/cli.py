"""The command line: argument parsing only."""

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from . import checkpoint, state_dicts
from .config import Config, CPConfig, CPRank, DenseConfig, MaxError, MaxSize, TuckerConfig, TuckerRank
from .errors import CompressionError, ConfigError
from .files import written_atomically
from .report import Report, size

app = typer.Typer(
    name="compress-bilinear",
    help="Compress the nn.Bilinear layers of trained networks, and report what that did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


class Method(str, Enum):
    """How to store a layer."""

    cp = "cp"
    tucker = "tucker"
    dense = "dense"


class Quantize(str, Enum):
    """Storage formats besides the layer's own."""

    int8 = "int8"


class Format(str, Enum):
    """How to print a report."""

    table = "table"
    markdown = "markdown"
    json = "json"


Checkpoint = Annotated[Path, typer.Argument(help="A state dict: .safetensors, or .pt read with weights_only=True.")]
Rows = Annotated[int | None, typer.Option(help="Rows in a timed call.", min=1)]


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to keep the networks in.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split and the training.")] = 0,
) -> None:
    """Train a small network on scikit-learn's bundled digits, compress it in five ways, and compare."""
    from . import demo as main_job

    rows, report = main_job.run(output, seed, progress=sys.stderr.isatty())
    console = _console()
    console.print(main_job.table(rows))
    console.print(
        "Output errors are on training inputs, accuracy is on 540 test images. Every compressed network was saved, "
        "reloaded into a fresh one, and gave bit-equal outputs."
        + (f" They are in {output}." if output is not None else "")
    )
    console.print("Measured on: " + ", ".join(f"{key} {value}" for key, value in report.environment.items()))


@app.command()
def inspect(path: Checkpoint) -> None:
    """List the layers of a checkpoint that may be nn.Bilinear, or those that were compressed already."""
    state = state_dicts.read_state(path)
    found = state_dicts.candidates(state)
    console = _console()
    compressed = _descriptions(path)
    if compressed:
        table = Table("Compressed layer", "Shape", "Method", "Rank", "Format", title=str(path), title_justify="left")
        for layer in compressed:
            shape = f"{layer.out_features}x{layer.in1_features}x{layer.in2_features}"
            name = ", ".join(name or "(root)" for name in layer.names)
            table.add_row(name, shape, layer.method, str(layer.rank or "–"), layer.quantize or "–")
        console.print(table)
        inside = tuple(f"{name}." if name else "" for layer in compressed for name in layer.names)
        found = [candidate for candidate in found if not f"{candidate.name}.weight".startswith(inside)]
    if found or not compressed:
        table = Table("Layer", "Shape (out, in1, in2)", "Dtype", "Bytes", "Bias", "Note", title=str(path))
        table.title_justify = "left"
        for candidate in found:
            weight = candidate.weight
            table.add_row(
                candidate.name or "(root)",
                "x".join(str(d) for d in weight.shape),
                str(weight.dtype).removeprefix("torch."),
                size(weight.numel() * weight.element_size()),
                "yes" if candidate.bias is not None else "no",
                "may be a Conv1d's (out, in, kernel)" if candidate.maybe_convolution else "",
            )
        console.print(table)
        if not found:
            console.print("No three-dimensional weight: nothing here can be an nn.Bilinear's.")


@app.command()
def compress(
    path: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, in safetensors.")],
    layers: Annotated[list[str] | None, typer.Option(help="Glob of layers to compress; may be repeated.")] = None,
    method: Annotated[Method, typer.Option(help="How to store them.")] = Method.tucker,
    rank: Annotated[str | None, typer.Option(help="64 for CP; 16,32,32 (out, in1, in2) for Tucker.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Instead of a rank: highest relative weight error.")] = None,
    max_size: Annotated[float | None, typer.Option(help="Instead of a rank: fraction of the layer's bytes.")] = None,
    quantize: Annotated[Quantize | None, typer.Option(help="Storage format of the new layers.")] = None,
    seed: Annotated[int, typer.Option(help="Of the CP solver's random starts.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace also what does not get smaller.")] = False,
    no_latency: Annotated[bool, typer.Option("--no-latency", help="Do not measure latencies.")] = False,
    batch_size: Rows = None,
    report: Annotated[Path | None, typer.Option(help="Also write the report: .json or .md.")] = None,
) -> None:
    """Compress bilinear layers of a checkpoint, without its network's code.

    The result loads with `compress_bilinear.load(OUT, Net())`, Net being the original network.
    """
    if report is not None and report.suffix not in (".json", ".md"):
        raise ConfigError(f"--report should end in .json or .md. Found {str(report)!r}.")
    if output.exists() and output.samefile(path):
        raise ConfigError("--output should be another file than CHECKPOINT. Found the same.")
    config = _config(method, rank, max_error, max_size, quantize, seed)
    state = state_dicts.read_state(path)
    chosen = state_dicts.choose(state, layers or [])
    planned, new_state, descriptions = state_dicts.compress_state(
        state, chosen, config, measure_latency=not no_latency, batch_size=batch_size, force=force
    )
    _console().print(str(planned.report), markup=False, highlight=False, soft_wrap=True)
    if report is not None:
        _write(report, _render(planned.report, Format.json if report.suffix == ".json" else Format.markdown))
    if not descriptions:
        _fail(f"nothing was replaced, so {str(output)!r} was not written", status=1)
    checkpoint.write(new_state, descriptions, output)
    _console().print(f"Wrote {output} ({size(output.stat().st_size)})", markup=False, highlight=False, soft_wrap=True)


@app.command(name="report")
def compare(
    original: Checkpoint,
    compressed: Annotated[Path, typer.Argument(help="A file that `compress` or compress_bilinear.save wrote.")],
    format: Annotated[Format, typer.Option(help="How to print it.")] = Format.table,
    batch_size: Rows = None,
) -> None:
    """Measure a compressed checkpoint against the original: errors, bytes and latencies, layer by layer."""
    print(_render(state_dicts.compare(original, compressed, batch_size or 256), format))


def _config(
    method: Method,
    rank: str | None,
    max_error: float | None,
    max_size: float | None,
    quantize: Quantize | None,
    seed: int,
) -> Config:
    stored: Literal["int8"] | None = "int8" if quantize is Quantize.int8 else None
    given = [name for name, value in _targets(rank, max_error, max_size).items() if value is not None]
    if method is Method.dense:
        if given or stored is None:
            raise ConfigError(
                "--method dense keeps the weight whole: it takes --quantize int8 and no rank or target. "
                f"Found {', '.join(given) or 'no --quantize'}."
            )
        return DenseConfig(quantize="int8")
    if len(given) != 1:
        raise ConfigError(
            f"--method {method.value} takes one of --rank, --max-error and --max-size. "
            f"Found {', '.join(given) or 'none'}."
        )
    target = MaxError(max_error) if max_error is not None else MaxSize(max_size) if max_size is not None else None
    if method is Method.cp:
        cp_rank: CPRank = target if target is not None else _ints(rank, 1, "--rank of CP")[0]
        return CPConfig(rank=cp_rank, quantize=stored, seed=seed)
    if target is not None:
        return TuckerConfig(rank=target, quantize=stored)
    out, in1, in2 = _ints(rank, 3, "--rank of Tucker")
    tucker_rank: TuckerRank = (out, in1, in2)
    return TuckerConfig(rank=tucker_rank, quantize=stored)


def _targets(rank: str | None, max_error: float | None, max_size: float | None) -> dict[str, object]:
    return {"--rank": rank, "--max-error": max_error, "--max-size": max_size}


def _ints(text: str | None, count: int, what: str) -> list[int]:
    parts = (text or "").split(",")
    if len(parts) != count or not all(part.strip().isdecimal() for part in parts):
        wanted = "one whole number" if count == 1 else f"{count} whole numbers with commas between"
        raise ConfigError(f"{what} should be {wanted}. Found {text!r}.")
    return [int(part) for part in parts]


def _descriptions(path: Path) -> list[checkpoint.LayerDescription]:
    """The replaced layers where the file is one of ours, none where it is any other."""
    try:
        metadata = checkpoint.read_safetensors(path)[1]
    except CompressionError:
        return []
    return checkpoint.read(path)[1] if checkpoint.METADATA_KEY in metadata else []


def _render(report: Report, format: Format) -> str:
    match format:
        case Format.table:
            return str(report)
        case Format.markdown:
            return report.to_markdown()
        case Format.json:
            return report.to_json()


def _write(path: Path, text: str) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _console() -> Console:
    """Where there is no terminal to be as wide as, wide enough for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _fail(message: str, status: int) -> NoReturn:
    Console(stderr=True).print(f"compress-bilinear: {message}", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(status)


def main() -> None:
    """Run the command line: status 2 and one line for wrong use, 1 where nothing could be replaced, 130 for Ctrl-C."""
    try:
        app()
    except (CompressionError, OSError) as error:
        _fail(f"error: {error}".replace("\n", " "), status=2)
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
