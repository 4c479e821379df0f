"""The command `compress`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import click
import torch
from click.core import ParameterSource

from ..config import (
    COMPUTE_CHOICES,
    METHODS,
    AutoConfig,
    Config,
    CPConfig,
    CPRank,
    DenseConfig,
    MaxError,
    MaxSize,
    Quantize,
    Recipe,
    TuckerConfig,
    TuckerRank,
    plain,
    read_recipe,
)
from ..errors import ConfigError
from ..files import read_state, write_container
from ..planning import _offline as state_dicts
from ..report import size
from ._shared import (
    FILE,
    SEED,
    Content,
    calibration,
    check_targets,
    examples,
    measuring,
    rendered,
    show,
    style_of,
    write_together,
)

_OF_A_CONFIG = (
    "method",
    "rank",
    "max_error",
    "max_size",
    "quantize",
    "prefer",
    "seed",
    "on",
)  # options that a file says instead


@click.command(
    epilog=examples(
        "compress model.pt -o small.safetensors --layers 'rel.*' --max-size 0.25",
        "compress model.pt -o small.safetensors --method cp --rank 64 --quantize int8 --report report.html",
        "compress model.pt --dry-run --max-error 0.1 --json > plan.json",
        "compress model.pt -o small.safetensors --config layers.toml --max-seconds 60",
        "compress model.pt -o small.safetensors --method auto --max-size 0.1 --calibration rows.safetensors",
    )
    + "\n\n\b\nlayers.toml, say; the first glob that matches a layer holds:\n"
    '  [layers."rel.*"]\n  method = "cp"\n  max_error = 0.05\n  quantize = "int8"\n'
    '  [layers."*"]\n  method = "tucker"\n  rank = [16, 32, 32]\n'
)
@click.argument("path", metavar="CHECKPOINT", type=FILE)
@click.option("-o", "--output", type=FILE, help="The file to write, in safetensors; needed without --dry-run.")
@click.option("--layers", multiple=True, metavar="PATTERN", help="Glob of layers to compress; may be repeated.")
@click.option("--config", type=FILE, metavar="FILE", help="A .toml or .json file of globs and what to do with them.")
@click.option("--method", type=click.Choice(METHODS), default="tucker", show_default=True)
@click.option("--rank", metavar="R | O,I,J", help="64 for CP; 16,32,32 (out, in1, in2) for Tucker.")
@click.option("--max-error", type=float, help="Instead of a rank: highest relative error.")
@click.option(
    "--on",
    type=click.Choice(["weight", "output"]),
    help="What --max-error counts on.  [default: weight; of --method auto with --calibration, output]",
)
@click.option("--max-size", type=float, help="Instead of a rank: highest fraction of the layer's bytes.")
@click.option("--quantize", type=click.Choice(get_args(Quantize)), help="Storage format of the new layers.")
@click.option(
    "--prefer",
    type=click.Choice(["size", "speed"]),
    default="size",
    help="What --method auto makes small.  [default: size]",
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Of CP's random starts; Tucker and dense have none."
)
@calibration
@click.option("--max-seconds", type=float, help="Time for all decompositions together.  [default: no limit]")
@click.option(
    "--compute", type=click.Choice(COMPUTE_CHOICES), help="How quantized layers compute.  [default: on_the_fly]"
)
@click.option("--force", is_flag=True, help="Replace also what does not get smaller.")
@click.option("--no-latency", is_flag=True, help="Do not measure latencies.")
@click.option("--dry-run", is_flag=True, help="Solve, measure and print the plan; write no checkpoint.")
@click.option("--report", type=FILE, metavar="FILE", help="Also write the report: .json, .md or .html.")
@measuring
@click.pass_context
def compress(
    context: click.Context,
    path: Path,
    output: Path | None,
    layers: tuple[str, ...],
    config: Path | None,
    method: str,
    rank: str | None,
    max_error: float | None,
    on: Literal["weight", "output"] | None,
    max_size: float | None,
    quantize: Quantize | None,
    prefer: Literal["size", "speed"],
    seed: int,
    calibration: Path | None,
    max_seconds: float | None,
    compute: str | None,
    force: bool,
    no_latency: bool,
    batch_size: int | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
    dry_run: bool,
    report: Path | None,
    as_json: bool,
    quiet: bool,
) -> str | None:
    """Compress bilinear layers of a checkpoint, without its network's code.

    The result loads with compress_bilinear.load(OUTPUT, Net()), Net being the original network, in its dtype.
    """
    _check_files(path, output, report, calibration, dry_run)
    if config is not None:
        given = [name for name in _OF_A_CONFIG if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        if given:
            listed = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ConfigError(
                f"--config says how to compress each layer, for which it stands alone. Found {listed} too."
            )
        recipe = read_recipe(config)
    else:
        single = _config(method, rank, max_error, max_size, quantize, prefer, seed, on)
        recipe = Recipe(configs={"*": single}, options={})
    if state_dicts.descriptions(path):
        raise ConfigError(
            f"CHECKPOINT should be an original. Found {str(path)!r} compressed already: compress the original with "
            "all --layers at once."
        )
    options: dict[str, Any] = dict(recipe.options)
    include = options.pop("include", ())
    include = layers or ((include,) if isinstance(include, str) else tuple(include))
    limits = {"max_seconds": max_seconds, "batch_size": batch_size, "compute": compute}
    options |= {name: value for name, value in limits.items() if value is not None}
    options |= ({"force": True} if force else {}) | ({"measure_latency": False} if no_latency else {})
    state = read_state(path)
    chosen = state_dicts.choose(state, include or (tuple(recipe.configs) if config is not None else ()))
    configs = _matching(recipe, chosen)
    planned, new_state, described = state_dicts.compress_state(
        state,
        chosen,
        configs,
        device=device,
        dtype=dtype,
        calibration=calibration,
        progress=False if quiet else None,
        **options,
    )
    made = replace(planned.report, config=plain(configs, options))
    files: list[tuple[Path, Content]] = []
    if output is not None and described and not dry_run:
        files.append((output, lambda temporary: write_container(new_state, described, temporary)))
    if report is not None:
        files.append((report, rendered(made, style_of(report, "--report"))))
    write_together(files)  # before anything is printed: who reads that may have gone
    if as_json:
        print(made.to_json())
    else:
        written = [f"Wrote {path} ({size(path.stat().st_size)})" for path, _ in files]
        show(str(planned) if dry_run else str(made), *written, hidden=quiet)
    if not described:
        unwritten = f"nothing was replaced, so {str(output)!r} was not written"
        return "nothing would be replaced" if dry_run else unwritten
    return None


def _check_files(path: Path, output: Path | None, report: Path | None, rows: Path | None, dry_run: bool) -> None:
    """What is wrong with the files is said before anything takes time."""
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output'; only --dry-run goes without.")
    if report is not None:
        style_of(report, "--report")
    if output is not None and output.resolve() == path.resolve():
        raise ConfigError("--output should be another file than CHECKPOINT. Found the same.")
    if report is not None and report.resolve() in (path.resolve(), output.resolve() if output is not None else None):
        raise ConfigError(
            "--report should be another file than CHECKPOINT and --output. Found the same as one of them."
        )
    if rows is not None and rows.resolve() in {file.resolve() for file in (output, report) if file is not None}:
        raise ConfigError("--calibration should be another file than those that are written. Found the same as one.")
    check_targets(output, report)


def _matching(recipe: Recipe, chosen: list[state_dicts.Candidate]) -> dict[str, Config | None]:
    """The recipe's configs without the globs that --layers left nothing to match."""
    left = {glob: config for glob, config in recipe.configs.items() if state_dicts.matching(chosen, glob)}
    if not left:
        raise ConfigError(
            f"--layers should leave a layer that --config is about. Found globs {', '.join(recipe.configs)}."
        )
    return left


