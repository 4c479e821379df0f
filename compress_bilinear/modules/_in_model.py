"""The bilinear layers of a model: find them, select by name, say why one cannot be replaced."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized

from ..config import Config
from ..errors import CompressionError, MatchError
from ._base import CompressedBilinear, has_other
from .adapters import AdaptedModule, adapted_module, unknown_forms

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_HOOKS = [
    *("forward hooks", "forward pre-hooks", "backward hooks", "backward pre-hooks", "state_dict hooks"),
    *("state_dict pre-hooks", "load_state_dict pre-hooks", "load_state_dict post-hooks"),
]
# what a subclass may define and still compute what `nn.Bilinear` does; the last two are Python's own
_HARMLESS = {"__init__", "__repr__", "extra_repr", "reset_parameters", "__annotate__", "__annotate_func__"}


@dataclass(frozen=True, eq=False)
class FoundLayer:
    """A bilinear layer and all the names under which the model has it.

    Attributes:
        names: of the `nn.Bilinear`, or of the foreign module that holds the weight; "" for the model itself.
        layer: the `nn.Bilinear`; of a foreign module, one that is made of its weight and bias.
        adapted: how a foreign module holds the weight; None for an `nn.Bilinear`.
        key: the layer's name in a foreign module that holds several, otherwise "".
        twins: other `nn.Bilinear`s with the very same weight and bias, whose place the one replacement takes too.
    """

    names: tuple[str, ...]
    layer: nn.Bilinear
    adapted: AdaptedModule | None = None
    key: str = ""
    twins: tuple[nn.Bilinear, ...] = ()

    @property
    def label(self) -> str:
        """The first name as messages show it."""
        return self.labels[0]

    @property
    def labels(self) -> list[str]:
        """All names as messages show them."""
        return [path or "(root)" for path in self.paths]

    @property
    def paths(self) -> tuple[str, ...]:
        """All names, with that in the foreign module."""
        return tuple(".".join(filter(None, (name, self.key))) for name in self.names)

    def matches(self, glob: str) -> bool:
        """Whether a glob names it; the model itself is "(root)" too."""
        return any(fnmatchcase(name, glob) for name in (*self.names, *self.labels))

    @property
    def module(self) -> nn.Module:
        """The module of the model that has the names."""
        return self.layer if self.adapted is None else self.adapted.module

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The module and its twins."""
        return self.module, *self.twins

    @property
    def form(self) -> str:
        """ "nn.Bilinear", or the class name of a foreign module."""
        return "nn.Bilinear" if self.adapted is None else type(self.module).__name__

    @property
    def method(self) -> str:
        """The name of the method that uses the weight."""
        return "forward" if self.adapted is None else self.adapted.adapter.method

    @property
    def rows(self) -> nn.Module:
        """The module that is called with the layer's pairs of rows; of a foreign module, while it is observed."""
        return self.layer if self.adapted is None else self.adapted.probes[self.key].rows

    def current(self) -> nn.Bilinear:
        """The layer as the model has it now."""
        return self.layer if self.adapted is None else self.adapted.bilinear(self.key)

    def parameter_names(self) -> set[str]:
        """The full names of the parameters that a replacement does away with."""
        adapted = self.adapted
        own = ("weight", "bias") if adapted is None else (*adapted.weights[self.key], *adapted.biases.get(self.key, ()))
        return {f"{name}.{part}" if name else part for name in self.names for part in own}


def module_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module, by its id, in the model's order."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def find(model: nn.Module) -> list[FoundLayer]:
    """All `nn.Bilinear` layers and all foreign modules that an adapter knows, in the model's order.

    Each comes once, with all its names; those that have one weight, and one bias or none, are one.

    Raises: ConfigError where a registered adapter does not fit its module.
    """
    names = module_names(model)
    inner = {id(part) for layer in find_compressed(model).values() for part in layer.modules()}
    found: list[FoundLayer] = []
    tied: dict[tuple[int, ...], int] = {}  # places in `found`
    for module in model.modules():
        own = tuple(names[id(module)])
        if isinstance(module, nn.Bilinear):
            held = type(module) is nn.Bilinear or id(module), *map(id, module._parameters.values())
            place = tied.setdefault(held, len(found))
            if place == len(found):
                found.append(FoundLayer(own, module))
            else:
                first = found[place]
                found[place] = replace(first, names=(*first.names, *own), twins=(*first.twins, module))
        elif id(module) not in inner and (adapted := adapted_module(module)) is not None:
            inside = tuple(f"{name}." if name else "" for name in own)
            holders = [name for part in adapted.owners[1:] for name in names.get(id(part), ())]
            adapted.elsewhere = tuple(name for name in holders if not name.startswith(inside))
            found += [FoundLayer(own, adapted.bilinear(key), adapted, key) for key in adapted.weights]
    return found


