"""What the commands share: options, printing and writing."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import click
import torch
from rich.console import Console, RenderableType

from .._io import check_target, written_atomically
from ..errors import ConfigError
from ..report import Comparison, Report

PROGRAM = "compress-bilinear"
FILE = click.Path(path_type=Path)
SEED = click.IntRange(0, 2**63 - 1)

Style: TypeAlias = Literal["table", "markdown", "json", "html"]
_STYLES: dict[str, Style] = {".json": "json", ".md": "markdown", ".html": "html"}
_Command = TypeVar("_Command", bound=Callable[..., Any])

_rows = click.option("--batch-size", type=click.IntRange(min=1), help="Rows in a timed call.  [default: 256]")
_quiet = click.option("-q", "--quiet", is_flag=True, help="Print only errors, and the JSON of --json.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


def _device(context: click.Context, parameter: click.Parameter, value: str | None) -> torch.device | None:
    if value is None:
        return None
    try:
        device = torch.device(value)
        torch.zeros(1, device=device).item()  # "meta" holds no values, and raises
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        problem = f"Found {value!r}: {str(error).partition(chr(10))[0]}."
        raise ConfigError(f"--device should be a device of this machine, say cpu or cuda:0. {problem}") from error
    return device


_device_option = click.option(
    "--device",
    metavar="DEVICE",
    callback=_device,
    help="Where to solve and measure: cpu, cuda, cuda:1.  [default: cpu]",
)
_dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32", "float64"]),
    callback=lambda context, parameter, value: value and getattr(torch, value),
    help="Convert the original to this dtype first; errors and sizes are against the result.  [default: as stored]",
)
calibration = click.option(
    "--calibration",
    type=FILE,
    metavar="FILE",
    help="Rows of the layers' inputs, in .safetensors: for a layer rel the tensors rel.input1 (N, in1) and "
    "rel.input2 (N, in2). Factors are fitted to the outputs, and output errors measured on held-out rows.",
)


key = click.option(
    "--key", metavar="KEY", help="That state dict of the file, say checkpoint.model, or names that begin so."
)


def printing(command: _Command) -> _Command:
    """The options of every command that prints results: `as_json` and `quiet`."""
    return as_json(_quiet(command))


def measuring(command: _Command) -> _Command:
    """The options of every command that solves or measures: `batch_size`, `device`, `dtype`, `as_json` and `quiet`."""
    return _rows(_device_option(_dtype_option(printing(command))))


def examples(*lines: str) -> str:
    """An epilog with one command in each line."""
    return "\b\nExamples:\n" + "\n".join(f"  {PROGRAM} {line}" for line in lines)


def style_of(path: Path, option: str, suffixes: Sequence[str] = tuple(_STYLES)) -> Style:
    """The format that a file's suffix names. Raises: ConfigError for any other suffix."""
    if path.suffix not in suffixes:
        listed = " or ".join(filter(None, (", ".join(suffixes[:-1]), suffixes[-1])))
        raise ConfigError(f"{option} should end in {listed}. Found {str(path)!r}.")
    return _STYLES[path.suffix]


def rendered(made: Report | Comparison, style: Style) -> str:
    """A report or a comparison as text in one of the formats that it has."""
    return str(made) if style == "table" else str(getattr(made, f"to_{style}")())


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def deliver(made: Report | Comparison, style: Style, output: Path | None, as_json: bool, quiet: bool) -> None:
    """Write it to a file, or print it, as a command's options say."""
    if output is not None:
        write_text(output, rendered(made, style))
        show(f"Wrote {output}", hidden=quiet or as_json)
    if as_json or (output is None and not quiet):
        print(rendered(made, "json" if as_json else style))


def check_files(read: Iterable[Path | None], **written: Path | None) -> None:
    """Check the files to write, by the names of their options, before anything takes time.

    Raises: CompressionError where one cannot be written, or is read or written by another option too.
    """
    taken = {path.resolve() for path in read if path is not None}
    for option, path in written.items():
        if path is not None:
            if path.resolve() in taken:
                raise ConfigError(
                    f"--{option} should be another file than those that are read, or written too. Found {str(path)!r}."
                )
            check_target(path)
            taken.add(path.resolve())


def show(*parts: RenderableType, hidden: bool = False) -> None:
    """Print on stdout, as wide as the terminal, or wide enough for a table where there is none."""
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    for part in () if hidden else parts:
        console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
