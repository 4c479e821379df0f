"""Data in and out: files are written whole or not at all, and plain data is read strictly into dataclasses."""

import json
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from .errors import CompressionError, nearest

_Record = TypeVar("_Record")

STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""What a dataclass has as `__pydantic_config__` so that no key is ignored and no value is converted; it also holds for
the dataclasses inside it."""


def read_plain(kind: type[_Record], data: object, error: type[CompressionError] = CompressionError) -> _Record:
    """The record that plain data describes.

    Args:
        kind: a dataclass with `STRICT`, or a type that is made of such.
        data: dicts, lists, strings, numbers, truth values and None.
        error: what to raise.

    Raises: `error` for a key that is missing or unknown, or a value of another type. The message starts with the place:
        "layers[0].rank: Input should be a valid integer. Found 'many'." Of an unknown key it names the most similar.
    """
    from pydantic import ValidationError  # takes a quarter of a second: loaded where it is needed

    try:
        return _adapter(kind).validate_json(json.dumps(data, default=str))  # type: ignore[arg-type]  # a class is hashable
    except ValidationError as problem:
        raise error(_explained(problem.errors(include_url=False), data, kind)) from problem
    except (TypeError, ValueError, RecursionError) as problem:
        raise error(f"The data should be as JSON holds it. Found: {problem}") from problem


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _explained(problems: Sequence[Any], data: object, kind: Any) -> str:
    """One of pydantic's errors as a message: an unknown key first, for it may be a key that is missing, misspelt."""
    one = max(problems, key=lambda one: (one["type"] == "unexpected_keyword_argument", len(one["loc"])))
    loc, context = one["loc"], one.get("ctx", {})
    place, message = path_of(loc, data), f"{one['msg']}. Found {reprlib.repr(one['input'])}."
    match one["type"]:
        case "missing":
            place, message = _joined(place, loc[-1]), "is required. Found none."
        case "unexpected_keyword_argument":
            schema = _adapter(kind).json_schema()
            keys = [key for one in (schema, *schema.get("$defs", {}).values()) for key in one.get("properties", ())]
            message = "unknown here." if loc[-1] in keys else f"unknown.{nearest(loc[-1], keys)}"
        case "union_tag_not_found":
            place = _joined(place, context["discriminator"].strip("'"))
            message = f"is required. Found only {', '.join(map(str, one['input'])) or 'an empty table'}."
        case "union_tag_invalid":
            place = _joined(place, context["discriminator"].strip("'"))
            message = f"should be one of {context['expected_tags']}. Found {context['tag']!r}."
        case "value_error":
            message = str(context["error"])
    return f"{place}: {message}" if place else message


def path_of(keys: Sequence[int | str], data: Any) -> str:
    """A place in plain data, such as `layers."rel.*".rank[0]`, without the keys that the data does not have.

    These are the names that pydantic gives to the members of a union.
    """
    place = ""
    for key in keys:
        index = isinstance(key, int) and isinstance(data, (list, tuple)) and key < len(data)
        if index or (isinstance(data, Mapping) and key in data):
            data, place = data[key], _joined(place, key)
    return place


def _joined(place: str, key: int | str) -> str:
    if isinstance(key, int):
        return f"{place}[{key}]"
    bare = re.fullmatch(r"[A-Za-z0-9_-]+", key) is not None
    return f"{place}.{key if bare else json.dumps(key, ensure_ascii=False)}".removeprefix(".")


@contextmanager
def written_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, to be written inside the block; it is renamed to `path` when the block ends well.

    Whatever fails, `path` is as it was and the temporary file is gone.

    Raises: CompressionError where the folder does not exist, or `path` is no regular file.
    """
    target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    check_target(target)
    temporary = target.with_name(f".{uuid4().hex}.tmp")
    temporary.touch(exist_ok=False)
    mode = (target if target.exists() else temporary).stat().st_mode & 0o777
    try:
        yield temporary
        os.chmod(temporary, mode)  # some writers make files that only their owner can read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_target(target: Path) -> None:
    """Raise CompressionError where a file cannot be written: no folder, a read-only one, or no regular file."""
    if not target.parent.is_dir():
        raise CompressionError(f"The folder of {str(target)!r} should exist. Found no folder {str(target.parent)!r}.")
    if not os.access(target.parent, os.W_OK):
        raise CompressionError(
            f"The folder of {str(target)!r} should be writable. Found one that is not: name another."
        )
    if target.exists() and not target.is_file():
        found = "a folder" if target.is_dir() else "a device, pipe or socket"
        raise CompressionError(f"{str(target)!r} should be a file to write. Found {found}.")
