"""An adapter: how a foreign module holds a bilinear weight; and the module that replaces such a one."""

import functools
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from ...errors import ConfigError
from .._base import CompressedBilinear

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

COMPRESSED = "compressed"  # the attribute of the new module that holds the layer


@dataclass(frozen=True, eq=False)
class Adapter:
    """How a foreign module holds one bilinear weight, or several.

    Attributes:
        name: the adapter's name in a saved file.
        to_weight: from the module to its weight (O, I, J), computed from its parameters by differentiable operations;
            by the name of the layer that stands for it, "" of an only one.
        call: `call(module, layer, *args, **kwargs)` gives what `module.method(*args, **kwargs)` gave, with `layer` (a
            `CompressedBilinear`) in place of the weight; of several a mapping by their names.
        to_bias: from the module to the bias (O,) of a layer, or to None; by the names of those that have one.
        example: from the module to arguments of a call, to verify and time it without calibration data; or None.
        kind: the class that it is registered for, by which it is pickled: functions may be lambdas. None of a form that
            is recognised by structure.
        method: the name of the method that `call` takes the place of.
    """

    name: str
    to_weight: Mapping[str, Callable[[Any], Tensor]]
    call: Callable[..., Any]
    to_bias: Mapping[str, Callable[[Any], Tensor | None]]
    example: Callable[[Any], Any] | None = None
    kind: type[nn.Module] | None = None
    method: str = "forward"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapter":
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol) if self.kind is None else (_registered, (self.kind,))


REGISTERED: dict[type[nn.Module], Adapter] = {}
"""The adapters that users registered, by their class."""


def _registered(kind: type[nn.Module]) -> Adapter:
    if kind not in REGISTERED:
        raise ConfigError(f"{kind.__name__} should be registered by `register_adapter` before it is unpickled.")
    return REGISTERED[kind]


class AdaptedBilinear(nn.Module):
    """Mixin of a rebuilt foreign module: the same class, with its weight in `compressed`.

    Attributes:
        compressed: the layer that holds the weight; of several an `nn.ModuleDict`.
    """

    compressed: CompressedBilinear | nn.ModuleDict
    _adapter: Adapter

    @property
    def adapter_name(self) -> str:
        """The name of the adapter that replaced the weight."""
        return self._adapter.name

    def extra_repr(self) -> str:
        try:
            return super().extra_repr()
        except AttributeError:  # the class may show the shape of its weight
            return ""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            method = type(self)._made_of[1]  # type: ignore[attr-defined]
            raise AttributeError(
                f"{error}. If it held the weight: that is in `compressed` now, by which {method!r} alone is computed. "
                "Where several methods read it, have them call one that does, and register that one by `method=`."
            ) from error

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, type(self)._made_of, dict(self.__dict__)  # type: ignore[attr-defined]


@functools.cache
def _adapted_class(kind: type[nn.Module], method: str) -> type[nn.Module]:
    """A subclass of `kind` that has its adapter's call as this method."""

    @functools.wraps(getattr(kind, method))
    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._adapter.call(self, self.compressed, *args, **kwargs)

    own = {method: replaced, "_made_of": (kind, method), "__module__": kind.__module__, "__doc__": kind.__doc__}
    return types.new_class(f"Compressed{kind.__name__}", (AdaptedBilinear, kind), {}, lambda names: names.update(own))


def _blank(kind: type[nn.Module], method: str = "forward") -> nn.Module:
    adapted = _adapted_class(kind, method)  # type: ignore[arg-type]
    new: nn.Module = adapted.__new__(adapted)
    return new


def only(layers: Mapping[str, CompressedBilinear]) -> Any:
    """The layers as an adapter's `call` takes them."""
    return layers.get("", layers)


def split_name(name: str) -> tuple[str, str]:
    """Of a layer in a rebuilt module: the name of the module, and that of the layer in it, "" of an only one."""
    module, found, key = f".{name}.".rpartition(f".{COMPRESSED}.")
    return (module[1:], key[:-1]) if found else (name, "")


def rebuilt(shell: nn.Module, adapter: Adapter, layers: dict[str, CompressedBilinear]) -> nn.Module:
    """Turn `shell`, which lacks the parameters of the weights, into the module that has `layers` instead."""
    shell.__class__ = _adapted_class(type(shell), adapter.method)  # type: ignore[arg-type]  # a class can be hashed
    shell.__dict__["_adapter"] = adapter
    shell.register_module(COMPRESSED, layers.get("") or nn.ModuleDict(layers))
    return shell


def without(module: nn.Module, parameters: Collection[str]) -> nn.Module:
    """A module without these parameters that shares everything else with `module`."""
    new = type(module).__new__(type(module))
    new.__dict__.update(module.__dict__)
    new._parameters = {name: value for name, value in module._parameters.items() if name not in parameters}
    new._buffers, new._modules = dict(module._buffers), dict(module._modules)
    for name, child in module._modules.items():
        own = {key.removeprefix(f"{name}.") for key in parameters if key.startswith(f"{name}.")}
        if child is None or not own:
            continue
        if own >= {key for key, _ in child.named_parameters(remove_duplicate=False)} and not list(child.buffers()):
            del new._modules[name]  # it would be empty
        else:
            new._modules[name] = without(child, own)
    return new
