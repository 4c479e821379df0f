"""Copies of a module with other tensors, and the comparison of what two modules give."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ...errors import ConfigError

_EXACT = 1e-10  # largest relative difference of two equal outputs; both are computed in float64


def copied(module: nn.Module, make: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy whose tensors are `make` of the original's; no memory but theirs is taken.

    Raises: ConfigError where it cannot be copied.
    """
    kind = type(module).__name__
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise ConfigError(f"The parameters of {kind} should be initialised. Found lazy ones: run the model once.")
        memo[id(parameter)] = nn.Parameter(make(parameter.detach()), parameter.is_floating_point())
    for part in module.modules():
        for value in (*part._buffers.values(), *vars(part).values()):
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = make(value.detach())
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ConfigError(f"{kind} should be a module that can be copied. Found {described(error)}") from error


def double(tensor: Tensor) -> Tensor:
    """A float64 copy on the CPU; integers stay integers."""
    return tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def difference(expected: Any, found: Any) -> str | None:
    """How two outputs, which hold tensors in any containers, differ; None where they are the same."""
    (first, structure), (second, other) = tree_flatten(expected), tree_flatten(found)
    if structure != other:
        return f"it gives {structure}, not {other}"
    return next(filter(None, map(_leaf_difference, first, second)), None)


def _leaf_difference(expected: Any, found: Any) -> str | None:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        same = type(expected) is type(found) and expected == found
        return None if same else f"it gives {expected!r}, not {found!r}"
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"it gives {tuple(expected.shape)} {expected.dtype}, not {tuple(found.shape)} {found.dtype}"
    if torch.equal(expected, found):
        return None
    expected, found = expected.double(), found.double()
    scale = expected[expected.isfinite()].norm(torch.inf).item()
    if torch.allclose(expected, found, rtol=0, atol=_EXACT * scale):  # masks may have put infinities in both
        return None
    error = (expected - found).norm(torch.inf).item()
    return f"they differ by {error / max(scale, 1e-300):.2g} of the largest output"


def described(error: Exception) -> str:
    """An exception as messages name it."""
    return f"{type(error).__name__}: {error}"
