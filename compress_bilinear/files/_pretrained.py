"""Compressed layers in models of transformers, whose `from_pretrained` makes the network that a config describes."""

from dataclasses import asdict
from typing import Any

from .._io import read_plain
from ..errors import CheckpointError
from ..modules import CompressedBilinear, FoundLayer, find, replacements, split_name, swap, take_flags
from ._checkpoint import describe, target_of, use_compute
from ._container import LayerDescription


class PretrainedMixin:
    """A base, before `PreTrainedModel` of transformers, for networks whose files keep their compressed layers.

    In `class Net(cb.PretrainedMixin, PreTrainedModel)` nothing else changes. `save_pretrained` also writes the layers'
    description, into the config as `compress_bilinear`. A network of such a config has the layers from `post_init` on,
    with which its `__init__` ends, and `from_pretrained` fills them. A compressed network of another class refuses
    `save_pretrained`, for its `from_pretrained` would make layers anew, with random values.

    Raises: CheckpointError where the class does not have the layers of its config, or not as they were.
    """

    config: Any

    def save_pretrained(self, *args: Any, **options: Any) -> Any:
        """As of transformers."""
        self.config.compress_bilinear = [asdict(each) for each in describe(self)]  # type: ignore[arg-type]
        return super().save_pretrained(*args, **options)  # type: ignore[misc]

    def post_init(self) -> None:
        """As of transformers, after the layers that the config describes have been put in place."""
        described = _described(self.config)
        if described:
            model: Any = self
            modules = dict(model.named_modules(remove_duplicate=False))
            found = {(id(each.module), each.key): each for each in find(model)}
            there = {key for key, _ in found}
            layers: list[tuple[FoundLayer, CompressedBilinear]] = []
            for each in described:
                name = split_name(each.name)[0] if each.adapter else each.name
                # a part of the network has the same config; `from_pretrained` looks whether all are there
                if id(modules.get(name)) in there:
                    target = target_of(modules, found, each)
                    layer = each.build(target.layer.weight.device).to(target.layer.weight.dtype)
                    take_flags(layer, target.layer)
                    layers.append((target, layer))
            swap(model, replacements(layers))
        super().post_init()  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """As of transformers."""
        loaded = super().from_pretrained(*args, **options)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        modules = dict(model.named_modules(remove_duplicate=False))
        for each in _described(model.config):
            layer = modules.get(each.name)
            if not isinstance(layer, CompressedBilinear):
                raise CheckpointError(
                    f"{cls.__name__} should have layer {each.label!r}, which its config says is compressed. "
                    f"Found {type(layer).__name__ if layer else 'none'}: load by the class that saved it, and call "
                    "`post_init` after the layer is made."
                )
            use_compute(layer, each)
        return loaded


def _described(config: Any) -> list[LayerDescription]:
    return [read_plain(LayerDescription, each, CheckpointError) for each in getattr(config, "compress_bilinear", ())]