def find_compressed(model: nn.Module) -> dict[str, CompressedBilinear]:
    """The compressed layers by their first name, "" for the model itself; not those that are a part of another."""
    found: dict[str, CompressedBilinear] = {}
    inner: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, CompressedBilinear) and id(module) not in inner:
            found[name] = module
            inner.update(id(part) for part in module.modules())
    return found


def select(model: nn.Module, configs: Mapping[str, Config | None]) -> tuple[list[tuple[FoundLayer, Config]], list[str]]:
    """The layers that a glob of `configs` matches, each with the config of the first that does; None leaves it out.

    Returns: also sentences on other modules that may hold a bilinear weight.

    Raises: MatchError where a glob matches nothing, is hidden by others, or all of them together leave nothing.
    """
    found = find(model)
    unknown = unknown_forms(model, [layer.module for layer in found])
    also = "".join(f" {sentence}" for sentence in unknown) or " `cb.register_adapter` makes one of another module."
    if not found:
        compressed = ", ".join(name or "(root)" for name in find_compressed(model))
        hint = f" These are compressed already: {compressed}." if compressed else ""
        required = f"The model should contain an nn.Bilinear. Found none in {type(model).__name__}."
        raise MatchError(required + hint + also)
    for module in model.modules():
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            raise CompressionError(
                f"`model` should not be wrapped for parallel training. Found {type(module).__name__}: "
                "compress its `.module` and wrap the result."
            )
    first: dict[FoundLayer, str] = {}
    for glob in configs:
        matched = [layer for layer in found if layer.matches(glob)]
        if not matched:
            required = f"`config` pattern {glob!r} should match an nn.Bilinear. Found: {_listing(found)}."
            raise MatchError(required + also)
        _check_order(glob, [first.setdefault(layer, glob) for layer in matched], configs)
    chosen = [(layer, config) for layer in found if layer in first and (config := configs[first[layer]]) is not None]
    if not chosen:
        raise MatchError(f"`config` should be for at least one nn.Bilinear. Found: {_listing(found)}.")
    return chosen, unknown


def _check_order(glob: str, holding: Sequence[str], configs: Mapping[str, Config | None]) -> None:
    """Raise MatchError where other globs hold for all layers that this one matches, and it is no wider than they."""
    hiding = [other for other in dict.fromkeys(holding) if configs[other] != configs[glob]]
    if glob not in holding and not all(fnmatchcase(other, glob) for other in hiding):
        raise MatchError(
            f"`config` pattern {glob!r} should be the first that matches some layer. Found that all of its layers are "
            f"taken by {', '.join(map(repr, hiding))} before it: put the narrower pattern first."
        )


def _listing(found: Sequence[FoundLayer]) -> str:
    shown = []
    for layer in found:
        shape = "lazy" if is_lazy(layer.layer) else "x".join(str(size) for size in layer.layer.weight.shape)
        shown.append(f"{' = '.join(layer.labels)} ({shape})")
    return ", ".join(shown)


def is_lazy(layer: nn.Bilinear) -> bool:
    """Whether the weight has no shape yet."""
    weight = layer._parameters.get("weight")
    return weight is not None and bool(torch.nn.parameter.is_lazy(weight))


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """For each parameter, by id, the full names under which distinct modules hold it."""
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def reason_against(found: FoundLayer, owners: Mapping[int, Sequence[str]], values: bool = True) -> str | None:
    """Why a layer cannot be replaced faithfully, or None; `values=False` leaves its values out of account."""
    layer, adapted, module = found.layer, found.adapted, found.module
    modules = found.modules if adapted is None else adapted.owners
    weights = [layer.weight] if adapted is None else [module.get_parameter(name) for name in adapted.sources]
    if any(is_parametrized(part) for each in found.modules for part in each.modules()):
        return (
            "it is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first, which bakes the "
            "parametrization into the weight"
        )
    if any(has_other(found.method, each) for each in found.modules):
        return (
            f"its {found.method} was replaced on the instance, which a replacement would not run: undo that first "
            "(what accelerate did by accelerate.hooks.remove_hook_from_submodules)"
        )
    reasons = chain(
        [_reason_against_class(layer) if adapted is None else adapted.reason_against(found.key, layer.weight.numel())],
        map(reason_against_hooks, modules),
        (_reason_against_tie(weight, owners, found) for weight in weights),
        (_reason_against_values(layer) for _ in range(values)),
    )
    return next((reason for reason in reasons if reason is not None), None)


