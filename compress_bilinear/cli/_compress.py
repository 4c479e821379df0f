"""The command `compress`."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from glob import escape
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from ..config import COMPUTE_CHOICES, CONFIGS, Config, PlanOptions, Quantize, Recipe, parse_config, read_recipe
from ..errors import ConfigError
from ..files import files_of, read_state, written
from ..modules import FoundLayer
from ..planning import choose_weights, compress_state
from ..report import size
from ._shared import (
    FILE,
    SEED,
    calibration,
    check_files,
    examples,
    key,
    measuring,
    rendered,
    show,
    style_of,
    write_text,
)

_CONFIG_OPTIONS = ("method", "rank", "max_error", "on", "max_size", "quantize", "prefer", "seed")
"""The options that a recipe of --config replaces, by their keys there."""


@click.command(
    epilog=examples(
        "compress model.pt -o small.safetensors --layers 'rel.*' --max-size 0.25",
        "compress model.pt -o small.safetensors --method cp --rank 64 \\\n      --quantize int8 --report report.html",
        "compress model.pt --dry-run --max-error 0.1 --json > plan.json",
        "compress model.pt -o small.safetensors --config layers.toml --max-seconds 60",
        "compress model.pt -o small.safetensors --method auto --max-size 0.1 \\\n      --calibration rows.safetensors",
    )
    + "\n\n\b\nA recipe, layers.toml; of several globs that match a layer the first holds:\n"
    '  [layers."rel.*"]\n  method = "cp"\n  max_error = 0.05\n  quantize = "int8"\n'
    '  [layers."*"]\n  method = "tucker"\n  rank = [16, 32, 32]\n'
)
@click.argument("path", metavar="CHECKPOINT", type=FILE)
@click.option(
    "-o",
    "--output",
    type=FILE,
    help="The file to write, in safetensors by any name; model.safetensors.index.json writes several. "
    "Needed without --dry-run.",
)
@key
@click.option("--layers", multiple=True, metavar="PATTERN", help="A glob of layers to compress; may be repeated.")
@click.option("--config", type=FILE, metavar="FILE", help="A .toml or .json recipe: globs of layers and their configs.")
@click.option("--method", type=click.Choice(list(CONFIGS)), default="tucker", show_default=True)
@click.option("--rank", metavar="R | O,I,J", help="64 for CP; 16,32,32 (out, in1, in2) for Tucker.")
@click.option("--max-error", type=float, help="Instead of a rank: highest relative error.")
@click.option(
    "--on",
    type=click.Choice(["weight", "output"]),
    help="What --max-error counts on.  [default: weight; of --method auto with --calibration, output]",
)
@click.option("--max-size", type=float, help="Instead of a rank: highest share of the layer's bytes.")
@click.option("--quantize", type=click.Choice(get_args(Quantize)), help="How new layers are stored.")
@click.option("--prefer", type=click.Choice(["size", "speed"]), help="What --method auto minimizes.  [default: size]")
@click.option("--seed", type=SEED, help="Of the random starts of CP and auto.  [default: 0]")
@calibration
@click.option("--max-seconds", type=float, help="Time for all decompositions together.  [default: no limit]")
@click.option("--compute", type=click.Choice(COMPUTE_CHOICES), help="How quantized layers compute.")
@click.option("--force", is_flag=True, help="Replace layers even if they do not get smaller or miss their target.")
@click.option("--no-latency", is_flag=True, help="Do not measure latencies.")
@click.option("--dry-run", is_flag=True, help="Solve, measure and print the plan, but write no checkpoint.")
@click.option("--report", type=FILE, metavar="FILE", help="Also write the report: .json, .md or .html.")
@measuring
@click.pass_context
def compress(
    context: click.Context,
    /,
    path: Path,
    output: Path | None,
    key: str | None,
    layers: tuple[str, ...],
    config: Path | None,
    calibration: Path | None,
    dry_run: bool,
    report: Path | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> str | None:
    """Compress bilinear layers of a checkpoint, without its network's code.

    The result loads with compress_bilinear.load(OUTPUT, Net()), Net being the original network, in its dtype.
    """
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'; only --dry-run goes without.")
    style = None if report is None else style_of(report, "--report")
    check_files((*files_of(path), config, calibration), output=output, report=report)
    on_line = {name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    recipe = _recipe(config, given, on_line)
    state, compressed = read_state(path, key)
    if compressed:
        raise ConfigError(
            f"CHECKPOINT should be an original. Found {str(path)!r} compressed already: compress the original with "
            "all --layers at once."
        )
    options = dict(recipe.options) | {name: given[name] for name in on_line & PlanOptions.__annotations__.keys()}
    options |= {"measure_latency": False} if given["no_latency"] else {}
    chosen = choose_weights(state, layers or (tuple(recipe.configs) if config is not None else ()))
    configs = recipe.configs
    if layers:
        configs = _narrowed(configs, chosen) if config is not None else dict.fromkeys(layers, configs["*"])
    where: dict[str, Any] = {"device": given["device"], "dtype": given["dtype"], "calibration": calibration}
    options |= {"progress": False} if quiet else {}
    plan, new_state, described = compress_state(state, chosen, configs, **where, **options)
    made = []
    with ExitStack() as stack:  # before anything is printed: the reader of a pipe may have gone
        if output is not None and described and not dry_run:
            stack.enter_context(written(new_state, described, output))
            made.append(output)
        if report is not None and style is not None:
            write_text(report, rendered(plan.report, style))
            made.append(report)
    if as_json:
        print(plan.report.to_json())
    else:
        lines = [f"Wrote {path} ({size(sum(file.stat().st_size for file in files_of(path)))})" for path in made]
        show(str(plan if dry_run else plan.report), *lines, hidden=quiet)
    if not described:
        return "nothing would be replaced" if dry_run else f"nothing was replaced, so {str(output)!r} was not written"
    return None


def _recipe(file: Path | None, given: Mapping[str, Any], on_line: set[str]) -> Recipe:
    """The recipe in the file of --config, or else the options, by the same rules as a table of such a file."""
    named = [name for name in _CONFIG_OPTIONS if name in on_line]
    if file is not None:
        if named:
            listed = ", ".join("--" + name.replace("_", "-") for name in named)
            raise ConfigError(f"--config replaces the options that say how to compress. Found {listed} too.")
        return read_recipe(file)
    table = {name: given[name] for name in ("method", *named)}
    if "rank" in table:
        table["rank"] = _rank(table["rank"])
    if "seed" not in {field.name for field in fields(CONFIGS[table["method"]])}:
        table.pop("seed", None)  # the method has no random starts
    try:
        return Recipe(configs={"*": parse_config(table)}, options={})
    except ConfigError as error:
        hint = " (--rank takes one number for CP, and three, O,I,J, for Tucker.)" if "rank" in table else ""
        raise ConfigError(f"--method {table['method']}: {error}{hint}") from error


def _rank(text: str) -> int | list[int]:
    parts = text.split(",")
    if not all(re.fullmatch(r" *[0-9]{1,9} *", part) for part in parts):
        raise ConfigError(f"--rank should be a whole number for CP, or three for Tucker: 16,32,32. Found {text!r}.")
    return int(text) if len(parts) == 1 else [int(part) for part in parts]


def _narrowed(configs: Mapping[str, Config | None], chosen: list[FoundLayer]) -> dict[str, Config | None]:
    """For --config with --layers: each chosen layer by its name, with the first config that matches it."""
    narrowed = {
        escape(stored.label): next((config for glob, config in configs.items() if stored.matches(glob)), None)
        for stored in chosen
    }
    if not any(narrowed.values()):
        raise ConfigError(f"--layers should leave a layer that --config is about. Found globs {', '.join(configs)}.")
    return narrowed
