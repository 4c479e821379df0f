"""What in a model refers to its layers besides the registered submodules: it would go on using the old ones."""

import dis
import functools
import gc
from collections.abc import Container, Iterator
from types import CodeType, FunctionType, ModuleType
from weakref import ReferenceType

from torch import nn

_OF_CLASSES = (FunctionType, property, nn.Module)


def reference(model: nn.Module, held: Container[int], besides: Container[int] = ()) -> str | None:
    """The attribute by which a model has one of these modules, given by id, as no registered submodule; or None.

    Followed are containers, objects, weak references, and functions with what they close over, their defaults and the
    globals that they read. Of the modules' classes these are methods and modules: lists of instances, say, run nothing.

    Args:
        besides: modules whose own attributes do not count, by id too.
    """
    there = {id(module) for module in model.modules()}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = [] if id(module) in besides else [vars(module)]
        kinds = [vars(kind) for kind in type(module).__mro__ if not _is_library(kind)]
        own += [{name: value for name, value in kind.items() if isinstance(value, _OF_CLASSES)} for kind in kinds]
        for attribute, value in ((name, value) for each in own for name, value in each.items()):
            # `__init__` does not run again
            if attribute not in ("_modules", "__init__") and _reaches(value, held, there, seen):
                return f"the attribute {f'{prefix}.{attribute}' if prefix else attribute!r}"
    return None


def _reaches(value: object, held: Container[int], there: Container[int], seen: set[int]) -> bool:
    """Whether one of the modules `held` is reached from a value; the model's modules `there` are looked at alone."""
    left = [value]
    while left:
        value = left.pop()
        if id(value) in held:
            return True
        if id(value) in seen or id(value) in there or not gc.is_tracked(value):
            continue
        seen.add(id(value))
        if isinstance(value, FunctionType):
            # functools.wraps copies to it what a module has
            own = [part for name, part in vars(value).items() if name != "_modules"]
            left += [value.__closure__, value.__defaults__, value.__kwdefaults__, *own, *_globals(value)]
        elif isinstance(value, ReferenceType):
            left.append(value())
        elif isinstance(value, nn.Module) or not (isinstance(value, (type, ModuleType)) or _is_library(type(value))):
            left += gc.get_referents(value)
    return False


def _is_library(kind: type | FunctionType) -> bool:
    """Whether it is torch's: its tensors, handles and so on hold no module, or are copied as they should be."""
    return (kind.__module__ or "").partition(".")[0] == "torch"


def _globals(function: FunctionType) -> Iterator[object]:
    """The modules among the globals that a function reads, and the functions beside it that it calls."""
    there = function.__globals__
    for name in () if _is_library(function) else _names(function.__code__):
        value = there.get(name)
        if isinstance(value, nn.Module) or (isinstance(value, FunctionType) and value.__globals__ is there):
            yield value


@functools.cache
def _names(code: CodeType) -> frozenset[str]:
    own = {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
    return frozenset(own).union(*(_names(each) for each in code.co_consts if isinstance(each, CodeType)))
