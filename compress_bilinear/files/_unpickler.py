"""Unpickling that runs no code of a file: what is no tensor or plain container becomes a `Placeholder`."""

import pickle
import sys
from pathlib import Path
from typing import Any

import torch


class Placeholder(dict[Any, Any]):
    """What stands for any other object, as an instance of a class of its name. It keeps only a dict's items."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key

    def __init__(self, *args: Any, **named: Any) -> None: ...

    def __call__(self, *args: Any, **named: Any) -> "Placeholder":
        return self

    append = extend = add = __call__

    def __str__(self) -> str:
        return f"{type(self).__module__}.{type(self).__qualname__}"


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": dict,
    "torch.storage.UntypedStorage": torch.UntypedStorage,  # torch.load compares with it
    "torch._utils._rebuild_tensor_v2": lambda *args: torch._utils._rebuild_tensor(*args[:4]),  # not hooks and the like
    "torch._utils._rebuild_tensor_v3": lambda storage, offset, size, stride, grad, hooks, dtype, *rest: (
        torch._utils._rebuild_tensor_v3(storage, offset, size, stride, False, {}, dtype)
    ),
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._tensor._rebuild_from_type_v2": lambda make, kind, args, state: make(*args),
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}
"""What a file may call, by the name that it has there: nothing else is looked up anywhere."""


class Unpickler(pickle._Unpickler):
    """Calls only what is in `_KNOWN`, classes of placeholders and these, and sets no attribute of anything."""

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: lambda self: self.stack.pop()}

    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get(f"{module}.{name}") or type(name, (Placeholder,), {"__module__": module})

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("a class by its number, which a program may have registered")


def load(file: Any, **options: Any) -> Any:
    """As of `pickle`, in whose place `torch.load` takes this module."""
    return Unpickler(file, **options).load()


def load_with_placeholders(path: Path, mmap: bool) -> Any:
    """What torch.save wrote, and no TorchScript archive; with `mmap`, tensors are views of the file."""
    module = sys.modules[__name__]
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module, mmap=mmap)
