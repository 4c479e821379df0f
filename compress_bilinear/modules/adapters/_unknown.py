"""Modules that may hold a bilinear weight and are of no known form: a sentence on each, with the line to write."""

import inspect
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from itertools import islice, product

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import CompressionError
from .._base import CompressedBilinear
from ._adapter import AdaptedBilinear
from ._recognition import output_of, takes_two_inputs, trials

_CLOSE = 1e-6  # of the largest output: less is rounding
_MOST = 2**22  # elements of a module that is called on trial
_MOST_TRIALS, _MOST_DIVISOR = 512, 4096
_LEADING = (((5,), (5,)), ((2, 3), (2, 4)), ((2, 3), (2, 3)), ((2, 2, 3), (2, 2, 3)))
_ONES = tuple(product((0, 1), repeat=2))  # whether a 1 is appended to each of two
_TABLES = (nn.ParameterList, nn.ParameterDict)
_MOST_PARTS = 16  # of an input
_PLAIN = (nn.Linear, nn.Dropout, nn.Identity, nn.ModuleList, *_TABLES)  # the parts of a module that is called
_NOT_ASKED = (nn.Bilinear, CompressedBilinear, AdaptedBilinear, nn.modules.conv._ConvNd)


def unknown_forms(model: nn.Module, known: Collection[nn.Module]) -> list[str]:
    """A sentence for each weight outside the known modules that may be bilinear; one for all modules that are alike.

    It is in a module with a parameter of three axes or more; in one that multiplies its two inputs, or parts of a
    single one, by each other; or in one with an `nn.Linear` or `nn.Embedding` whose rows have a place for every product
    of what two other parts give.
    """
    inside = {id(part) for each in known for part in each.modules()}
    names: dict[str, list[str]] = {}  # by the sentence
    for name, module in model.named_modules():
        kind, parameters = type(module), dict(module.named_parameters())
        torchs, lazy = kind.__module__.partition(".")[0] == "torch", any(map(is_lazy, parameters.values()))
        if id(module) in inside or isinstance(module, _NOT_ASKED) or torchs or lazy:
            continue
        for weight, (why, how) in {own: told for own, *told in _suspicions(module, parameters)}.items():
            shape = "x".join(map(str, parameters[weight].shape))
            plain = all(map(str.isidentifier, weight.split(".")))
            read = f"module.{weight}" if plain else f"module.get_parameter({weight!r})"
            taken = "".join(f", {name}" for name in inspect.signature(module.forward).parameters)
            told = (
                f"({kind.__name__}) {why.format(f'`{weight}` ({shape})')}, but its forward is no form that is known by "
                f"structure. To compress it, write cb.register_adapter({kind.__name__}, to_weight=lambda module: "
                f"{how.format(read)}, call=lambda module, layer{taken}: ...)."
            )
            names.setdefault(told, []).append(name or "(root)")
    return [f"{', '.join(own)} {told}" for told, own in names.items()]