def _config(
    method: str,
    rank: str | None,
    max_error: float | None,
    max_size: float | None,
    quantize: Quantize | None,
    prefer: Literal["size", "speed"],
    seed: int,
    on: Literal["weight", "output"] | None = None,
) -> Config:
    if on is not None and max_error is None:
        raise ConfigError(f"--on says what --max-error counts on. Found --on {on} alone.")
    limit = None if max_error is None else MaxError(max_error, on or "weight")
    given = [name for name, value in _targets(rank, max_error, max_size).items() if value is not None]
    if method == "dense":
        if given or quantize is None:
            raise ConfigError(
                "--method dense keeps the weight whole: it takes --quantize int8 and no rank or target. "
                f"Found {', '.join(given) or 'no --quantize'}."
            )
        return DenseConfig(quantize=quantize)
    if method == "auto":
        if len(given) != 1 or rank is not None or quantize is not None:
            listed = ", ".join(given + (["--quantize"] if quantize is not None else [])) or "none"
            raise ConfigError(f"--method auto takes one of --max-error and --max-size alone. Found {listed}.")
        return AutoConfig(error=max_error if on is None else limit, size=max_size, prefer=prefer, seed=seed)
    if prefer != "size":
        raise ConfigError(f"--prefer is for --method auto. Found --method {method}.")
    if len(given) != 1:
        raise ConfigError(
            f"--method {method} takes one of --rank, --max-error and --max-size. Found {', '.join(given) or 'none'}."
        )
    target = limit if limit is not None else MaxSize(max_size) if max_size is not None else None
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
