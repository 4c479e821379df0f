"""Save and load compressed networks: one safetensors file with a description of the replaced layers.

safetensors holds tensors and strings, so nothing is ever unpickled. The description (which layers were replaced, by
what, of which sizes) and a digest of it and of every tensor are in the file's metadata. The digest finds damage and
careless edits; it is no signature, and does not say who wrote the file.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import discovery
from .errors import CheckpointError, CompressionError
from .files import written_atomically
from .modules import CompressedBilinear, CPBilinear, DenseBilinear, TuckerBilinear

FORMAT_VERSION = 1

METADATA_KEY = "compress_bilinear"
_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class LayerDescription:
    """One replaced layer of a checkpoint; `names` are all its names in the network, "" for the network itself."""

    names: tuple[str, ...]
    method: str
    in1_features: int
    in2_features: int
    out_features: int
    rank: int | tuple[int, int, int] | None
    quantize: str | None
    bias: bool

    @property
    def name(self) -> str:
        return self.names[0]

    def build(self) -> CompressedBilinear:
        """The module on the meta device, without values. Raises: CheckpointError for sizes that no module has."""
        sizes = (self.in1_features, self.in2_features, self.out_features)
        try:
            match self.method:
                case "cp":
                    return CPBilinear(*sizes, self.rank, self.bias, "meta", quantize=self.quantize)  # type: ignore[arg-type]
                case "tucker":
                    return TuckerBilinear(*sizes, self.rank, self.bias, "meta", quantize=self.quantize)  # type: ignore[arg-type]
                case "dense":
                    return DenseBilinear(*sizes, self.bias, "meta", quantize=self.quantize)  # type: ignore[arg-type]
        except (CompressionError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"The description of layer {self.name!r} is not valid: {error}") from error
        raise CheckpointError(
            f"The method of layer {self.name!r} should be 'cp', 'tucker' or 'dense'. Found {self.method!r}."
        )


def describe(model: nn.Module) -> list[LayerDescription]:
    """The compressed layers of a model. Raises: CheckpointError where one has been changed from the inside."""
    names: dict[int, list[str]] = {}
    layers: dict[int, CompressedBilinear] = {}
    inner: set[int] = set()  # the core of a Tucker layer is no layer of the network
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CompressedBilinear):
            names.setdefault(id(module), []).append(name)
            layers[id(module)] = module
            inner |= {id(child) for child in module.modules() if child is not module}
    descriptions = []
    for key, layer in layers.items():
        if key in inner:
            continue
        description = LayerDescription(
            names=tuple(names[key]),
            method=layer.method,
            in1_features=layer.in1_features,
            in2_features=layer.in2_features,
            out_features=layer.out_features,
            rank=layer.rank,
            quantize=layer.quantize,
            bias=layer.bias is not None,
        )
        expected, found = list(description.build().state_dict()), list(layer.state_dict())
        if sorted(expected) != sorted(found):
            raise CheckpointError(
                f"Layer {description.name or '(root)'!r} should hold {', '.join(expected)}. Found {', '.join(found)}: "
                "merge or remove what wraps its inner layers first."
            )
        descriptions.append(description)
    return descriptions


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a compressed network to one safetensors file, atomically.

    Args:
        model: a network that `compress` returned, or any other.
        path: the file; one that exists is replaced once the new one is complete.

    Raises:
        CheckpointError: the state is not all tensors with values, or a compressed layer was changed from the inside.
        CompressionError: the folder does not exist.
    """
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta or torch.nn.parameter.is_lazy(value):
            found = "a tensor without values" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise CheckpointError(f"State {name!r} should be a tensor with values. Found {found}.")
        state[name] = value
    write(state, describe(model), path)


