"""Swap layers of a model for their replacements."""

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from torch import nn

from ..errors import CompressionError
from ._base import CompressedBilinear
from ._in_model import FoundLayer
from ._references import reference
from ._saving import guard_saving


def check_inplace(model: nn.Module, names: Container[str]) -> None:
    """Raise CompressionError where the layers to replace in place are the model itself, whose name is ""."""
    if "" in names:
        raise CompressionError(
            "`inplace=True` needs a model that contains the layer. Found a model that is itself the "
            f"{type(model).__name__}: use what `inplace=False` returns."
        )


def take_flags(layer: CompressedBilinear, original: nn.Bilinear) -> None:
    """Give a replacement the training flag and the gradient flags of the layer whose place it takes."""
    layer.train(original.training).requires_grad_(original.weight.requires_grad)
    for part in layer._stored():
        part.dtype = original.weight.dtype
    if layer.bias is not None and original.bias is not None:
        layer.bias.requires_grad_(original.bias.requires_grad)


def replacements(
    layers: Iterable[tuple[FoundLayer, CompressedBilinear]], memo: dict[int, Any] | None = None
) -> dict[int, nn.Module]:
    """The modules that replace those of the model, by the ids of these; foreign ones around the layers given.

    With `memo` they have deep copies of what stays in foreign modules, and are put in it.
    """
    groups: dict[int, tuple[FoundLayer, dict[str, CompressedBilinear]]] = {}
    for found, layer in sorted(layers, key=lambda pair: -max(name.count(".") for name in pair[0].names)):  # inner first
        groups.setdefault(id(found.module), (found, {}))[1][found.key] = layer
    new: dict[int, nn.Module] = {}
    for key, (found, own) in groups.items():
        new[key] = own[""] if found.adapted is None else found.adapted.replaced(own, memo)
        new |= {id(each): new[key] for each in found.twins}
        if memo is not None:
            memo |= new
    return new


def swap(model: nn.Module, new: Mapping[int, nn.Module]) -> Callable[[], None]:
    """Replace modules, which are given by id, under all their names. Returns a function that undoes it.

    A failure half way puts back what there was.

    Raises: CompressionError where the model refers to one of them otherwise too, by which it would go on using that.
    """
    held = reference(model, new, new)
    if held is not None:
        raise CompressionError(
            f"Layers to be replaced in {type(model).__name__} should be held by registered submodules alone. Found "
            f"{held} with one: use an nn.ModuleList or the like there, or look the layer up in the model at each call."
        )
    # a new module may itself hold what is replaced
    modules = {id(each): each for tree in (model, *new.values()) for each in tree.modules()}
    places = [
        (parent, key, child)
        for parent in modules.values()
        for key, child in parent._modules.items()
        if child is not None and id(child) in new
    ]

    def undo() -> None:
        for parent, key, child in places:
            parent._modules[key] = child
        guard_saving(model)

    try:
        for parent, key, child in places:
            parent._modules[key] = new[id(child)]
        guard_saving(model)
    except BaseException:
        undo()
        raise
    return undo