def _reason_against_class(layer: nn.Bilinear) -> str | None:
    """What makes the layer more than an `nn.Bilinear`, or None."""
    kind = type(layer)
    for base in kind.__mro__[: kind.__mro__.index(nn.Bilinear)]:
        # what is called no method and named with two underscores, such as __doc__, is Python's own
        own = [
            name
            for name, value in vars(base).items()
            if name not in _HARMLESS and (callable(value) or not name.startswith("__"))
        ]
        if own:
            return f"its class {kind.__name__} has its own {own[0]}, which a replacement would not have"
    parts = {*layer._parameters, *layer._buffers, *layer._modules}
    if parts != {"weight", "bias"} or layer._buffers or layer._modules:
        extra, missing = sorted(parts - {"weight", "bias"}), sorted({"weight", "bias"} - set(layer._parameters))
        what = f"holds {', '.join(extra)}" if extra else f"has no parameter {', '.join(missing)}"
        return f"it {what}: a plain nn.Bilinear has the parameters weight and bias and nothing else"
    return None


def reason_against_hooks(module: nn.Module) -> str | None:
    """Which hooks of the module a replacement would not run, or None."""
    for what in _HOOKS:
        if getattr(module, "_" + what.replace(" ", "_").replace("-", "_"), None):
            return f"it has {what}, which a replacement would not run: remove them first"
    for name, parameter in module._parameters.items():
        if getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return f"its {name} has gradient hooks, which a replacement would not run: remove them first"
    return None


def _reason_against_tie(weight: Tensor, owners: Mapping[int, Sequence[str]], found: FoundLayer) -> str | None:
    names = owners.get(id(weight), ())  # by id: the layer itself counts once
    if len(names) < 2 or found.parameter_names().issuperset(names):
        return None
    return (
        f"its weight is tied ({' = '.join(names)}): replacing it would untie it and free nothing, but one layer in "
        "all of these places, or nn.Bilinears with one bias or none, are replaced in all"
    )


def _reason_against_values(layer: nn.Bilinear) -> str | None:
    """What is wrong with the layer's weight or bias, or None."""
    if is_lazy(layer):
        return "its weight is not initialised yet: run the model once first"
    for name, tensor in (("weight", layer.weight), ("bias", layer.bias)):
        if tensor is None:
            continue
        if tensor.is_meta:
            return f"its {name} is on the meta device and has no values: load them first"
        if tensor.dtype not in _DTYPES:
            return f"its {name} is {tensor.dtype}: float32, float64, float16 or bfloat16 is required"
        if type(tensor.data) is not Tensor or tensor.layout != torch.strided:
            return f"its {name} is a {type(tensor.data).__name__}, {tensor.layout}: a plain dense tensor is required"
        if tensor.numel() and not all(map(torch.isfinite, torch.aminmax(tensor.detach()))):  # it passes NaN on
            bad = int((~torch.isfinite(tensor.detach())).sum())
            return f"its {name} has {bad} values that are NaN or infinite"
    expected = (layer.out_features, layer.in1_features, layer.in2_features)
    if tuple(layer.weight.shape) != expected or layer.weight.numel() == 0:
        return f"its weight has shape {tuple(layer.weight.shape)}, where its features say {expected}, all at least 1"
    if layer.bias is not None and tuple(layer.bias.shape) != expected[:1]:
        return f"its bias has shape {tuple(layer.bias.shape)}, where {expected[:1]} is required"
    return None


def fingerprint(layer: nn.Bilinear) -> tuple[object, ...]:
    """Weight and bias, by dtype, device, shape and a checksum of every bit: a digest takes four times as long."""
    found: list[object] = []
    for tensor in (layer.weight, layer.bias):
        if tensor is not None:
            bits = tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy()
            found.append((tensor.dtype, tensor.device, tensor.shape, zlib.crc32(bits.data)))
    return tuple(found)
