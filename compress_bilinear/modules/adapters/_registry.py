"""The adapters that users register, and the adapter of a module."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ...errors import ConfigError
from .._base import CompressedBilinear
from ._adapter import COMPRESSED, REGISTERED, AdaptedBilinear, Adapter
from ._module import AdaptedModule
from ._recognition import recognise

_Module = TypeVar("_Module", bound=nn.Module)


def register_adapter(
    kind: type[_Module],
    *,
    to_weight: Callable[[_Module], Tensor] | Mapping[str, Callable[[_Module], Tensor]],
    call: Callable[..., Any],
    to_bias: Callable[[_Module], Tensor | None] | Mapping[str, Callable[[_Module], Tensor | None]] | None = None,
    example: Callable[[_Module], Any] | None = None,
    method: str = "forward",
) -> None:
    """Say how modules of a class hold a bilinear weight, so that `plan`, `compress` and `load` treat them as layers.

    A replacement is of the same class, with all the module's other parts, but without the parameters of `to_weight`
    and `to_bias`; in their place its attribute `compressed` holds a `CPBilinear`, `TuckerBilinear` or `DenseBilinear`,
    or several by their names. Before anything is replaced, the module's own method and `call` around the exact weight
    are compared in float64, on a first batch or on `example`; where they differ the layer is kept, and it is told how.

    Args:
        kind: the class itself; its subclasses, which may do otherwise, are registered by themselves. Registering a
            class again replaces what was said before.
        to_weight: from a module to its weight (O, I, J), by differentiable operations on its parameters: these are
            what is replaced. A module with several has a mapping of such functions by names of the layers, which are
            chosen and reported by themselves; where some are kept, they are exact layers beside those replaced.
        call: `call(module, layer, *args, **kwargs)` gives what `module.method(*args, **kwargs)` gave. `layer` has no
            more than the weight and the bias: `layer(x1, x2)` evaluates rows, `layer.pairwise(x1, x2)` all pairs,
            `layer.pairwise_sum(x1, x2)` pairs of sums of products, `layer.blockwise(x1, x2)` a sum over blocks and
            `layer.indexed(x1, index)` a one-hot second input. It must not touch what was replaced. Of several weights
            `layer` is a mapping, by the same names.
        to_bias: from a module to its bias (O,), or to None; of several weights, a mapping with those that have one.
        example: from a module to the arguments of a call (a tensor, a tuple, or a dict of keywords); needed where there
            is no calibration data.
        method: the method that uses the weight, where that is another than `forward`: "scoring_function", say. All
            others stay as they are; one that reads the weight itself raises AttributeError.

    Raises: ConfigError where an argument is of another type, or the class has no such method.
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module) or issubclass(kind, (nn.Bilinear, *_OURS)):
        raise ConfigError(f"`kind` should be a class of nn.Module, other than nn.Bilinear. Found {kind!r}.")
    weights: dict[str, Any] = {**to_weight} if isinstance(to_weight, Mapping) else {"": to_weight}
    biases: dict[str, Any] = {**to_bias} if isinstance(to_bias, Mapping) else {"": to_bias} if to_bias else {}
    stated = {"to_weight": weights.values(), "to_bias": biases.values(), "call": [call], "example": [example or call]}
    for what, value in ((what, value) for what, values in stated.items() for value in values):
        if not callable(value):
            raise ConfigError(f"`{what}` should be a function. Found {value!r}.")
    taken = {*dir(nn.ModuleDict()), COMPRESSED}
    wrong = [key for key in weights if isinstance(to_weight, Mapping) and (not key.isidentifier() or key in taken)]
    if wrong or not weights or biases.keys() - weights.keys():
        raise ConfigError(
            "`to_weight` should name its layers as attributes could be, and `to_bias` only the same. "
            f"Found {wrong or sorted(weights)}, and {sorted(biases)}."
        )
    if not callable(getattr(kind, str(method), None)):
        raise ConfigError(f"`method` should be the name of a function of {kind.__name__}. Found {method!r}.")
    REGISTERED[kind] = Adapter(kind.__name__, weights, call, biases, example, kind, method)


_OURS = (CompressedBilinear, AdaptedBilinear)


def adapted_module(module: nn.Module) -> AdaptedModule | None:
    """The module with its adapter, if its class is registered or its form is recognised by structure.

    Raises: ConfigError where a registered adapter does not fit the module.
    """
    if isinstance(module, _OURS):
        return None
    kind = type(module).__mro__[1] if is_parametrized(module) else type(module)
    adapter = REGISTERED.get(kind)
    if adapter is None:
        form = recognise(module)
        adapter = None if form is None else form.adapter()
    return None if adapter is None else AdaptedModule(module, adapter)
