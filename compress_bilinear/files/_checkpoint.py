"""Save compressed networks, and load them into freshly built original ones."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..modules import COMPRESSED, AdaptedBilinear, CompressedBilinear, FoundLayer, find, reason_against, swap
from ._container import LayerDescription, read_container, write_container

_Model = TypeVar("_Model", bound=nn.Module)


def describe(model: nn.Module) -> list[LayerDescription]:
    """The compressed layers of a model. Raises: CheckpointError where one has been changed from the inside."""
    names: dict[int, list[str]] = {}
    layers: dict[int, CompressedBilinear] = {}
    inner: set[int] = set()  # the core of a Tucker layer is no layer of the network
    forms: dict[int, str] = {}  # of the modules that hold layers, by the layer
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CompressedBilinear):
            names.setdefault(id(module), []).append(name)
            layers[id(module)] = module
            inner |= {id(child) for child in module.modules() if child is not module}
        elif isinstance(module, AdaptedBilinear):
            forms[id(module.compressed)] = module.adapter_name
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
            adapter=forms.get(key),
            compute=layer.compute,
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
    write_container(state, describe(model), path)


def filled(description: LayerDescription, state: Mapping[str, Tensor]) -> CompressedBilinear:
    """The module of a described layer with its tensors from a file's state.

    Raises: CheckpointError where tensors are missing, too many, or of other shapes or dtypes than described.
    """
    module = description.build()
    prefix = f"{description.name}." if description.name else ""
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    expected = module.state_dict()
    _check_names(expected, own, f"layer {description.name or '(root)'!r}")
    given = ("qdata", "scale", "sigma", "index")  # the names of tensors whose dtypes are fixed
    floating = {value.dtype for name, value in own.items() if not name.endswith(given)}
    for name, value in own.items():
        fixed = expected[name].dtype if name.endswith(given) else None
        if fixed is None and not value.is_floating_point():
            raise CheckpointError(f"Tensor {prefix + name!r} should be floating. Found {value.dtype}.")
        if value.shape != expected[name].shape or (fixed is not None and value.dtype != fixed) or len(floating) > 1:
            raise CheckpointError(
                f"Tensor {prefix + name!r} should have shape {tuple(expected[name].shape)}"
                f"{f' and dtype {fixed}' if fixed is not None else ' and the dtype of its layer'}. "
                f"Found {tuple(value.shape)} and {value.dtype}."
            )
        if name.endswith("index") and not torch.equal(value.sort()[0].cpu(), torch.arange(len(value)).int()):
            raise CheckpointError(
                f"Tensor {prefix + name!r} should hold each of 0..{len(value) - 1} once. Found {value.tolist()}."
            )
    module.load_state_dict(own, assign=True)
    if description.compute == "bitsandbytes" and module.quantize is not None:
        module.compute = "bitsandbytes"  # for `settle`, on the device where it will be
    elif description.compute != "on_the_fly":
        try:
            module.set_compute(description.compute, next(iter(floating), torch.float32))  # type: ignore[arg-type]
        except ConfigError as error:
            raise CheckpointError(f"The description of layer {description.name!r} is not valid: {error}") from error
    return module


def settle(module: CompressedBilinear) -> None:
    """Compute by bitsandbytes where the file says so; where that cannot be, on the fly to the same values, and warn."""
    if module.compute == "bitsandbytes":
        refused = module.refused_compute("bitsandbytes")
        module.set_compute("bitsandbytes" if refused is None else "on_the_fly")
        if refused is not None:
            warnings.warn(f"A {module.method} layer of the file computes on the fly: {refused}.", stacklevel=4)


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
            changed in place: described layers are replaced, and all parameters and buffers are filled. Classes that
            were registered by `register_adapter` have to be so here too.

    Returns:
        The model; where the model itself is the described layer, its replacement.

    Raises:
        CheckpointError: the file is truncated, foreign, damaged or for another network. The model is untouched then.
    """
    state, descriptions = read_container(path)
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {id(found.module): found for found in find(model)}
    new: dict[int, nn.Module] = {}
    biases: list[tuple[nn.Parameter, CompressedBilinear]] = []
    rest = dict(state)
    expected = dict(model.state_dict())
    for description in descriptions:
        target = _target(modules, layers, description)
        module = _placed(filled(description, state), target.layer)
        if target.layer.bias is not None:
            biases.append((target.layer.bias, module))
        new[id(target.module)] = module if target.adapted is None else target.adapted.replaced(module)
        for name in description.names:
            prefix = f"{name}." if name else ""
            rest = {key: value for key, value in rest.items() if not key.startswith(prefix)}
        for name in target.names:
            prefix = f"{name}." if name else ""
            if target.adapted is None:
                expected = {key: value for key, value in expected.items() if not key.startswith(prefix)}
            else:  # the module's other parts stay
                gone = {prefix + part for part in (*target.adapted.weights, *target.adapted.biases)}
                expected = {key: value for key, value in expected.items() if key not in gone}
    _check_names(expected, rest, "the network")
    for name, value in expected.items():
        if value.shape != rest[name].shape or value.dtype != rest[name].dtype:
            raise CheckpointError(
                f"Tensor {name!r} should be {tuple(value.shape)} {value.dtype}, as the network has it. "
                f"Found {tuple(rest[name].shape)} {rest[name].dtype}."
            )
        if any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)):
            raise CheckpointError(f"Tensor {name!r} should have memory of its own to load into. Found an expanded one.")
    if id(model) in new and not expected:
        return new[id(model)]  # type: ignore[return-value]  # a root nn.Bilinear gives way to its replacement
    if id(model) in new:  # and so does a root of another form, whose other parts have yet to be filled
        root = nn.ModuleList([model])
        prefixed = [{f"0.{name}": value for name, value in part.items()} for part in (expected, rest)]
        _commit(root, new, biases, *prefixed)
        return root[0]  # type: ignore[return-value]
    _commit(model, new, biases, expected, rest)
    return model