def write(state: Mapping[str, Tensor], layers: Sequence[LayerDescription], path: str | os.PathLike[str]) -> None:
    """Write tensors and the description of the layers among them; see `save`."""
    first_names: dict[object, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in state.items():
        value = value.detach()
        place = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device)
        if value.numel() and place in first_names:
            aliases[name] = first_names[place]
            continue
        first_names[place] = name
        storage = value.untyped_storage().data_ptr()
        # safetensors wants each tensor in storage of its own
        tensors[name] = value.cpu().contiguous() if storage not in storages else value.clone().cpu().contiguous()
        storages.add(storage)
    description = {"version": FORMAT_VERSION, "layers": [asdict(layer) for layer in layers], "aliases": aliases}
    text = json.dumps(description, sort_keys=True)
    metadata = {METADATA_KEY: text, "digest": _digest(text, tensors), "format": "pt"}
    with written_atomically(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"The state could not be written as safetensors: {error}") from error


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[LayerDescription]]:
    """The tensors of a file that `save` wrote, shared ones under all their names, and the replaced layers.

    Raises: CheckpointError for a file that is truncated, foreign, damaged, or of another version.
    """
    tensors, metadata = read_safetensors(path)
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise CheckpointError(
            f"{str(path)!r} should be a file that compress_bilinear.save wrote. Found safetensors without its "
            "description."
        )
    damaged = CheckpointError(
        f"{str(path)!r} should be as compress_bilinear.save wrote it. Found that its description and tensors do not "
        "match their digest: the file was damaged or edited."
    )
    try:
        description = json.loads(text)
        version = description["version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise damaged from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{str(path)!r} should have format version {FORMAT_VERSION}. Found {version!r}.")
    if metadata.get("digest") != _digest(text, tensors):
        raise damaged
    try:
        layers = [_layer(entry) for entry in description["layers"]]
        for alias, name in description["aliases"].items():
            tensors[alias] = tensors[name]
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged from error
    return tensors, layers


