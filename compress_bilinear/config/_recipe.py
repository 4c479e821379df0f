"""Configs as text: what a TOML or JSON file says, and the same as plain data.

max_seconds = 60            # optional: batch_size, measure_latency, compute, force, max_seconds
[layers."rel.*"]            # a glob of layer names; of several the first match holds
method = "cp"               # cp, tucker, dense, auto, or keep to leave the layer alone
rank = 64                   # of Tucker [16, 32, 32]; or max_error = 0.05, or max_size = 0.25
quantize = "int8"           # optional, as is seed (cp)
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError, nearest
from ._methods import AutoConfig, Config, CPConfig, DenseConfig, MaxError, MaxSize, TuckerConfig
from ._options import TEXT_OPTIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_KINDS: dict[str, Any] = {"cp": CPConfig, "tucker": TuckerConfig, "dense": DenseConfig, "auto": AutoConfig}
METHODS = tuple(_KINDS)
"""Their names, here and on the command line."""

_TARGETS = {"max_error": ("error", MaxError), "max_size": ("size", MaxSize)}  # the field of an AutoConfig; the class


def by_glob(config: object) -> dict[str, Config | None]:
    """Globs to configs; a single config holds for every name. Raises: ConfigError for anything else, or for none."""
    configs: dict[str, Any] = dict(config) if isinstance(config, Mapping) else {"*": config}
    if not configs:
        raise ConfigError("`config` should have at least one glob. Found an empty mapping.")
    for pattern, value in configs.items():
        left = value is None and config is not None
        if not isinstance(pattern, str) or not (left or isinstance(value, tuple(_KINDS.values()))):
            raise ConfigError(
                "`config` should be a CPConfig, TuckerConfig, DenseConfig or AutoConfig, or a mapping of globs to "
                f"them. Found {pattern!r}: {value!r}."
            )
    return configs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a file asks for: globs to configs, and arguments of `surgery.plan`."""

    configs: Mapping[str, Config | None]
    options: Mapping[str, Any]


