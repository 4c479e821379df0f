"""The commands that measure results: `report` on two checkpoints, and `compare` on several reports."""

from pathlib import Path
from typing import Any

import click

from ..errors import CompressionError, ConfigError
from ..planning import compare_files
from ..report import Limit, Report, failures, numeric_fields
from ..report import compare as compare_reports
from ._shared import FILE, Style, calibration, check_files, deliver, examples, key, measuring, printing, style_of


@click.command(
    epilog=examples(
        "report model.pt small.safetensors",
        "report model.pt small.safetensors --format markdown",
        "report model.pt small.safetensors -o report.html --batch-size 64",
        "report model.pt small.safetensors --calibration rows.safetensors",
    )
)
@click.argument("original", type=FILE)
@click.argument("compressed", type=FILE)
@key
@click.option(
    "--format", "style", type=click.Choice(["table", "markdown", "json", "html"]), default="table", show_default=True
)
@click.option(
    "-o", "--output", type=FILE, metavar="FILE", help="A .json, .md or .html file to write instead of printing."
)
@calibration
@measuring
def report(
    original: Path,
    compressed: Path,
    style: Style,
    output: Path | None,
    batch_size: int | None,
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Measure a COMPRESSED checkpoint against the ORIGINAL: errors, bytes and latencies, layer by layer."""
    if output is not None:
        style = style_of(output, "--output")
        check_files((original, compressed, where["calibration"]), output=output)
    deliver(compare_files(original, compressed, batch_size or 256, **where), style, output, as_json, quiet)


@click.command(
    epilog=examples(
        "compare cp.json tucker.json",
        "compare cp.json tucker.json --figure output_error --format json",
        "compare *.json -o comparison.json",
        "compare new.json --quiet --fail-above output_error=0.05 \\\n      --fail-below speedup=1.2",
    )
    + f"\n\nFIELD is one of {', '.join(numeric_fields())}."
)
@click.argument("files", metavar="REPORT.json...", type=FILE, nargs=-1, required=True)
@click.option("--figure", "figures", multiple=True, metavar="FIELD", help="A figure to compare; may be repeated.")
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("-o", "--output", type=FILE, metavar="FILE", help="A .json file to write instead of printing.")
@click.option("--fail-above", multiple=True, metavar="FIELD=NUMBER", help="Exit with 1 if a layer has more.")
@click.option("--fail-below", multiple=True, metavar="FIELD=NUMBER", help="Exit with 1 if a layer has less.")
@printing
def compare(
    files: tuple[Path, ...],
    figures: tuple[str, ...],
    style: Style,
    output: Path | None,
    fail_above: tuple[str, ...],
    fail_below: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> str | None:
    """Compare reports: a row for each layer, a column for each run, the best marked.

    A kept layer counts as what it is: its errors are 0 and its speedup is 1. A limit fails for every layer that breaks
    it, and for every layer whose figure is not known (null in its report). Each failure is a line on stderr.
    """
    limits = [*(Limit.parse(text, True) for text in fail_above), *(Limit.parse(text, False) for text in fail_below)]
    if output is not None:
        style = style_of(output, "--output", [".json"])
    check_files(files, output=output)
    reports = {name: _read(file) for name, file in zip(_names(files), files, strict=True)}
    deliver(compare_reports(reports, figures), style, output, as_json, quiet)
    failed = failures(reports, limits)
    for line in failed:
        click.echo(line, err=True)
    return f"{len(failed)} failed" if failed else None


def _read(path: Path) -> Report:
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, CompressionError) as error:
        problem = str(error) if isinstance(error, CompressionError) else f"Found: {error}."
        raise CompressionError(f"{str(path)!r} should be a report that --report wrote as .json. {problem}") from error


def _names(files: tuple[Path, ...]) -> list[str]:
    """The files' names without .json, or as given where two are the same."""
    stems = [file.stem for file in files]
    names = stems if len(set(stems)) == len(stems) else [str(file) for file in files]
    if len(set(names)) < len(names):
        raise ConfigError(f"Each report should be given once. Found one of {', '.join(names)} twice.")
    return names