def _digest(description: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the description and of every tensor's name, dtype, shape and bits."""
    digest = hashlib.blake2b(description.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _layer(entry: dict[str, Any]) -> LayerDescription:
    rank = entry.pop("rank")
    return LayerDescription(
        names=tuple(entry.pop("names")), rank=tuple(rank) if isinstance(rank, list) else rank, **entry
    )


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of any safetensors file. Raises: CheckpointError where it is none, or truncated."""
    if not Path(path).is_file():
        raise CheckpointError(f"{str(path)!r} should be a file. Found {'a folder' if Path(path).is_dir() else 'none'}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            # clones: aligned, and independent of the file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # not a mapping
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} should be a whole safetensors file. Found one that cannot be read: {error}"
        ) from error


def filled(description: LayerDescription, state: Mapping[str, Tensor]) -> CompressedBilinear:
    """The module of a described layer with its tensors from a file's state.

    Raises: CheckpointError where tensors are missing, too many, or of other shapes or dtypes than described.
    """
    module = description.build()
    prefix = f"{description.name}." if description.name else ""
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    expected = module.state_dict()
    _check_names(expected, own, f"layer {description.name or '(root)'!r}")
    quantized = ("qdata", "scale")  # the names of tensors whose dtypes are fixed
    floating = {value.dtype for name, value in own.items() if not name.endswith(quantized)}
    for name, value in own.items():
        fixed = expected[name].dtype if name.endswith(quantized) else None
        if value.shape != expected[name].shape or (fixed is not None and value.dtype != fixed) or len(floating) > 1:
            raise CheckpointError(
                f"Tensor {prefix + name!r} should have shape {tuple(expected[name].shape)}"
                f"{f' and dtype {fixed}' if fixed is not None else ' and the dtype of its layer'}. "
                f"Found {tuple(value.shape)} and {value.dtype}."
            )
    module.load_state_dict(own, assign=True)
    return module


def _check_names(expected: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unexpected {', '.join(extra)}"] if extra else []
        raise CheckpointError(f"The file should hold the tensors of {what}. Found {'; '.join(parts)}.")


def load(path: str | os.PathLike[str], model: _Model) -> _Model:
    """Load a file that `save` wrote into a freshly built original network.

    Args:
        path: the file.
        model: the network as its code builds it, with its `nn.Bilinear` layers; also one on the meta device. It is
            changed in place: described layers are replaced, and all parameters and buffers are filled.

    Returns:
        The model; where the model itself is the described layer, its replacement.

    Raises:
        CheckpointError: the file is truncated, foreign, damaged or for another network. The model is untouched then.
    """
    state, descriptions = read(path)
    modules = dict(model.named_modules(remove_duplicate=False))
    new: dict[int, CompressedBilinear] = {}
    rest = dict(state)
    expected = dict(model.state_dict())
    for description in descriptions:
        layer = _target(model, modules, description)
        module = filled(description, state)
        new[id(layer)] = _placed(module, layer)
        for name in description.names:
            prefix = f"{name}." if name else ""
            rest = {key: value for key, value in rest.items() if not key.startswith(prefix)}
            expected = {key: value for key, value in expected.items() if not key.startswith(prefix)}
    _check_names(expected, rest, "the network")
    for name, value in expected.items():
        if value.shape != rest[name].shape or value.dtype != rest[name].dtype:
            raise CheckpointError(
                f"Tensor {name!r} should be {tuple(value.shape)} {value.dtype}, as the network has it. "
                f"Found {tuple(rest[name].shape)} {rest[name].dtype}."
            )
    if id(model) in new:
        return new[id(model)]  # type: ignore[return-value]  # a root nn.Bilinear gives way to its replacement
    _commit(model, new, expected, rest)
    return model


def _target(model: nn.Module, modules: Mapping[str, nn.Module], description: LayerDescription) -> nn.Bilinear:
    """The original layer that a description is for."""
    name = description.name
    layer = modules.get(name)
    if not isinstance(layer, nn.Bilinear):
        found = "no such layer" if layer is None else f"a {type(layer).__name__}"
        raise CheckpointError(
            f"Layer {name or '(root)'!r} should be an nn.Bilinear of a freshly built original network. Found {found}."
        )
    names = next(found.names for found in discovery.find(model) if found.layer is layer)
    if set(names) != set(description.names):
        raise CheckpointError(
            f"Layer {name!r} should be shared under the names {', '.join(description.names)}. "
            f"Found it under {', '.join(names)}."
        )
    refused = discovery.refusal(discovery.FoundLayer(names, layer), {}, values=False)
    if refused is not None:
        raise CheckpointError(f"Layer {name or '(root)'!r} should be a plain nn.Bilinear. Found that {refused}.")
    sizes = {
        what: (getattr(description, what), getattr(layer, what))
        for what in ("in1_features", "in2_features", "out_features")
    }
    sizes["bias"] = (description.bias, layer.bias is not None)
    for what, (wanted, found_size) in sizes.items():
        if wanted != found_size:
            raise CheckpointError(f"`{what}` of layer {name or '(root)'!r} should be {wanted}. Found {found_size}.")
    return layer


def _placed(module: CompressedBilinear, layer: nn.Bilinear) -> CompressedBilinear:
    """On the layer's device (where it has one), with its flags; float weights must have its dtype."""
    floating = next((p.dtype for p in module.parameters()), None)
    if floating is not None and floating != layer.weight.dtype:
        raise CheckpointError(
            f"The file's layers should be {layer.weight.dtype}, as the network's are. Found {floating}: convert the "
            "network with model.to(dtype) first."
        )
    if not layer.weight.is_meta:
        module.to(layer.weight.device)
    for parameter in module.parameters():
        parameter.requires_grad_(layer.weight.requires_grad)
    return module.train(layer.training)


def _commit(
    model: nn.Module, new: Mapping[int, CompressedBilinear], current: Mapping[str, Tensor], rest: Mapping[str, Tensor]
) -> None:
    """Swap and fill; everything has been checked, and still a failure puts back what there was."""
    meta = any(value.is_meta for value in current.values())
    backup = {name: value.clone() for name, value in current.items()} if not meta else {}
    undo = discovery.swap(model, new)
    try:
        model.load_state_dict(rest, strict=False, assign=meta)
    except BaseException:
        undo()
        with torch.no_grad():
            for name, value in backup.items():
                current[name].copy_(value)
        raise
