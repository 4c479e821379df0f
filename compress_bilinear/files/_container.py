"""The file format: tensors in safetensors, and in its metadata the replaced layers and a digest.

safetensors holds tensors and strings, so that nothing is ever unpickled. The digest covers the description and every
tensor. It finds damage and careless edits. It is no signature: it does not say who wrote the file.
"""

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from zipfile import is_zipfile

import torch
from annotated_types import Ge, MinLen
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._io import STRICT, read_plain, written_atomically
from ..errors import CheckpointError, CompressionError
from ..modules import METHODS, CompressedBilinear, place
from ._extra import without_tensors

FORMAT_VERSION = 4
METADATA_KEY = "compress_bilinear"
INDEX = ".index.json"  # what the name of a file ends with that names those of a network's tensors
_WHOLE = ("model.safetensors", "pytorch_model.bin")  # the names that transformers gives a network in one file


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
        compute_rows: the rows from which it computes so.
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
    compute: Literal["on_the_fly", "resident", "bfloat16", "int8", "bitsandbytes"] = "on_the_fly"
    compute_rows: Annotated[int, Ge(1)] = 1

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
        extra: what modules return from `get_extra_state`, where it is plain data, by its names in the state dict. A
            tensor in it is None there, and one of the file's, by its place: `norm._extra_state["scale", 0]`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    version: int
    layers: tuple[LayerDescription, ...]
    aliases: dict[str, str]
    extra: dict[str, Any] = field(default_factory=dict)


@contextmanager
def written(
    state: Mapping[str, Any],
    layers: Sequence[LayerDescription],
    path: str | os.PathLike[str],
    max_shard_bytes: int = 5 * 10**9,
) -> Iterator[None]:
    """Tensors, plain data and the description of the layers among them as a file; of shards, an index and these.

    Inside, they are whole under other names. They get their own when the block ends well. See `save`.
    """
    tensors, aliases, extra = _stored(state)
    path, index = Path(path), None
    files, old = {path.name: tensors}, set[Path]()
    with suppress(CheckpointError):  # one that does not name its files
        old = {*_index_of(path)[1].values()}
    with ExitStack() as stack:
        if path.name.endswith(INDEX):
            index = stack.enter_context(written_atomically(path))  # it is the first, and so renamed last
            shards = _shards(tensors, max_shard_bytes)
            stem, count = path.name.removesuffix(INDEX).removesuffix(".safetensors"), len(shards)
            files = {f"{stem}-{k + 1:05}-of-{count:05}.safetensors": shard for k, shard in enumerate(shards)}
        names: dict[str, str] = {}
        for file, part in files.items():
            own = {alias: name for alias, name in aliases.items() if name in part}
            temporary = stack.enter_context(written_atomically(path.with_name(file)))
            _write(part, FileDescription(FORMAT_VERSION, tuple(layers), own, extra), temporary)
            names |= dict.fromkeys((*part, *own), file)
            layers, extra = (), {}  # the first has those of all
        if index is not None:
            total = sum(value.nbytes for value in tensors.values())
            index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}), encoding="utf-8")
        yield
        if index is not None:  # so that an old one is never that of new shards
            path.unlink(missing_ok=True)
    for gone in old - {path.with_name(name) for name in files}:  # of more shards, or fewer
        with suppress(OSError):  # it does no harm where it stays
            gone.unlink()


