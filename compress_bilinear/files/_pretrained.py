"""Compressed layers in models of transformers, whose `from_pretrained` makes the network that a config describes."""

import copy
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._io import read_plain
from ..errors import CheckpointError
from ..modules import CompressedBilinear, FoundLayer, find, has_other_state, replacements, split_name, swap, take_flags
from ._checkpoint import describe, target_of, use_compute
from ._container import LayerDescription

_WEIGHTS = "transformers_weights"  # of a config: the file of the weights, which transformers has in its message
_REFUSAL = (
    "none, for its layers are compressed: load it by the class that saved it, or another that is derived from "
    "compress_bilinear.PretrainedMixin, as in class Net(PretrainedMixin, PreTrainedModel)"
)


class PretrainedMixin:
    """A base, before `PreTrainedModel` of transformers, for networks whose files keep their compressed layers.

    In `class Net(cb.PretrainedMixin, PreTrainedModel)` nothing else changes. `save_pretrained` also writes the layers'
    description, into the config as `compress_bilinear`. A network of such a config has the layers from `post_init` on,
    with which its `__init__` ends, and `from_pretrained` fills them. Another class would make the layers anew, with
    random values: a compressed network of such a class refuses `save_pretrained`, and transformers, from 4.53 on,
    refuses to load by it what this class saved.

    Raises: CheckpointError where the class does not have the layers of its config, or not as they were.
    """

    config: Any

    def save_pretrained(self, *args: Any, **options: Any) -> Any:
        """As of transformers."""
        model: Any = self
        self.config.compress_bilinear = [asdict(each) for each in describe(model)]
        saved = super().save_pretrained(*args, **options)  # type: ignore[misc]
        path = Path(args[0] if args else options["save_directory"]) / "config.json"
        if any(map(has_other_state, model.modules())) and options.get("is_main_process", True) and path.is_file():
            config = json.loads(path.read_text("utf-8"))
            if "compress_bilinear" in config:  # peft writes no config, and an older one may be there
                text = json.dumps(config | {_WEIGHTS: _REFUSAL}, indent=2, sort_keys=True)
                path.write_text(text + "\n", encoding="utf-8")
        return saved

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
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """As of transformers."""
        path, config = pretrained_model_name_or_path, options.get("config")
        if path and config is not None and hasattr(config, "get_config_dict"):  # it may be another than the weights'
            with suppress(OSError):  # there is none beside the weights
                described = config.get_config_dict(path, **options)[0].get("compress_bilinear", [])
                options["config"] = config = copy.copy(config)
                config.compress_bilinear = described
        try:
            loaded = super().from_pretrained(path, *args, **options)  # type: ignore[misc]
        except ValueError as error:
            if _REFUSAL not in str(error):
                raise
            config = copy.copy(config)
            if hasattr(config, _WEIGHTS):
                delattr(config, _WEIGHTS)
                options["config"] = config
            else:  # the config of the folder has it
                options[_WEIGHTS] = None
            loaded = super().from_pretrained(path, *args, **options)  # type: ignore[misc]
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
