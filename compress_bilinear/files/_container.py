"""The file format: tensors in safetensors, and in its metadata the replaced layers and a digest.

safetensors holds tensors and strings, so that nothing is ever unpickled. The digest covers the description and every
tensor. It finds damage and careless edits. It is no signature: it does not say who wrote the file.
"""

import hashlib
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import MinLen
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._io import STRICT, read_plain, written_atomically
from ..errors import CheckpointError, CompressionError
from ..modules import METHODS, CompressedBilinear, place

FORMAT_VERSION = 4
METADATA_KEY = "compress_bilinear"


@dataclass(frozen=True, kw_only=True)
class LayerDescription:
    """One replaced layer of a file.

    Attributes:
        names: all its names in the network, "" for the network itself.
        method, rank, quantize: as `CompressedBilinear` has them.
        bias: whether there is one.
        adapter: the name of the adapter of the module that holds the layer; the names then end in the module's
            attribute "compressed". None for a layer that was an `nn.Bilinear`.
        compute: the layer's compute mode. Files of earlier versions may say "resident", which is no longer one.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    names: Annotated[tuple[str, ...], MinLen(1)]
    method: str
    in1_features: int
    in2_features: int
    out_features: int
    rank: int | tuple[int, int, int] | None
    quantize: str | None
    bias: bool
    adapter: str | None = None
    compute: Literal["on_the_fly", "resident", "int8", "bitsandbytes"] = "on_the_fly"

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    @property
    def label(self) -> str:
        """The first name as messages show it."""
        return self.name or "(root)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(O, I, J)."""
        return self.out_features, self.in1_features, self.in2_features

    def build(self, device: torch.device | str = "meta") -> CompressedBilinear:
        """The layer, without its values. Raises: CheckpointError for sizes that no layer has."""
        if self.method not in METHODS:
            raise CheckpointError(
                f"The method of layer {self.label!r} should be one of {', '.join(METHODS)}. Found {self.method!r}."
            )
        options: dict[str, Any] = {"bias": self.bias, "device": device, "quantize": self.quantize}
        if self.rank is not None:
            options["rank"] = self.rank
        try:
            return METHODS[self.method].layer(self.in1_features, self.in2_features, self.out_features, **options)
        except (CompressionError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"The description of layer {self.label!r} is not valid: {error}") from error


@dataclass(frozen=True)
class FileDescription:
    """What the metadata says of a file.

    Attributes:
        aliases: further names of a tensor, each with the name it is stored by.
        extra: what modules return from `get_extra_state`, where it is plain data, by its names in the state dict.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    version: int
    layers: tuple[LayerDescription, ...]
    aliases: dict[str, str]
    extra: dict[str, Any] = field(default_factory=dict)


def write_container(state: Mapping[str, Any], layers: Sequence[LayerDescription], path: str | os.PathLike[str]) -> None:
    """Write tensors and plain data, and the description of the layers among them; see `save`."""
    first_names: dict[Hashable, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    extra: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            extra[name] = _plain(name, value)
            continue
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
    text = json.dumps(description | ({"extra": extra} if extra else {}), sort_keys=True)
    metadata = {METADATA_KEY: text, "digest": _digest(text, tensors), "format": "pt"}
    with written_atomically(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"The state could not be written as safetensors: {error}") from error


def _plain(name: str, value: Any) -> Any:
    """A value that JSON holds as it is."""
    try:
        if json.loads(json.dumps(value)) == value:
            return value
    except (TypeError, ValueError, RecursionError):
        pass
    raise CheckpointError(
        f"State {name!r} should be a tensor or plain data: numbers, strings, lists, and dicts with strings as keys. "
        f"Found a {type(value).__name__} that JSON does not hold as it is: have get_extra_state return one that is."
    )


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], FileDescription | None]:
    """The tensors of any safetensors file, and the description of one that `save` wrote, which is verified.

    The tensors are views of the file, which is read where they are: what outlives the call takes copies. A shared
    tensor comes under all its names. Raises: CheckpointError where the file is damaged or none.
    """
    check_is_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} should be a whole safetensors file. Found one that cannot be read: {error}"
        ) from error
    if METADATA_KEY not in metadata:
        return tensors, None
    description = _described(metadata, path, tensors)
    for alias, name in description.aliases.items():
        if name not in tensors:
            raise CheckpointError(f"{str(path)!r} should hold tensor {name!r}, which {alias!r} is. Found none.")
        tensors[alias] = tensors[name]
    return tensors, description


def aligned(value: Tensor) -> Tensor:
    """The tensor, or a copy where it lies at an address that is no multiple of its elements' size."""
    return value.clone() if value.data_ptr() % value.element_size() else value


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless there is a file to read."""
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "none"
        if (Path(path) / ".metadata").is_file():
            way_out = "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, file) makes one file of it"
            found = f"a folder of torch.distributed.checkpoint: {way_out}"
        raise CheckpointError(f"{str(path)!r} should be a file. Found {found}.")


def _described(
    metadata: Mapping[str, str], path: str | os.PathLike[str], tensors: Mapping[str, Tensor]
) -> FileDescription:
    """The description of a file that `save` wrote; its digest is verified before it is believed."""
    text = metadata[METADATA_KEY]
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    version = data.get("version") if isinstance(data, dict) else None
    if version is not None and version != FORMAT_VERSION:
        raise CheckpointError(f"{str(path)!r} should have format version {FORMAT_VERSION}. Found {version!r}.")
    if version is None or metadata.get("digest") != _digest(text, tensors):
        raise CheckpointError(
            f"{str(path)!r} should be as compress_bilinear.save wrote it. Found that its description and tensors do "
            "not match their digest: the file was damaged or edited."
        )
    try:
        return read_plain(FileDescription, data, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"The description in {str(path)!r} is not valid. {error}") from error


def _digest(description: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the description and of every tensor's name, dtype, shape and bits."""
    digest = hashlib.blake2b(description.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
