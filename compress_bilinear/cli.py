"""The command line: argument parsing only."""

import re
import sys
from pathlib import Path
from typing import Literal, NoReturn

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import state_dicts, tensor_file
from .config import Config, CPConfig, CPRank, DenseConfig, MaxError, MaxSize, Quantize, TuckerConfig, TuckerRank
from .errors import CompressionError, ConfigError
from .files import check_target, written_atomically
from .report import Report, size

_PROGRAM = "compress-bilinear"
_Format = Literal["table", "markdown", "json"]
_SEED = click.IntRange(0, 2**63 - 1)
_FILE = click.Path(path_type=Path)
_rows = click.option("--batch-size", type=click.IntRange(min=1), help="Rows in a timed call.  [default: 256]")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="compress-bilinear")
def app() -> None:
    """Compress the nn.Bilinear layers of trained networks, and report what that did.

    A CHECKPOINT is a state dict: .safetensors, or .pt, which is read with weights_only=True.
    """


@app.command()
@click.option("-o", "--output", type=_FILE, help="Folder to keep the compressed networks in.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Of the split and the training.")
def demo(output: Path | None, seed: int) -> None:
    """Train a small network on scikit-learn's bundled digits, compress it in five ways, and compare."""
    from . import demo as main_job

    rows, report = main_job.run(output, seed, progress=sys.stderr.isatty())
    console = _console()
    console.print(main_job.table(rows))
    console.print(
        "Output errors are on training inputs, accuracy is on 540 test images. Every compressed network was saved, "
        "reloaded into a fresh one, and gave bit-equal outputs."
        + (f" They are in {output}." if output is not None else ""),
        highlight=False,
        markup=False,
    )
    measured_on = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    console.print(f"Measured on: {measured_on}", highlight=False)


@app.command()
@click.argument("path", metavar="CHECKPOINT", type=_FILE)
def inspect(path: Path) -> None:
    """List the layers of a checkpoint that may be nn.Bilinear, or those that were compressed already."""
    state = state_dicts.read_state(path)
    found = state_dicts.candidates(state)
    console = _console()
    compressed = _descriptions(path)
    if compressed:
        table = Table(
            "Compressed layer", "Shape", "Method", "Rank", "Format", title=Text(str(path)), title_justify="left"
        )
        for layer in compressed:
            shape = f"{layer.out_features}x{layer.in1_features}x{layer.in2_features}"
            name = ", ".join(name or "(root)" for name in layer.names)
            table.add_row(Text(name), shape, layer.method, str(layer.rank or "–"), layer.quantize or "–")
        console.print(table)
        inside = tuple(f"{name}." if name else "" for layer in compressed for name in layer.names)
        found = [candidate for candidate in found if not f"{candidate.name}.weight".startswith(inside)]
    if found or not compressed:
        table = Table("Layer", "Shape (out, in1, in2)", "Dtype", "Bytes", "Bias", "Note", title=Text(str(path)))
        table.title_justify = "left"
        for candidate in found:
            weight = candidate.weight
            table.add_row(
                Text(candidate.name or "(root)"),
                "x".join(str(d) for d in weight.shape),
                str(weight.dtype).removeprefix("torch."),
                size(weight.numel() * weight.element_size()),
                "yes" if candidate.bias is not None else "no",
                "may be a Conv1d's (out, in, kernel)" if candidate.maybe_convolution else "",
            )
        console.print(table)
        if not found:
            console.print("No three-dimensional weight: nothing here can be an nn.Bilinear's.")


@app.command(
    epilog="Example: compress-bilinear compress model.pt -o small.safetensors --layers 'rel.*' --max-size 0.25"
)
@click.argument("path", metavar="CHECKPOINT", type=_FILE)
@click.option("-o", "--output", type=_FILE, required=True, help="The file to write, in safetensors.")
@click.option("--layers", multiple=True, metavar="PATTERN", help="Glob of layers to compress; may be repeated.")
@click.option("--method", type=click.Choice(["cp", "tucker", "dense"]), default="tucker", show_default=True)
@click.option("--rank", metavar="R | O,I,J", help="64 for CP; 16,32,32 (out, in1, in2) for Tucker.")
@click.option("--max-error", type=float, help="Instead of a rank: highest relative weight error.")
@click.option("--max-size", type=float, help="Instead of a rank: highest fraction of the layer's bytes.")
@click.option("--quantize", type=click.Choice(["int8", "nf4"]), help="Storage format of the new layers.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Of the CP solver's random starts.")
@click.option("--max-seconds", type=float, help="Time for all decompositions together.  [default: no limit]")
@click.option("--force", is_flag=True, help="Replace also what does not get smaller.")
@click.option("--no-latency", is_flag=True, help="Do not measure latencies.")
@_rows
@click.option("--report", type=_FILE, metavar="FILE", help="Also write the report: .json or .md.")
def compress(
    path: Path,
    output: Path,
    layers: tuple[str, ...],
    method: str,
    rank: str | None,
    max_error: float | None,
    max_size: float | None,
    quantize: Quantize | None,
    seed: int,
    max_seconds: float | None,
    force: bool,
    no_latency: bool,
    batch_size: int | None,
    report: Path | None,
) -> None:
    """Compress bilinear layers of a checkpoint, without its network's code.

    The result loads with compress_bilinear.load(OUTPUT, Net()), Net being the original network.
    """
    if report is not None and report.suffix not in (".json", ".md"):
        raise ConfigError(f"--report should end in .json or .md. Found {str(report)!r}.")
    if output.resolve() == path.resolve():
        raise ConfigError("--output should be another file than CHECKPOINT. Found the same.")
    if report is not None and report.resolve() in (path.resolve(), output.resolve()):
        raise ConfigError(
            "--report should be another file than CHECKPOINT and --output. Found the same as one of them."
        )
    for target in (output, report):
        if target is not None:
            check_target(target)  # before anything takes time
    config = _config(method, rank, max_error, max_size, quantize, seed)
    if _descriptions(path):
        raise ConfigError(
            f"CHECKPOINT should be an original. Found {str(path)!r} compressed already: compress the original with "
            "all --layers at once."
        )
    state = state_dicts.read_state(path)
    chosen = state_dicts.choose(state, layers)
    planned, new_state, descriptions = state_dicts.compress_state(
        state,
        chosen,
        config,
        measure_latency=not no_latency,
        batch_size=batch_size,
        force=force,
        max_seconds=max_seconds,
    )
    _console().print(str(planned.report), markup=False, highlight=False, soft_wrap=True)
    if report is not None:
        _write(report, _render(planned.report, "json" if report.suffix == ".json" else "markdown"))
    if not descriptions:
        _fail(f"nothing was replaced, so {str(output)!r} was not written", status=1)
    tensor_file.write(new_state, descriptions, output)
    _console().print(f"Wrote {output} ({size(output.stat().st_size)})", markup=False, highlight=False, soft_wrap=True)


