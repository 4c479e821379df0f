"""The file: tensors in safetensors, with a description of the replaced layers and a digest in its metadata.

safetensors holds tensors and strings, so nothing is ever unpickled. The digest, of the description and of every
tensor, finds damage and careless edits; it is no signature, and does not say who wrote the file.
"""

import hashlib
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._atomic import written_atomically
from ..errors import CheckpointError, CompressionError
from ..modules import CompressedBilinear, CPBilinear, DenseBilinear, TuckerBilinear

FORMAT_VERSION = 4
METADATA_KEY = "compress_bilinear"


@dataclass(frozen=True, kw_only=True)
class LayerDescription:
    """One replaced layer of a checkpoint; `names` are all its names in the network, "" for the network itself.

    With `adapter`, the form of the module that the layer is a part of, the names end in that part's ("compressed").
    `compute` is the layer's compute mode.
    """

    names: tuple[str, ...]
    method: str
    in1_features: int
    in2_features: int
    out_features: int
    rank: int | tuple[int, int, int] | None
    quantize: str | None
    bias: bool
    adapter: str | None = None
    compute: str = "on_the_fly"

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


def write_container(
    state: Mapping[str, Tensor], layers: Sequence[LayerDescription], path: str | os.PathLike[str]
) -> None:
    """Write tensors and the description of the layers among them; see `checkpoint.save`."""
    first_names: dict[Hashable, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if value.layout != torch.strided:
            raise CheckpointError(f"State {name!r} should be a dense tensor. Found {value.layout}.")
        value = value.detach().resolve_conj().resolve_neg()
        first = first_names.setdefault(place(value), name)
        if value.numel() and first != name:
            aliases[name] = first
            continue
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
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"The state could not be written as safetensors: {error}") from error


def read_container(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], list[LayerDescription]]:
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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


def place(tensor: Tensor) -> Hashable:
    """Where a tensor's values are: equal for two that are the same view of the same memory."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


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
    if not entry["names"] or not all(isinstance(name, str) for name in entry["names"]):
        raise TypeError("names")
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
