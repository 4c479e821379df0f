"""Which form a module has: found by what it stores, and believed only where it computes the same.

Nothing is concluded from names. A copy of the module with random values in float64 is called on random inputs, and
what it gives is compared with each form that its shapes allow: at several batch sizes, lengths and magnitudes, in eval
and in training mode. So a module that does anything more (a mask, a dropout, an activation, a clamp) is not recognised.
"""

import inspect
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import permutations, product

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import CompressionError
from .._dense import DenseBilinear
from ._carried import copied, differ
from ._forms import Form, Mode, Ones, arranged, input_sizes, inputs

_MOST = 2**28  # elements of a weight above which no form is tried
_LAYOUTS: dict[Mode, tuple[str, ...]] = {
    "rows": ("o", "1"),
    "blocks": ("o", "1"),
    "pairs": (*("".join(order) for order in permutations("xyo")), "xy", "yx"),
}
_TRIED: dict[Mode, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = {
    "rows": (((3,), (3,)), ((2, 3), (2, 3))),
    "blocks": (((3,), (3,)), ((2, 3), (2, 3))),
    "pairs": (((2, 3), (2, 4)),),
}
# a form has to hold at all of these that the module itself takes: where sizes of 1 are squeezed, it shows here
_CONFIRMED: dict[Mode, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = {
    "rows": (((1,), (1,)), ((2, 1), (2, 1)), ((1, 3), (1, 3)), ((2, 3), (2, 3)), ((5,), (5,))),
    "blocks": (((1,), (1,)), ((2, 1), (2, 1)), ((1, 3), (1, 3)), ((2, 3), (2, 3)), ((5,), (5,))),
    "pairs": (((1, 1), (1, 1)), ((3, 1), (3, 2)), ((1, 4), (1, 1)), ((2, 3), (2, 4))),
}
_MAGNITUDES = (1.0, 1e-3, 1e3)


def recognise(module: nn.Module) -> Form | None:
    """The form of a module that is one by structure, or None; see the module's docstring. The module is not called."""
    if not _may_be(module):
        return None
    generator = torch.Generator().manual_seed(0)

    def random(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to("cpu", copy=True)
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            twin = copied(module, random, type(module).__name__).eval()
        except CompressionError:
            return None
        confirmed = (_confirmed(form, twin) for form in _matching(twin))
        return _agreed(form for form in confirmed if form is not None)


def _agreed(forms: Iterable[Form]) -> Form | None:
    """The one form, or the first of several for inputs of the same sizes, which do the same; a flat weight fits many.

    A form in blocks evaluates rows too, where input2 has the size of one block.
    """
    found: dict[tuple[int, ...], Form] = {}
    for form in forms:
        found.setdefault(tuple(value.shape[-1] for value in inputs(form, (), ())), form)
        if len(found) > 2:
            return None
    for form in found.values():
        if form.mode == "blocks" and found.keys() <= {(form.sizes[0],) * 2, form.sizes}:
            return form
    return next(iter(found.values())) if len(found) == 1 else None


def _may_be(module: nn.Module) -> bool:
    """Whether it stores what a form stores, and takes two inputs: a first look that costs nothing."""
    if type(module).__module__.partition(".")[0] == "torch" or "forward" in vars(module):
        return False
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    children = [child for child in module._modules.values() if child is not None]
    if list(module.buffers()) or any(is_lazy(parameter) for parameter in module.parameters()):
        return False
    if children:
        fits = len(children) == 1 and type(children[0]) is nn.Linear and not own
    else:
        shapes = sorted(parameter.dim() for parameter in own)
        fits = shapes in ([3], [1, 3])
    if not fits or any(not p.is_floating_point() or p.numel() > _MOST for p in module.parameters()):
        return False
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == 2 and all(p.kind in plain and p.default is p.empty for p in parameters)


def _matching(twin: nn.Module) -> Iterator[Form]:
    """The forms that are right for one call, each with the leading dimensions of that."""
    named = dict(twin.named_parameters())
    weight = next(name for name, value in named.items() if value.dim() > 1)
    bias = next((name for name, value in named.items() if value.dim() == 1), None)
    places: tuple[Ones, ...] = ("none", "last", "first")
    given: dict[object, Tensor | None] = {}
    for base in _whole(weight, bias, tuple(named[weight].shape)):
        layer = None
        some = places[:1] if base.mode == "blocks" else places
        for ones1, ones2, leading in product(some, some, _TRIED[base.mode]):
            form = replace(base, ones=(ones1, ones2), output="xyo" if base.mode == "pairs" else "o", leading=leading)
            if min(size - (place != "none") for size, place in zip(input_sizes(form), form.ones, strict=True)) < 1:
                continue
            input1, input2 = inputs(form, *leading, torch.float64)
            key = input1.shape, input2.shape
            if key not in given:
                given[key] = _call(twin, input1, input2)
            expected = given[key]
            if expected is None:
                continue
            out = form.to_weight(twin).shape[0]
            if expected.numel() != out * math.prod(leading[0]) * (leading[1][-1] if base.mode == "pairs" else 1):
                continue
            if bias is not None and named[bias].shape != (out,):
                continue
            layer = layer or DenseBilinear.from_weight(form.to_weight(twin), form.to_bias(twin))
            whole = form.call(twin, layer, input1, input2)
            for order in _LAYOUTS[base.mode]:
                if ("o" in order or out == 1) and differ(expected, arranged(whole, order)) is None:
                    yield replace(form, output=order)


def _whole(weight: str, bias: str | None, shape: tuple[int, ...]) -> Iterator[Form]:
    """Every way to read the stored weight, without regard to ones and the output's order."""
    modes: tuple[Mode, ...] = ("pairs", "rows")
    if len(shape) == 3:
        for letters, mode in product(permutations("oij"), modes):
            axes = "".join(letters)
            sizes = (shape[axes.index("i")], shape[axes.index("j")])
            yield Form(weight, bias, axes, sizes, mode=mode)
        return
    width = shape[1]
    for size1 in range(1, width + 1):
        if width % size1 == 0:
            for axes, mode in product(("o(ij)", "o(ji)"), modes):
                yield Form(weight, bias, axes, (size1, width // size1), mode=mode)
    for size in range(1, math.isqrt(width) + 1):
        if width % size**2 == 0 and width > size**2:
            yield Form(weight, bias, "o(kij)", (width // size, size), mode="blocks", blocks=width // size**2)


def _call(module: nn.Module, input1: Tensor, input2: Tensor) -> Tensor | None:
    try:
        output = module(input1, input2)
    except Exception:  # sizes that it does not take; whatever it raises, it is not this form
        return None
    return output if isinstance(output, Tensor) else None


def _confirmed(form: Form, twin: nn.Module) -> Form | None:
    """The form with the dimensions of inputs for which it holds at all sizes; None where it does not otherwise.

    Otherwise means at other magnitudes, or in training.
    """
    layer = DenseBilinear.from_weight(form.to_weight(twin), form.to_bias(twin))

    def holds(leading: tuple[tuple[int, ...], tuple[int, ...]], magnitude: float = 1.0) -> bool | None:
        """None where the module does not take such inputs."""
        input1, input2 = (magnitude * value for value in inputs(form, *leading, torch.float64))
        expected = _call(twin, input1, input2)
        return None if expected is None else differ(expected, form.call(twin, layer, input1, input2)) is None

    found = [(len(leading[0]) + 1, holds(leading)) for leading in _CONFIRMED[form.mode]]
    wrong, right = ({dim for dim, held in found if held is wanted} for wanted in (False, True))
    dims = tuple(sorted(right - wrong))
    if len(form.leading[0]) + 1 not in dims or not all(holds(form.leading, size) for size in _MAGNITUDES):
        return None
    twin.train()
    same = holds(form.leading)
    twin.eval()
    return replace(form, dims=dims) if same else None