def read_recipe(path: Path) -> Recipe:
    """The recipe in a .toml or .json file.

    Raises: ConfigError where it cannot be read or is not such a recipe; the message has the key's path in the file.
    """
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"A configuration file should end in .toml or .json. Found {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} should be a file of text to read. Found: {error}.") from error
    except (ValueError, RecursionError) as error:
        kind = path.suffix[1:].upper()
        raise ConfigError(f"{str(path)!r} should be valid {kind}. Found: {error}.") from error
    try:
        return parse_recipe(data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_recipe(data: object) -> Recipe:
    """The recipe in plain data, say in `Report.config`. Raises: ConfigError as `read`."""
    found = dict(_table(data, "the file"))
    narrowing = {name: found.pop(name) for name in ("include", "exclude") if name in found}
    top = ("layers", *TEXT_OPTIONS)
    for name in found:
        if name not in top:
            raise ConfigError(f"{_key(name)}: unknown.{nearest(name, top)} A file takes {', '.join(top)}.")
    layers = _table(found.pop("layers", None), "layers")
    if not layers:
        raise ConfigError('layers: should have at least one table, say [layers."*"]. Found none.')
    for name, value in found.items():
        allowed = TEXT_OPTIONS[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            wanted = " or ".join(kind.__name__ for kind in allowed)
            raise ConfigError(f"{name}: should be of type {wanted}. Found {value!r}.")
        if isinstance(value, list) and not all(isinstance(one, str) for one in value):
            raise ConfigError(f"{name}: should hold strings. Found {value!r}.")
    configs = {glob: _config(_path("layers", glob), layers[glob]) for glob in layers}
    return Recipe(configs=_narrowed(configs, **narrowing), options=found)


def _narrowed(configs: dict[str, Config | None], include: Any = (), exclude: Any = ()) -> dict[str, Config | None]:
    """The same with `exclude` and `include` of files of earlier versions written as globs."""
    include, exclude = ((one,) if isinstance(one, str) else tuple(one) for one in (include, exclude))
    if include and include != ("*",):
        if len(configs) != 1:
            raise ConfigError('include: write its globs under [layers] instead, a table each. Found "include" there.')
        (config,) = configs.values()
        configs = dict.fromkeys(include, config)
    return {**dict.fromkeys(exclude), **configs}


def _names(kind: type[Config]) -> list[str]:
    """The keys of a method besides its targets and what these count on."""
    return [field.name for field in fields(kind) if field.name not in ("error", "size")]


_KEYS = ("method", *dict.fromkeys(name for kind in _KINDS.values() for name in _names(kind)), *_TARGETS, "on")
"""Of any method."""


def _config(where: str, data: object) -> Config | None:
    found = dict(_table(data, where))
    if found == {"method": "keep"}:
        return None
    if found.pop("cost", "bytes") != "bytes":  # files of earlier versions may have it
        raise ConfigError(f"{where}.cost: ranks are always chosen by stored bytes. Leave it out.")
    for name in found:  # before a key that is missing is asked for: this may be it
        if name not in _KEYS:
            raise ConfigError(f"{_path(where, name)}: unknown.{nearest(name, _KEYS)}")
    method = found.pop("method", None)
    if method not in METHODS:
        listed = f"{', '.join(METHODS)}. Found {method!r}.{nearest(method, METHODS)}"
        raise ConfigError(f"{where}.method: should be one of {listed}")
    kind = _KINDS[method]
    names = _names(kind)
    ways = (["rank"] if "rank" in names else []) + ([] if kind is DenseConfig else [*_TARGETS])
    given = [name for name in ways if name in found]
    if ways and len(given) != 1:
        listed = ", ".join(given) or "none"
        raise ConfigError(f"{where}: {method} takes one of {', '.join(ways)}. Found {listed}.")
    names += [name for name in ways if name not in names] + (["on"] if "max_error" in given else [])
    for name in found:
        if name not in names:
            raise ConfigError(f"{_path(where, name)}: unknown. {method} takes method, {', '.join(names)}.")
    arguments: dict[str, Any] = {}
    on = found.pop("on", None)
    for name, value in found.items():
        if name not in _TARGETS:
            arguments[name] = tuple(value) if isinstance(value, list) else value
            continue
        try:
            field, target = _TARGETS[name]
            made = target(value) if on is None else MaxError(value, on)
            if kind is not AutoConfig:
                arguments["rank"] = made
            else:  # to which a bare number leaves what it counts on
                arguments[field] = value if on is None else made
        except ConfigError as error:
            at = "on" if "`on`" in str(error) else name
            raise ConfigError(f"{where}.{at}: {error}") from error
    try:
        made_config: Config = kind(**arguments)
    except ConfigError as error:
        named = next((name for name in found if f"`{name}" in str(error)), None)
        raise ConfigError(f"{where if named is None else _path(where, named)}: {error}") from error
    return made_config


def _table(data: object, what: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        found = "none" if data is None else repr(data)
        raise ConfigError(f"{what}: should be a table. Found {found}.")
    return data


def _path(*keys: str) -> str:
    return ".".join([keys[0], *(_key(key) for key in keys[1:])])


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def plain(configs: Mapping[str, Config | None], options: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `parse`: strings, numbers, lists and dicts, without what is left at its default."""
    layers = {glob: _entry(config) for glob, config in configs.items()}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return {"layers": layers, **listed}


def _entry(config: Config | None) -> dict[str, Any]:
    if config is None:
        return {"method": "keep"}
    entry: dict[str, Any] = {"method": next(name for name, kind in _KINDS.items() if isinstance(config, kind))}
    for name, value in _given(config):
        if isinstance(value, MaxError):
            entry["max_error"] = value.error
            if value.on != "weight" or isinstance(config, AutoConfig):
                entry["on"] = value.on
        elif isinstance(value, MaxSize):
            entry["max_size"] = value.fraction
        elif name in ("error", "size"):
            entry[f"max_{name}"] = value
        else:
            entry[name] = list(value) if isinstance(value, tuple) else value
    return entry


def _given(config: Any) -> list[tuple[str, Any]]:
    """The fields that are not at their defaults."""
    pairs = [(field, getattr(config, field.name)) for field in fields(config)]
    return [(field.name, value) for field, value in pairs if field.default is MISSING or value != field.default]