def _target(
    modules: Mapping[str, nn.Module], layers: Mapping[int, FoundLayer], description: LayerDescription
) -> FoundLayer:
    """The original layer that a description is for."""
    part = "" if description.adapter is None else COMPRESSED
    wanted = tuple(name.removesuffix(part).removesuffix(".") if part else name for name in description.names)
    name, module = wanted[0], modules.get(wanted[0])
    target = layers.get(id(module))
    kind = "an nn.Bilinear" if description.adapter is None else f"of the form {description.adapter!r}"
    if target is None or description.adapter != (target.adapted and target.adapted.adapter.name):
        found = "no such layer" if module is None else f"a {type(module).__name__}"
        if target is not None and target.adapted is not None:
            found += f" of the form {target.adapted.adapter.name!r}"
        also = " Is its class registered (register_adapter)?" if description.adapter and not target else ""
        raise CheckpointError(
            f"Layer {name or '(root)'!r} should be {kind} of a freshly built original network. Found {found}.{also}"
        )
    if set(target.names) != set(wanted):
        raise CheckpointError(
            f"Layer {name!r} should be shared under the names {', '.join(wanted)}. "
            f"Found it under {', '.join(target.names)}."
        )
    refused = reason_against(target, {}, values=False)
    if refused is not None:
        raise CheckpointError(f"Layer {name or '(root)'!r} should be a plain {target.form}. Found that {refused}.")
    layer = target.layer
    sizes = {
        what: (getattr(description, what), getattr(layer, what))
        for what in ("in1_features", "in2_features", "out_features")
    }
    sizes["bias"] = (description.bias, layer.bias is not None)
    for what, (asked, found_size) in sizes.items():
        if asked != found_size:
            raise CheckpointError(f"`{what}` of layer {name or '(root)'!r} should be {asked}. Found {found_size}.")
    return target


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
    if module.compute == "resident":
        module.set_compute("resident", layer.weight.dtype)
    settle(module)
    for parameter in module.parameters():
        parameter.requires_grad_(layer.weight.requires_grad)
    if module.bias is not None and layer.bias is not None:
        module.bias.requires_grad_(layer.bias.requires_grad)
    return module.train(layer.training)


def _commit(
    model: nn.Module,
    new: Mapping[int, nn.Module],
    biases: Sequence[tuple[nn.Parameter, CompressedBilinear]],
    current: Mapping[str, Tensor],
    rest: Mapping[str, Tensor],
) -> None:
    """Swap and fill; everything has been checked, and still a failure puts back what there was."""
    meta = any(value.is_meta for value in current.values())
    holders = [holder for module in model.modules() for holder in (module._parameters, module._buffers)]
    before: list[tuple[dict[str, Any], str, Tensor]] = [
        (holder, name, tensor) for holder in holders for name, tensor in holder.items() if tensor is not None
    ]
    values = {name: value.clone() for name, value in current.items() if not value.is_meta}
    undo = swap(model, new)
    try:
        ties = _ties(model, biases)
        model.load_state_dict(rest, strict=False, assign=meta)
        _retie(ties)
    except BaseException:
        undo()
        for holder, name, tensor in before:
            holder[name] = tensor
        with torch.no_grad():
            for name, value in values.items():
                current[name].copy_(value)  # each can be written to: that has been checked
        raise


_Slot = tuple[Callable[[], Any], Callable[[Any], None]]  # how to read and how to set a parameter's place


def _ties(model: nn.Module, biases: Sequence[tuple[nn.Parameter, CompressedBilinear]]) -> list[list[_Slot]]:
    """The places that share one parameter; of a layer that has given way, its bias's place in the new one."""
    slots: dict[int, list[_Slot]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                place = partial(module._parameters.get, name), partial(module._parameters.__setitem__, name)
                slots.setdefault(id(parameter), []).append(place)
    for bias, layer in biases:
        slots.setdefault(id(bias), []).append((partial(getattr, layer, "bias"), layer.set_bias))
    return [shared for shared in slots.values() if len(shared) > 1]


def _retie(ties: list[list[_Slot]]) -> None:
    """One Parameter again where replacing a layer or assigning has made several; not where the file has them differ."""
    for (read, _), *others in ties:
        first = read()
        if all(torch.equal(first, get()) for get, _ in others):
            for _, put in others:
                put(first)
