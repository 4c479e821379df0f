"""Save compressed networks, and load them into freshly built original ones."""

import copy
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..errors import CheckpointError
from ..modules import (
    COMPRESSED,
    AdaptedBilinear,
    CompressedBilinear,
    FoundLayer,
    find,
    find_compressed,
    is_writable,
    module_names,
    reason_against,
    replacements,
    split_name,
    swap,
    take_flags,
)
from ._container import LayerDescription, read_safetensors, written
from ._extra import with_tensors

_Model = TypeVar("_Model", bound=nn.Module)
_AROUND = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_DESCRIBED = ("method", "in1_features", "in2_features", "out_features", "rank", "quantize", "compute", "compute_rows")


def describe(model: nn.Module) -> list[LayerDescription]:
    """The compressed layers of a model. Raises: CheckpointError where one has been changed from the inside."""
    names = module_names(model)
    adapted = [module for module in model.modules() if isinstance(module, AdaptedBilinear)]
    adapters = {id(layer): module.adapter_name for module in adapted for layer in module.compressed.modules()}
    descriptions = []
    for layer in find_compressed(model).values():
        known: dict[str, Any] = {name: getattr(layer, name) for name in _DESCRIBED}
        known |= {"bias": layer.bias is not None, "adapter": adapters.get(id(layer))}
        description = LayerDescription(names=tuple(names[id(layer)]), **known)
        expected, found = list(description.build().state_dict()), list(layer.state_dict())
        if sorted(expected) != sorted(found):
            raise CheckpointError(
                f"Layer {description.label!r} should hold {', '.join(expected)}. Found {', '.join(found)}: "
                "merge or remove what wraps its inner layers first."
            )
        descriptions.append(description)
    return descriptions


