"""What in a model refers to a layer besides the registered submodules: it would go on using the old one."""

from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType

from torch import nn


def plain_reference(model: nn.Module, layer: nn.Module) -> str | None:
    """The attribute of the model that refers to the layer outside the registered submodules, or None.

    The layer's own attributes do not count: they go with it.
    """
    return _attribute(model, lambda value: _holds(value, {id(layer)}, set()), besides=layer)


def function_reference(model: nn.Module, names: Iterable[str]) -> str | None:
    """The attribute of the model with a function in it that refers to a module with one of these names, or None.

    A module that holds such a one counts too. A copy of the model has the very same function: it would go on running
    the original.
    """
    there = dict(model.named_modules(remove_duplicate=False))
    parts = (name.split(".") for name in names)
    holders = {".".join(path[:count]) for path in parts for count in range(len(path) + 1)}
    modules = {id(there[name]) for name in holders if name in there}
    return _attribute(model, lambda value: _holds(value, modules, set(), False))


def _attribute(model: nn.Module, fits: Callable[[object], bool], besides: nn.Module | None = None) -> str | None:
    for prefix, module in model.named_modules():
        for attribute, value in vars(module).items() if module is not besides else ():
            if attribute != "_modules" and fits(value):
                return f"the attribute {f'{prefix}.{attribute}' if prefix else attribute!r}"
    return None


def _holds(value: object, modules: Container[int], seen: set[tuple[int, bool]], counts: bool = True) -> bool:
    """Whether a value is one of these modules, by id, or has it in containers, partials, methods or functions.

    It `counts`, or else only inside a function, that is in what it closes over and its defaults.
    """
    if counts and id(value) in modules:
        return True
    if (id(value), counts) in seen:
        return False
    seen.add((id(value), counts))
    parts: Iterable[object] = ()
    match value:
        case dict():
            parts = [*value.keys(), *value.values()]
        case list() | tuple() | set() | frozenset():
            parts = value
        case partial():
            parts = [value.func, value.args, value.keywords, vars(value)]
        case MethodType():
            parts = [value.__self__, value.__func__]
        case FunctionType():
            counts = True
            parts = [value.__defaults__, value.__kwdefaults__, vars(value), value.__closure__]
        case CellType():
            with suppress(ValueError):  # an empty one
                parts = [value.cell_contents]
    return any(_holds(part, modules, seen, counts) for part in parts)