def _stored(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """The tensors of a state in storage of their own; further names of these; and what is plain data."""
    first_names: dict[Hashable, str] = {}
    aliases: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    extra: dict[str, Any] = {}
    flat: dict[str, Tensor] = {}  # with those in plain data
    for name, value in state.items():
        if isinstance(value, Tensor):
            flat[name] = value
        else:
            extra[name] = without_tensors(name, value, flat)
    for name, value in flat.items():
        if value.is_meta or torch.nn.parameter.is_lazy(value):
            raise CheckpointError(f"State {name!r} should be a tensor with values. Found a tensor without values.")
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
    return tensors, aliases, extra


def _shards(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """The tensors in their order, in parts of at most so many bytes, or of one tensor."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0  # of the last
    for name, value in tensors.items():
        size += value.nbytes
        if shards[-1] and size > most:
            shards.append({})
            size = value.nbytes
        shards[-1][name] = value
    return shards


def _write(tensors: dict[str, Tensor], description: FileDescription, path: Path) -> None:
    content = asdict(description)
    if not description.extra:
        del content["extra"]  # earlier versions do not know it
    text = json.dumps(content, sort_keys=True)
    try:
        save_file(tensors, path, {METADATA_KEY: text, "digest": _digest(text, tensors), "format": "pt"})
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"The state could not be written as safetensors: {error}") from error


def read_file(path: Path, verify: bool = True) -> tuple[dict[str, Tensor], FileDescription | None]:
    """The tensors and the description of one safetensors file; see `read_safetensors`."""
    check_is_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: aligned(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        found = (
            "one that torch.save wrote: torch.load reads it"
            if is_zipfile(path)
            else f"one that cannot be read: {error}"
        )
        raise CheckpointError(f"{str(path)!r} should be a whole safetensors file. Found {found}.") from error
    if METADATA_KEY not in metadata:
        return tensors, None
    description = _described(metadata, path, tensors if verify else None)
    for alias, name in description.aliases.items():
        if name not in tensors:
            raise CheckpointError(f"{str(path)!r} should hold tensor {name!r}, which {alias!r} is. Found none.")
        tensors[alias] = tensors[name]
    return tensors, description


def read_safetensors(
    path: str | os.PathLike[str],
    verify: bool = True,
    read: Callable[[Path, bool], tuple[dict[str, Tensor], FileDescription | None]] = read_file,
) -> tuple[dict[str, Tensor], FileDescription | None]:
    """The tensors of any safetensors file, and the description of one that `save` wrote.

    It is verified, for which all tensors are read; without `verify` none is.

    Of a network in several files, `path` is their folder or index. The tensors are views of the files, which are read
    where they are: what outlives the call takes copies. A shared tensor comes under all its names.

    Args:
        read: what reads one file.

    Raises: CheckpointError where a file is damaged or none.
    """
    index, files = _index_of(Path(path))
    if not files:
        return read(index, verify)
    parts = {file: read(file, verify) for file in sorted({*files.values()})}
    for name, file in files.items():
        if name not in parts[file][0]:
            raise CheckpointError(f"{str(file)!r} should hold {name!r}, as its index says. Found none.")
    descriptions = [description for _, description in parts.values() if description is not None]
    layers = tuple(layer for each in descriptions for layer in each.layers)
    extra = {name: value for each in descriptions for name, value in each.extra.items()}
    tensors = {name: parts[file][0][name] for name, file in files.items()}
    return tensors, FileDescription(FORMAT_VERSION, layers, {}, extra) if descriptions else None


def files_of(path: str | os.PathLike[str]) -> set[Path]:
    """The file, or of a network in several these and their index."""
    index, files = _index_of(Path(path))
    return {index, *files.values()}


def _index_of(path: Path) -> tuple[Path, dict[str, Path]]:
    """The index of a network in several files, as transformers has it, and the file of each tensor; or the one file."""
    names = [path / (name + end) for name in _WHOLE for end in ("", INDEX)]
    index = next((file for file in names if file.is_file()), path)
    if not (index.name.endswith(INDEX) and index.is_file()):
        return index, {}
    try:
        files = {str(key): str(name) for key, name in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{str(index)!r} should map names of tensors to files. Found: {error!r}.") from error
    outside = [name for name in files.values() if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{str(index)!r} should name files of its own folder. Found {outside[0]!r}.")
    return index, {key: index.with_name(name) for key, name in files.items()}


def aligned(value: Tensor) -> Tensor:
    """The tensor, or a copy where it lies at an address that is no multiple of its elements' size."""
    return value.clone() if value.data_ptr() % value.element_size() else value


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless there is a file to read."""
    if not Path(path).is_file():
        found = f"a folder without {' or '.join(_WHOLE)}: name a file of it" if Path(path).is_dir() else "none"
        if (Path(path) / ".metadata").is_file():
            way_out = "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, file) makes one file of it"
            found = f"a folder of torch.distributed.checkpoint: {way_out}"
        raise CheckpointError(f"{str(path)!r} should be a file. Found {found}.")


def _described(
    metadata: Mapping[str, str], path: str | os.PathLike[str], tensors: Mapping[str, Tensor] | None
) -> FileDescription:
    """The description of a file that `save` wrote; with its tensors, the digest is verified before it is believed."""
    text = metadata[METADATA_KEY]
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    version = data.get("version") if isinstance(data, dict) else None
    if version is not None and version != FORMAT_VERSION:
        raise CheckpointError(f"{str(path)!r} should have format version {FORMAT_VERSION}. Found {version!r}.")
    if version is None or (tensors is not None and metadata.get("digest") != _digest(text, tensors)):
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