def save(model: nn.Module, path: str | os.PathLike[str], *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Write a compressed network to one safetensors file, or to several with an index, atomically.

    Args:
        model: a network that `compress` returned, or any other.
        path: the file, in safetensors whatever its suffix; one that exists is replaced once the new one is complete.
            "model.safetensors.index.json" is an index, beside which "model-00001-of-00002.safetensors" and so on have
            the tensors, as transformers has it.
        max_shard_bytes: of the tensors in a file beside an index, where it has more than one.

    Raises:
        CheckpointError: the state is not all tensors with values and plain data (of `get_extra_state`, with tensors
            in dicts and lists), or a compressed layer was changed from the inside.
        CompressionError: the folder does not exist.
    """
    model = _unwrapped(model)
    with written(model.state_dict(), describe(model), path, max_shard_bytes):
        pass


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network itself, of one that is compiled or wrapped for parallel training."""
    name = "module" if isinstance(model, (DataParallel, DistributedDataParallel)) else "_orig_mod"
    only = list(model._modules) == [name] and not (model._parameters or model._buffers)
    inner = model._modules[name] if only else None
    return model if inner is None else _unwrapped(inner)


def load(path: str | os.PathLike[str], model: _Model) -> _Model:
    """Load a file that `save` wrote into a freshly built original network.

    Args:
        path: the file; the index of several, or their folder.
        model: the network as its code builds it, with its `nn.Bilinear` layers; also one on the meta device. It is
            changed in place: described layers are replaced, and all parameters and buffers are filled. Classes that
            were registered by `register_adapter` have to be so here too. Names may begin with a wrapper's, "model."
            say, on one of the two sides; "module", "_orig_mod" and those of FSDP make no difference anywhere in them.

    Returns:
        The model; where the model itself is the described layer, its replacement.

    Raises:
        CheckpointError: the file is truncated, foreign, damaged or for another network. The model is untouched then.
    """
    tensors, content = read_safetensors(path)
    if content is None:
        raise CheckpointError(
            f"{str(path)!r} should be a file that compress_bilinear.save wrote. Found safetensors without its "
            "description: load_state_dict takes those of an original."
        )
    descriptions = content.layers
    own, others = by_layer(tensors, descriptions)
    rest = with_tensors(content.extra, others)
    found = {(id(each.module), each.key): each for each in find(model)}
    names = _names_in(model, found.values(), tensors, [name for each in descriptions for name in each.names], rest)
    modules = dict(model.named_modules(remove_duplicate=False))
    rest = {names[key]: value for key, value in rest.items()}
    renamed = [replace(each, names=tuple(names[name] for name in each.names)) for each in descriptions]
    targets = [target_of(modules, found, description) for description in renamed]
    layers: list[CompressedBilinear] = []
    originals: dict[int, int] = {}  # by the id of a new bias, that of the bias whose place it takes
    for description, target in zip(descriptions, targets, strict=True):
        layer = filled(description, own[description.name], target.layer.weight.device)
        dtype, required = next((p.dtype for p in layer.parameters()), None), target.layer.weight.dtype
        if dtype not in (None, required):
            raise CheckpointError(
                f"The file's layers should be {required}, as the network's are. Found {dtype}: convert the network "
                "with model.to(dtype) first."
            )
        originals[id(layer.bias)] = id(target.layer.bias)
        take_flags(layer, target.layer)
        layers.append(layer)
    new = replacements(zip(targets, layers, strict=True))
    gone = {name for target in targets for name in target.parameter_names()}
    current = {name: value for name, value in model.state_dict().items() if name not in gone}
    # many programs write tied parameters under one name alone
    variables = model.state_dict(keep_vars=True)
    shared = {name: id(variables[name]) for name, value in current.items() if isinstance(value, Tensor)}
    under_one = {shared[name]: value for name, value in rest.items() if name in shared}
    rest = {name: under_one[each] for name, each in shared.items() if each in under_one} | rest
    _check_fits(current, rest, "the network")
    for name, value in current.items():
        if isinstance(value, Tensor) and not (value.is_meta or is_writable(value)):
            raise CheckpointError(f"Tensor {name!r} should have memory of its own to load into. Found an expanded one.")
    return _filled_model(model, new, originals, current, rest)


def _names_in(
    model: nn.Module, found: Iterable[FoundLayer], tensors: Iterable[str], layers: Sequence[str], others: Iterable[str]
) -> dict[str, str]:
    """The names that the model has for layers and other tensors of a file, where wrappers are all that differs.

    Names that are in the model are its own. Where others fit in no way, all stay as they are in the file.
    """
    state, modules = model.state_dict(), [name for name, _ in model.named_modules(remove_duplicate=False)]
    exact = [*state, *modules, *(f"{name}.{COMPRESSED}".lstrip(".") for name in modules)]
    exact += [f"{name}.{COMPRESSED}.{each.key}".lstrip(".") for each in found if each.key for name in each.names]
    known: dict[str, str] = {_plain(name): name for name in reversed(exact)} | {name: name for name in exact}
    wrappers = [(name, "") for name in _wrappers(tensors)] + [("", name) for name in _wrappers(state)]
    for gone, added in [("", ""), *wrappers]:
        new = {name: added + name.removeprefix(gone) for name in (*layers, *others)}
        new = {old: known.get(name, known.get(_plain(name), name)) for old, name in new.items()}
        if len(set(new.values())) == len(new) and all(new[name] in known for name in layers or others):
            return new
    return {name: name for name in (*layers, *others)}


def _plain(name: str) -> str:
    """The name without those of modules around others: for parallel training, compiled, or with less memory."""
    return ".".join(part for part in name.split(".") if part not in _AROUND)


def _wrappers(names: Iterable[str]) -> list[str]:
    """What all names of tensors begin with, part by part: "module.", say."""
    paths = [name.split(".")[:-1] for name in names]
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    return [".".join(common[:count]) + "." for count in range(1, len(common) + 1)]


def by_layer(
    tensors: Mapping[str, Tensor], layers: Iterable[LayerDescription]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each layer by its name, under their names within the layer; and those of no layer."""
    own: dict[str, dict[str, Tensor]] = {name: {} for layer in layers for name in layer.names}
    rest: dict[str, Tensor] = {}
    for key, value in tensors.items():
        parts = key.split(".")
        holders = (".".join(parts[:count]) for count in range(len(parts)))  # "", "a", "a.b" of "a.b.weight"
        holder = next((name for name in holders if name in own), None)
        if holder is None:
            rest[key] = value
        else:
            own[holder][key.removeprefix(f"{holder}.")] = value
    return own, rest


@torch.inference_mode(False)  # so that the layer can be trained
def filled(
    description: LayerDescription, tensors: Mapping[str, Tensor], device: torch.device | None = None
) -> CompressedBilinear:
    """A described layer with its tensors, which `by_layer` gives, in its compute mode.

    A layer that does not have the mode on the device, or on this machine, computes on the fly: it warns.

    Args:
        description: of the layer.
        tensors: by their names within the layer.
        device: where to put the layer; None or "meta" leaves the tensors where they are.

    Raises: CheckpointError where tensors are missing, too many, or of other shapes or dtypes than described.
    """
    layer = description.build()
    fixed = dict(layer.named_buffers())  # integers, scales and indices
    dtypes = (value.dtype for name, value in tensors.items() if name not in fixed)
    layer.to(next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32))
    _check_fits(layer.state_dict(), tensors, f"layer {description.label!r}")
    for name, value in tensors.items():
        if name.endswith("index") and value.sort()[0].tolist() != [*range(len(value))]:
            raise CheckpointError(
                f"Tensor {name!r} of layer {description.label!r} should hold each of 0..{len(value) - 1} once. "
                f"Found {value.tolist()}."
            )
    layer.load_state_dict({name: value.clone() for name, value in tensors.items()}, assign=True)
    if device is not None and device.type != "meta":
        layer.to(device)
    use_compute(layer, description)
    return layer


def use_compute(layer: CompressedBilinear, description: LayerDescription) -> None:
    """Set the compute mode that a file says; where the layer does not have it on this machine, warn."""
    if description.compute not in ("on_the_fly", "resident"):
        reason = layer.refused_compute(description.compute)
        if reason is None:
            layer.set_compute(description.compute, description.compute_rows)  # type: ignore[arg-type]  # not "resident"
        else:
            warnings.warn(f"Layer {description.label!r} of the file computes on the fly: {reason}.", stacklevel=4)


def _check_fits(expected: Mapping[str, Any], tensors: Mapping[str, Any], what: str) -> None:
    """Raise CheckpointError unless the file's tensors have the names, shapes and dtypes that are expected.

    Of extra state the names alone are.
    """
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unexpected {', '.join(extra)}"] if extra else []
        found = "; ".join(parts)
        raise CheckpointError(
            f"The file should hold the tensors of {what}. Found {found}: build the network that was saved."
        )
    for name, value in expected.items():
        found = tensors[name]
        if name.endswith("_extra_state") or not isinstance(value, Tensor):
            continue
        if (value.shape, value.dtype) != (found.shape, found.dtype):
            raise CheckpointError(
                f"Tensor {name!r} of {what} should be {tuple(value.shape)} {value.dtype}. "
                f"Found {tuple(found.shape)} {found.dtype}."
            )


def target_of(
    modules: Mapping[str, nn.Module], layers: Mapping[tuple[int, str], FoundLayer], description: LayerDescription
) -> FoundLayer:
    """The original layer that a description is for; `layers` are by the ids of modules, and their names in these."""
    split = [split_name(name) if description.adapter else (name, "") for name in description.names]
    names = tuple(name for name, _ in split)
    label, module = names[0] or "(root)", modules.get(names[0])
    target = layers.get((id(module), split[0][1]))
    adapter = None if target is None or target.adapted is None else target.adapted.adapter.name
    as_stored = description.adapter is None and target and target.adapted and target.adapted.reads_as_stored()
    if target is None or (description.adapter != adapter and not as_stored):
        required = "an nn.Bilinear" if description.adapter is None else f"of the form {description.adapter!r}"
        found = "no such layer: build what was saved, or compress the part of it that --key chooses"
        found = found if module is None else f"a {type(module).__name__}"
        found += "" if adapter is None else f" of the form {adapter!r}"
        also = " Is its class registered (register_adapter)?" if description.adapter and not target else ""
        raise CheckpointError(
            f"Layer {label!r} should be {required} of a freshly built original network. Found {found}.{also}"
        )
    if not set(names) <= set(target.names):  # a file of another program's may have fewer
        raise CheckpointError(
            f"Layer {label!r} should be shared under the names {', '.join(names)}. "
            f"Found it under {', '.join(target.names)}."
        )
    reason = reason_against(target, {}, values=False)
    if label.split(".")[-1] == "_orig_mod":  # compiled by itself: what calls it knows the layer, not the name
        reason = "it is compiled by itself: compile it once it is loaded"
    if reason is not None:
        raise CheckpointError(f"Layer {label!r} should be a plain {target.form}. Found that {reason}.")
    for what in ("in1_features", "in2_features", "out_features", "bias"):
        required, size = getattr(description, what), getattr(target.layer, what)
        size = size is not None if what == "bias" else size
        if required != size:
            raise CheckpointError(f"`{what}` of layer {label!r} should be {required}. Found {size}.")
    return target


def _filled_model(
    model: _Model,
    new: Mapping[int, nn.Module],
    originals: Mapping[int, int],
    current: Mapping[str, Any],
    rest: Mapping[str, Any],
) -> _Model:
    """The model with the new modules by the ids of those they replace, and its other tensors from the file.

    Everything has been checked. Still, a failure puts back what there was.
    """
    root: _Model = new.get(id(model), model)  # type: ignore[assignment]  # a model that is itself a layer is replaced
    before: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (holder, dict(holder)) for module in model.modules() for holder in (module._parameters, module._buffers)
    ]
    tensors = {name: value for name, value in current.items() if isinstance(value, Tensor)}
    assign = any(value.is_meta for value in tensors.values())
    values = {name: value.clone() for name, value in tensors.items() if not value.is_meta}
    undo = swap(model, new)
    try:
        ties = _ties(root, originals)
        # what modules keep are copies: views of a file change with it
        kept = copy.deepcopy({key: value for key, value in rest.items() if assign or key.endswith("_extra_state")})
        root.load_state_dict({**rest, **kept}, strict=False, assign=assign)
        for (holder, name), *others in ties:  # one Parameter again, unless the file has them differ
            if all(torch.equal(holder[name], other[key]) for other, key in others):
                for other, key in others:
                    other[key] = holder[name]
    except BaseException:
        undo()
        for holder, content in before:
            holder.update(content)
        with torch.no_grad():
            for name, value in values.items():
                tensors[name].copy_(value)  # each has memory of its own: that has been checked
        raise
    return root


_Places = list[tuple[dict[str, Any], str]]  # a module's dict of parameters, and the name in it


def _ties(model: nn.Module, originals: Mapping[int, int]) -> list[_Places]:
    """The places that shared one parameter before layers were replaced; `originals` are their biases, see `load`."""
    places: dict[int, _Places] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            shared = places.setdefault(originals.get(id(parameter), id(parameter)), [])
            # the bias of a replacement comes last: where all are equal, the network's own Parameter stays
            shared.insert(len(shared) if id(parameter) in originals else 0, (module._parameters, name))
    places.pop(id(None), None)
    return [shared for shared in places.values() if len(shared) > 1]
