"""Reading a report's records back from plain data: each field is checked against the type that it is declared with."""

import dataclasses
import sys
from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import CompressionError, nearest

_Record = TypeVar("_Record")


def record(
    kind: type[_Record],  # a dataclass of strings, numbers, truth values and tuples of them
    data: object,
    what: str,
    **inner: object,  # fields that have been read already
) -> _Record:
    """The record that `dataclasses.asdict` took apart; lists are tuples again.

    Raises: CompressionError for a field that is missing, unknown, or of another type; numbers are finite, at least 0.
    """
    if not isinstance(data, Mapping):
        raise CompressionError(f"{what} should be an object. Found {data!r}.")
    known = _hints(kind)  # type: ignore[arg-type]  # a class can be hashed
    for name in data:
        if name not in known:
            raise CompressionError(f"{what} should have {', '.join(known)}. Found {name!r}.{nearest(name, known)}")
    needed = {one.name for one in dataclasses.fields(kind) if one.default is dataclasses.MISSING}  # type: ignore[arg-type]
    missing = [name for name in known if name in needed and name not in data]
    if missing:
        raise CompressionError(f"{what} should have {', '.join(missing)}. Found none.")
    found = {name: inner[name] if name in inner else tuples(value) for name, value in data.items()}
    for name, value in found.items():
        if name not in inner:
            check(value, known[name], f"`{name}` of {what}")
    return kind(**found)


def check(value: object, hint: Any, what: str) -> None:
    """Raise CompressionError unless a value is of a type."""
    if not _fits(value, hint):
        raise CompressionError(f"{what} should be {_spelled(hint)}. Found {value!r}.")


def tuples(value: Any) -> Any:
    """A list as a tuple; all else as it is."""
    return tuple(value) if isinstance(value, list) else value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: object, hint: Any) -> bool:
    arguments = get_args(hint)
    match get_origin(hint) or hint:
        case origin if origin in (Union, UnionType):
            return any(_fits(value, one) for one in arguments)
        case origin if origin is Literal:
            return value in arguments
        case origin if origin is tuple:
            if not isinstance(value, tuple):
                return False
            wanted = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
            return len(value) == len(wanted) and all(map(_fits, value, wanted))
        case origin if origin in (int, float):
            allowed = (int,) if origin is int else (int, float)
            number = isinstance(value, allowed) and not isinstance(value, bool)
            return number and 0 <= value <= sys.float_info.max  # type: ignore[operator]
        case origin:
            return isinstance(value, origin)


def _spelled(hint: Any) -> str:
    arguments = get_args(hint)
    match get_origin(hint) or hint:
        case origin if origin in (Union, UnionType):
            return " or ".join(map(_spelled, arguments))
        case origin if origin is Literal:
            return " or ".join(map(repr, arguments))
        case origin if origin is tuple:
            count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} of "
            return f"a list, {count}each {_spelled(arguments[0])}"
        case origin if origin is NoneType:
            return "null"
        case origin:
            return {int: "a whole number, at least 0", float: "a number, at least 0", str: "a string"}.get(
                origin, "true or false"
            )
