"""Modules that may hold a bilinear weight and are of no known form: a sentence on each, with the line to write."""

import inspect
from collections.abc import Collection, Iterator
from itertools import combinations_with_replacement, islice, product

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._base import CompressedBilinear
from ._adapter import AdaptedBilinear
from ._recognition import output_of, takes_two_inputs, trials

_CLOSE = 1e-6  # of the largest output: less is rounding
_MOST = 2**22  # elements of a module that is called on trial
_MOST_TRIALS, _MOST_DIVISOR = 512, 4096
_LEADING = (((5,), (5,)), ((2, 3), (2, 4)), ((2, 3), (2, 3)), ((2, 2, 3), (2, 2, 3)))
_TABLES = (nn.ParameterList, nn.ParameterDict)
_PLAIN = (nn.Linear, nn.Dropout, nn.Identity, *_TABLES)  # the parts of a module that is called
_NOT_ASKED = (nn.Bilinear, CompressedBilinear, AdaptedBilinear, nn.modules.conv._ConvNd)


def unknown_forms(model: nn.Module, known: Collection[nn.Module]) -> list[str]:
    """A sentence for each module outside the known ones that may hold a bilinear weight.

    That is one with a parameter of three axes or more; one that is linear in each of two inputs; and one with an
    `nn.Linear` or `nn.Embedding` whose rows have a place for every product of what two other parts give.
    """
    inside = {id(part) for each in known for part in each.modules()}
    sentences = []
    for name, module in model.named_modules():
        kind = type(module)
        if id(module) in inside or isinstance(module, _NOT_ASKED) or kind.__module__.partition(".")[0] == "torch":
            continue
        for weight, why, read in islice(_suspicions(module), 1):
            shape = "x".join(map(str, module.get_parameter(weight).shape))
            sentences.append(
                f"{name or '(root)'} ({kind.__name__}) {why.format(f'`{weight}` ({shape})')}, but its forward is no "
                f"form that is known by structure. To compress it, write cb.register_adapter({kind.__name__}, "
                f"to_weight=lambda module: {read}, call=lambda module, layer{_arguments(module)}: ...)."
            )
    return sentences


def _suspicions(module: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Names of weights that may be bilinear; why, with a place for the weight; and an expression that reads it."""
    tables = [(f"{key}.", part) for key, part in module._modules.items() if isinstance(part, _TABLES)]
    for prefix, part in (("", module), *tables):
        for key, value in part._parameters.items():
            if value is None or is_lazy(value) or not value.is_floating_point():
                continue
            if value.dim() > 2 and sum(size > 1 for size in value.shape) > 1:
                read = f"module.get_parameter('{prefix}{key}')" if prefix else f"module.{key}"
                yield f"{prefix}{key}", f"has {{}}, of {value.dim()} axes", read
    parameters = dict(module.named_parameters())
    if any(map(is_lazy, parameters.values())):
        return
    if parameters and (sizes := _linear_in_each(module)) is not None:
        size1, size2 = sizes
        weight = max(parameters, key=lambda name: parameters[name].numel())
        shape = parameters[weight].shape
        if parameters[weight].numel() >= size1 * size2:
            told = any(all(axes[k] - sizes[k] in (0, 1) for k in (0, 1)) for axes in (shape, shape[::-1]))
            names = sizes if told else ("I", "J")  # those of an outer product may be any two
            why = f"is linear in each of its two inputs, of sizes {names[0]} and {names[1]}, and has {{}}"
            yield weight, why, f"module.{weight}.view(-1, {names[0]}, {names[1]})"
    parts = {
        key: (part, part.out_features if isinstance(part, nn.Linear) else part.embedding_dim)
        for key, part in module._modules.items()
        if isinstance(part, (nn.Linear, nn.Embedding))
    }
    for key, (part, _) in parts.items():
        others = {other: size for other, (_, size) in parts.items() if other != key and size > 1}
        for (one, size1), (two, size2) in sorted(combinations_with_replacement(others.items(), 2), key=_same_part):
            if part.weight.shape[1] == size1 * size2 and size1 * size2 not in others.values():
                why = f"has {{}}, a column for each product of `{one}` ({size1}) and `{two}` ({size2})"
                yield f"{key}.weight", why, f"module.{key}.weight.view(-1, {size1}, {size2})"


def _same_part(pair: tuple[tuple[str, int], tuple[str, int]]) -> bool:
    return pair[0] == pair[1]


def _arguments(module: nn.Module) -> str:
    try:
        return "".join(f", {name}" for name in inspect.signature(module.forward).parameters)
    except ValueError:
        return ""


def _linear_in_each(module: nn.Module) -> tuple[int, int] | None:
    """The sizes of two inputs in each of which a module of plain parts is linear, but for terms of the other alone."""
    if any(type(part) not in _PLAIN and part is not module for part in module.modules()):
        return None
    if not takes_two_inputs(module, optional=True) or sum(p.numel() for p in module.parameters()) > _MOST:
        return None
    with trials(module) as twin:
        if twin is None:
            return None
        for sizes, leading in islice(product(_sizes(module), _LEADING), _MOST_TRIALS):
            generator = torch.Generator().manual_seed(0)
            pairs = [
                torch.randn(2, *each, size, generator=generator, dtype=torch.float64, device="cpu")
                for each, size in zip(leading, sizes, strict=True)
            ]
            if output_of(twin, pairs[0][0], pairs[1][0]) is not None:
                return sizes if _is_bilinear(twin, *pairs) else None
    return None


def _is_bilinear(module: nn.Module, first: Tensor, second: Tensor) -> bool:
    """Whether a function of two tensors, of which there are two each, is additive in each, up to a constant."""
    (x, a), (y, b) = first, second
    places = ((x, y), (a, y), (x + a, y), (0 * x, y), (x, b), (x, y + b), (x, 0 * y), (0 * x, 0 * y))
    outputs = [output_of(module, *place) for place in places]
    whole = outputs[0]
    if whole is None or any(output is None or output.shape != whole.shape for output in outputs):
        return False
    xy, ay, xay, y0, xb, xyb, x0, none = (output.double() for output in outputs if output is not None)
    bound = _CLOSE * max(float(each.abs().max()) for each in (xy, xay, xyb))
    wrong = max(float((xy + ay - xay - y0).abs().max()), float((xy + xb - xyb - x0).abs().max()))
    return wrong <= bound < float((xy - x0 - y0 + none).abs().max())


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
                yield size, part
