"""What modules return from `get_extra_state`, as plain data for JSON and as tensors beside it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import reduce
from operator import getitem
from typing import Any

from torch import Tensor

from ..errors import CheckpointError


def without_tensors(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value that JSON holds as it is, without its tensors, which go into `tensors`; see `with_tensors`.

    Raises: CheckpointError for any other value.
    """

    def emptied(value: Any, *place: str | int) -> Any:
        if isinstance(value, Tensor):
            tensors[f"{name}{json.dumps(place)}"] = value
            return None
        if isinstance(value, dict):
            return {key: emptied(each, *place, key) for key, each in value.items()}
        return [emptied(each, *place, key) for key, each in enumerate(value)] if isinstance(value, list) else value

    with suppress(TypeError, ValueError, RecursionError):
        value = emptied(value)
        if json.loads(json.dumps(value)) == value:
            return value
    raise CheckpointError(
        f"State {name!r} should be a tensor or plain data: numbers, strings, tensors, lists, and dicts with strings as "
        f"keys. Found a {type(value).__name__} that JSON does not hold as it is: have get_extra_state return one that "
        "is."
    )


def with_tensors(extra: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Plain data and tensors of a file, where those that are in plain data are put into their places there.

    Raises: CheckpointError where there is no such place.
    """
    whole: dict[str, Any] = {**tensors, **extra}
    for name in tensors:
        holder, _, rest = name.partition("_extra_state[")
        if f"{holder}_extra_state" in extra:
            try:
                *path, last = json.loads(f"[{rest}")
                reduce(getitem, path, whole[f"{holder}_extra_state"])[last] = whole.pop(name)
            except (LookupError, TypeError, ValueError) as error:
                raise CheckpointError(f"Tensor {name!r} should have a place in the extra state. Found none.") from error
    return whole