@app.command(name="report")
@click.argument("original", type=_FILE)
@click.argument("compressed", type=_FILE)
@click.option("--format", "style", type=click.Choice(["table", "markdown", "json"]), default="table", show_default=True)
@_rows
def compare(original: Path, compressed: Path, style: _Format, batch_size: int | None) -> None:
    """Measure a COMPRESSED checkpoint against the ORIGINAL: errors, bytes and latencies, layer by layer."""
    print(_render(state_dicts.compare(original, compressed, batch_size or 256), style))


def _config(
    method: str,
    rank: str | None,
    max_error: float | None,
    max_size: float | None,
    quantize: Quantize | None,
    seed: int,
) -> Config:
    given = [name for name, value in _targets(rank, max_error, max_size).items() if value is not None]
    if method == "dense":
        if given or quantize is None:
            raise ConfigError(
                "--method dense keeps the weight whole: it takes --quantize int8 and no rank or target. "
                f"Found {', '.join(given) or 'no --quantize'}."
            )
        return DenseConfig(quantize=quantize)
    if len(given) != 1:
        raise ConfigError(
            f"--method {method} takes one of --rank, --max-error and --max-size. Found {', '.join(given) or 'none'}."
        )
    target = MaxError(max_error) if max_error is not None else MaxSize(max_size) if max_size is not None else None
    if method == "cp":
        cp_rank: CPRank = target if target is not None else _ints(rank, 1, "--rank of CP")[0]
        return CPConfig(rank=cp_rank, quantize=quantize, seed=seed)
    if target is not None:
        return TuckerConfig(rank=target, quantize=quantize)
    out, in1, in2 = _ints(rank, 3, "--rank of Tucker")
    tucker_rank: TuckerRank = (out, in1, in2)
    return TuckerConfig(rank=tucker_rank, quantize=quantize)


def _targets(rank: str | None, max_error: float | None, max_size: float | None) -> dict[str, object]:
    return {"--rank": rank, "--max-error": max_error, "--max-size": max_size}


def _ints(text: str | None, count: int, what: str) -> list[int]:
    parts = (text or "").split(",")
    if len(parts) != count or not all(re.fullmatch(r" *[0-9]{1,9} *", part) for part in parts):
        wanted = "one whole number" if count == 1 else f"{count} whole numbers with commas between"
        raise ConfigError(f"{what} should be {wanted}. Found {text!r}.")
    return [int(part) for part in parts]


def _descriptions(path: Path) -> list[tensor_file.LayerDescription]:
    """The replaced layers where the file is one of ours, none where it is any other."""
    try:
        metadata = tensor_file.read_safetensors(path)[1]
    except CompressionError:
        return []
    return tensor_file.read(path)[1] if tensor_file.METADATA_KEY in metadata else []


def _render(report: Report, style: _Format) -> str:
    match style:
        case "table":
            return str(report)
        case "markdown":
            return report.to_markdown()
        case "json":
            return report.to_json()


def _write(path: Path, text: str) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _console() -> Console:
    """Where there is no terminal to be as wide as, wide enough for a table."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _fail(message: str, status: int) -> NoReturn:
    Console(stderr=True).print(f"{_PROGRAM}: {message}", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(status)


def main() -> None:
    """Run the command line: status 2 and one line for wrong use, 1 where nothing could be replaced, 130 for Ctrl-C."""
    try:
        app(prog_name=_PROGRAM, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(2) from None
    except click.ClickException as error:
        _fail(f"error: {error.format_message()}".replace("\n", " "), status=2)
    except (CompressionError, OSError) as error:
        _fail(f"error: {error}".replace("\n", " "), status=2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", status=130)
