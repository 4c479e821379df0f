"""Recipes: what a TOML or JSON file asks for, and the same as plain data.

max_seconds = 60            # optional: batch_size, measure_latency, compute, force, max_seconds, refine
[layers."rel.*"]            # a glob of layer names; of several the first match holds
method = "cp"               # cp, tucker, dense, auto, or keep to leave the layer alone
rank = 64                   # of Tucker [16, 32, 32]; or max_size = 0.25, or max_error = 0.05 and on = "output";
                            # of auto, max_size, max_error or metric_drop
quantize = "int8"           # optional, as is seed (cp)
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_type_hints

from .._io import STRICT, path_of, read_plain
from ..errors import ConfigError
from ._methods import CONFIGS, AutoConfig, Config, DenseConfig, MaxError, MaxSize, TuckerConfig
from ._options import TEXT_OPTIONS, PlanOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TARGETS = ("rank", "max_error", "max_size", "metric_drop")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Globs to configs (None leaves a layer alone), and options of `plan`."""

    configs: Mapping[str, Config | None]
    options: Mapping[str, Any]


def by_glob(config: object) -> dict[str, Config | None]:
    """Globs to configs; a single config holds for every name. Raises: ConfigError for anything else, or for none."""
    configs: dict[str, Any] = dict(config) if isinstance(config, Mapping) else {"*": config}
    if not configs:
        raise ConfigError("`config` should have at least one glob. Found an empty mapping.")
    for pattern, value in configs.items():
        leaves_alone = value is None and isinstance(config, Mapping)
        if not isinstance(pattern, str) or not (leaves_alone or isinstance(value, tuple(CONFIGS.values()))):
            names = ", ".join(kind.__name__ for kind in CONFIGS.values())
            raise ConfigError(
                f"`config` should be one of {names}, or a mapping of globs to "
                f"them (or to None, which leaves a layer alone). Found {pattern!r}: {value!r}."
            )
    return configs


def read_recipe(path: Path) -> Recipe:
    """The recipe in a .toml or .json file.

    Raises: ConfigError where it cannot be read or is not such a recipe; the message has the key's path in the file.
    """
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"A configuration file should end in .toml or .json. Found {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{str(path)!r} should be valid {path.suffix[1:].upper()}. Found: {error}.") from error
    try:
        return parse_recipe(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_recipe(data: object) -> Recipe:
    """The recipe in plain data, say in `Report.config`. Raises: ConfigError as `read_recipe`."""
    whole: Any = read_plain(_file(), data, ConfigError)
    configs = {glob: _config(f"{path_of(('layers', glob), data)}: ", table) for glob, table in whole.layers.items()}
    if not configs:
        raise ConfigError('layers: should have at least one table, say [layers."*"]. Found none.')
    if whole.include not in (None, "*", ["*"]):  # include and exclude are of recipes before version 3 of the report
        if len(configs) > 1:
            raise ConfigError(
                "include: should become globs under layers, a table each. Found it next to several globs."
            )
        configs = dict.fromkeys(_listed(whole.include), *configs.values())
    configs = {**dict.fromkeys(_listed(whole.exclude)), **configs}
    options = {name: getattr(whole, name) for name in TEXT_OPTIONS if getattr(whole, name) is not None}
    return Recipe(configs=configs, options=options)


def parse_config(data: object) -> Config | None:
    """The config in the plain data of one table. Raises: ConfigError as `read_recipe`."""
    return _config("", read_plain(_table_of_any_method(), data, ConfigError))


def _listed(globs: str | list[str] | None) -> list[str]:
    return [globs] if isinstance(globs, str) else globs or []


@cache
def _file() -> Any:
    """The dataclass of a whole file."""
    globs = (str | list[str] | None, None)
    hints = get_type_hints(PlanOptions)
    options = [(name, hints[name] | None, None) for name in TEXT_OPTIONS]
    layers = ("layers", dict[str, _table_of_any_method()])  # type: ignore[misc]  # made at run time
    return _strict("file", [layers, *options, ("include", *globs), ("exclude", *globs)])


@cache
def _table_of_any_method() -> Any:
    from pydantic import Field

    tables = [_table(method, kind) for method, kind in CONFIGS.items()]
    keep = _strict("keep", [("method", Literal["keep"])])
    return Annotated[Union[(*tables, keep)], Field(discriminator="method")]


def _table(method: str, kind: Any) -> type:
    """The dataclass of one method's table: the fields of its config, and the ways to say how small or exact."""
    hints, own = get_type_hints(kind), list[Any]()
    for one in fields(kind):
        if one.name == "rank":
            own.append(("rank", get_args(hints["rank"])[0] | None, None))  # without the targets
        elif one.name not in ("error", "size"):
            own.append((one.name, hints[one.name], field(default=one.default)))
    if kind is not DenseConfig:
        own += [("max_error", float | None, None), ("on", Literal["weight", "output"] | None, None)]
        own += [("max_size", float | None, None)]
    if kind is TuckerConfig:
        own.append(("cost", Literal["bytes"] | None, None))  # the only one left; older recipes may name it
    return _strict(method, [("method", Literal[method]), *own])


def _strict(name: str, columns: list[Any]) -> type:
    return make_dataclass(name, columns, kw_only=True, namespace={"__pydantic_config__": STRICT})


def _config(where: str, table: Any) -> Config | None:
    """The config that a table asks for; `where` begins the messages."""
    given = {name: value for name, value in vars(table).items() if value is not None and name != "cost"}
    method, ways = given.pop("method"), [name for name in _TARGETS if hasattr(table, name)]
    used = [name for name in ways if name in given]
    if ways and len(used) != 1:
        raise ConfigError(f"{where}{method} takes one of {', '.join(ways)}. Found {', '.join(used) or 'none'}.")
    on = given.pop("on", None)
    if on is not None and used != ["max_error"]:
        raise ConfigError(f"{where}`on` says what max_error counts on. Found no max_error.")
    if method == "keep":
        return None
    try:
        if "max_error" in given:
            error = given.pop("max_error")
            if method == "auto":  # a number leaves open what it counts on
                given["error"] = error if on is None else MaxError(error, on)
            else:
                given["rank"] = MaxError(error, on or "weight")
        if "max_size" in given:
            size = given.pop("max_size")
            given |= {"size": size} if method == "auto" else {"rank": MaxSize(size)}
        made: Config = CONFIGS[method](**given)
    except ConfigError as problem:
        raise ConfigError(f"{where}{problem}") from problem
    return made


def plain(configs: Mapping[str, Config | None], options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `parse_recipe`: strings, numbers, lists and dicts, without what is left at its default."""
    return {"layers": {glob: _entry(config) for glob, config in configs.items()}, **options}


def _entry(config: Config | None) -> dict[str, Any]:
    if config is None:
        return {"method": "keep"}
    entry: dict[str, Any] = {"method": next(name for name, kind in CONFIGS.items() if isinstance(config, kind))}
    for one in fields(config):
        value = getattr(config, one.name)
        if one.default is not MISSING and value == one.default:
            continue
        if isinstance(value, MaxError):
            entry["max_error"] = value.error
            if value.on != "weight" or isinstance(config, AutoConfig):
                entry["on"] = value.on
        elif isinstance(value, MaxSize):
            entry["max_size"] = value.fraction
        elif one.name in ("error", "size"):
            entry[f"max_{one.name}"] = value
        else:
            entry[one.name] = list(value) if isinstance(value, tuple) else value
    return entry