def _suspicions(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    """Names of weights that may be bilinear; why, with a place for the weight; and how to read it (out, in1, in2)."""
    thin = 2 - takes_two_inputs(module, optional=True)  # of one input, a place of (1, N, d) is no matrix
    tables = [f"{name}." for name, part in module.named_children() if isinstance(part, _TABLES)]
    own = [name for name in parameters if "." not in name or name.startswith(tuple(tables))]
    floating = [name for name in own if parameters[name].dim() > 2 and parameters[name].is_floating_point()]
    cubes = [name for name in floating if sum(size > 1 for size in parameters[name].shape) > thin]
    yield from ((name, f"has {{}}, of {parameters[name].dim()} axes", "{}") for name in cubes)
    if not cubes and parameters and (sizes := _multiplied(module)) is not None:
        weight = max(parameters, key=lambda name: parameters[name].numel())
        if parameters[weight].numel() >= math.prod(sizes):
            shape = parameters[weight].shape
            told = any(all(axes[k] - sizes[k] in (0, 1) for k in (0, 1)) for axes in (shape, shape[::-1]))
            size1, size2 = sizes if told else ("I", "J")  # those of an outer product may be any two
            why = f"computes with products of its two inputs, of sizes {size1} and {size2}, and has {{}}"
            yield weight, why, f"{{}}.view(-1, {size1}, {size2})"
    if not cubes and (name := _list_of_matrices(module)) is not None and _is_quadratic(module, name):
        why = f"computes with products of parts of its input, and has {{}} and {len(getattr(module, name)) - 1} like it"
        yield f"{name}.0.weight", why, f"torch.stack([part.weight for part in module.{name}], -1)"
    ends = dict(_ends(module))
    counts = {value for value in vars(module).values() if type(value) is int}.difference(
        out for _, out in ends.values()
    )
    for name, (given, out) in ends.items():
        row, others = given or out, [each for key, each in ends.items() if key != name]
        if f"{name}.weight" not in parameters or row in (size for _, size in others):
            continue
        widths = Counter(size for taken, size in others if taken != row)
        for size1, size2 in product(widths, {*widths, *counts}):
            twice = size1 != size2 or widths[size1] > 1 or not given
            for one, two in ((size1 + i, size2 + j) for i, j in _ONES if twice):
                if one * two == row and min(one, two) > 1:
                    why = f"has {{}}, with a column for each of {one} x {two} products"
                    yield f"{name}.weight", why, f"{{}}.view(-1, {one}, {two})"


def _ends(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """How many numbers linear layers and tables, in containers too, are given and give; a table is given none."""
    for name, part in module.named_children():
        if isinstance(part, nn.Linear):
            yield prefix + name, (part.in_features, part.out_features)
        elif isinstance(part, nn.Embedding):
            yield prefix + name, (0, part.embedding_dim)
        elif isinstance(part, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from _ends(part, f"{prefix}{name}.")


def _multiplied(module: nn.Module) -> tuple[int, int] | None:
    """The sizes of two inputs that a module of plain parts multiplies by each other."""
    if any(type(part) not in _PLAIN and part is not module for part in module.modules()):
        return None
    if not takes_two_inputs(module, optional=True) or sum(p.numel() for p in module.parameters()) > _MOST:
        return None
    with suppress(CompressionError), trials(module) as twin:
        for sizes, leading in islice(product(_sizes(module), _LEADING), _MOST_TRIALS):
            generator = torch.Generator().manual_seed(0)
            pairs = [
                torch.randn(2, *each, size, generator=generator, dtype=torch.float64, device="cpu")
                for each, size in zip(leading, sizes, strict=True)
            ]
            with suppress(Exception):  # of sizes that it does not take
                twin(pairs[0][0], pairs[1][0])
                return sizes if _is_bilinear(twin, *pairs) else None
    return None


def _is_bilinear(module: nn.Module, first: Tensor, second: Tensor) -> bool:
    """Whether a function of two tensors, of which there are two each, is additive in each, up to terms of the other.

    Or a function of their products: it takes a factor of the one as one of the other.
    """
    (x, a), (y, b) = first, second
    places = [(x, y), (a, y), (x + a, y), (0 * x, y), (x, b), (x, y + b), (x, 0 * y), (0 * x, 0 * y)]
    places += [(x / 4, y / 8), (x / 8, y / 4), (x / 8, y / 8)]
    outputs = [output_of(module, *place) for place in places]
    whole = outputs[0]
    if whole is None or any(output is None or output.shape != whole.shape for output in outputs):
        return False
    xy, ay, xay, y0, xb, xyb, x0, none, one, other, less = (each.double() for each in outputs if each is not None)
    additive = _is_small(xy + ay - xay - y0, xay) and _is_small(xy + xb - xyb - x0, xyb)
    of_both = additive and not _is_small(xy - x0 - y0 + none, xy)
    return of_both or (_is_small(one - other, one) and not _is_small(one - less, one))


def _list_of_matrices(module: nn.Module) -> str | None:
    """The name of the one list of `nn.Linear`s of one shape, of which a module consists."""
    parts = dict(module.named_children())
    name, part = next(iter(parts.items()), ("", None))
    if len(parts) != 1 or not isinstance(part, nn.ModuleList) or list(module.parameters(recurse=False)):
        return None
    shapes = {each.weight.shape if type(each) is nn.Linear and each.bias is None else None for each in part}
    return name if len(part) > 1 and len(shapes) == 1 and None not in shapes else None


def _is_quadratic(module: nn.Module, name: str) -> bool:
    """Whether a function of one tensor (N, parts, size) is a sum of products of two of its entries."""
    size = getattr(module, name)[0].in_features
    with suppress(CompressionError), trials(module) as twin:
        for parts in range(2, _MOST_PARTS):
            generator = torch.Generator().manual_seed(0)
            x, a, y = torch.randn(3, 5, parts, size, generator=generator, dtype=torch.float64, device="cpu")
            outputs = [output_of(twin, each) for each in (x + a + y, x + a, x + y, a + y, x, a, y, -x)]
            if any(output is None for output in outputs):
                continue
            xay, xa, xy, ay, fx, fa, fy, turned = (each.double() for each in outputs if each is not None)
            third = xay - xa - xy - ay + fx + fa + fy  # the difference of the third order
            return _is_small(third, xay) and _is_small(turned - fx, fx) and not _is_small(xa - fx - fa, xa)
    return False


def _is_small(difference: Tensor, of: Tensor) -> bool:
    return float(difference.abs().max()) <= _CLOSE * float(of.abs().max())


def _sizes(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Sizes of inputs that a module may take: of its weights, with and without a 1, and their divisors."""
    shapes = [value.shape for value in module.parameters() if value.dim() > 1]
    axes = sorted({size for shape in shapes for size in shape})
    yield from product([size - one for one in (0, 1) for size in axes if size - one > 1], repeat=2)
    for out, size in (shape[:2] for shape in shapes):
        for part in range(2, min(max(out, size), _MOST_DIVISOR) + 1):
            if size % part == 0:
                yield from ((part - one, size // part - two) for one, two in product((0, 1), repeat=2))
            if out % part == 0:
                yield from ((size, part), (part, size))
