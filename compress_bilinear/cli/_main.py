"""The group of all commands, and its exit status."""

import io
import os
import sys
from typing import NoReturn

import click
from rich.console import Console

from ..errors import CompressionError
from ._compare import compare, report
from ._compress import compress
from ._look import demo, inspect
from ._shared import PROGRAM, examples

_COMPLETION = """\b
Completion by the Tab key; put the line into the shell's start file:
  bash  eval "$(_COMPRESS_BILINEAR_COMPLETE=bash_source compress-bilinear)"
  zsh   eval "$(_COMPRESS_BILINEAR_COMPLETE=zsh_source compress-bilinear)"
  fish  _COMPRESS_BILINEAR_COMPLETE=fish_source compress-bilinear | source
"""
_EXAMPLES = examples(
    "demo",
    "inspect model.pt",
    "compress model.pt -o small.safetensors --layers 'rel.*' --max-size 0.25 \\\n      --report report.html",
    "report model.pt small.safetensors --format markdown",
    "compare old.json new.json --fail-above output_error=0.05",
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"{_EXAMPLES}\n\n{_COMPLETION}",
)
@click.version_option(package_name="compress-bilinear")
def app() -> None:
    """Compress the nn.Bilinear layers of trained networks, and report what that did.

    A CHECKPOINT is a state dict: .safetensors, or .pt and .ckpt, of which no code is run.
    """


for _command in (demo, inspect, compress, report, compare):
    app.add_command(_command)


def _fail(message: str, status: int) -> NoReturn:
    Console(stderr=True).print(f"{PROGRAM}: {message}", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(status)


def main() -> None:
    """Run the command line.

    The exit status is 2, with one line on stderr, for wrong use; 1 where nothing could be replaced or a limit is
    broken; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without arrows still gets its table
    try:
        status = app(prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(2) from None
    except click.ClickException as error:
        _fail(f"error: {error.format_message()}".replace("\n", " "), status=2)
    except BrokenPipeError:  # the reader of the pipe stopped; flushing the rest at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None  # as click has it
    except (CompressionError, OSError) as error:
        _fail(f"error: {error}".replace("\n", " "), status=2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", status=130)
    if isinstance(status, str):
        _fail(status, status=1)
    raise SystemExit(status)
