"""Which form a module has: found by what it stores, and believed only where it computes the same.

Nothing is concluded from names. A copy of the module with random values in float64 is called on random inputs, and its
output is compared with every form that its shapes allow: at several batch sizes, lengths and magnitudes, in eval and in
training mode. So a module that does anything more (a mask, a dropout, an activation, a clamp) is not recognised.
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
from ._copies import copied, difference
from ._forms import Form, Leading, Ones, arranged

_MOST = 2**28  # elements of a weight above which no form is tried: 2 GB of random values
_MAGNITUDES = (1.0, 1e-3, 1e3)
# leading dimensions of the two inputs: those that find a form, and those that confirm it. A form has to hold at all of
# the latter that the module takes: a module that squeezes sizes of 1 shows it there.
_FIND_ROWS: tuple[Leading, ...] = (((3,), (3,)), ((2, 3), (2, 3)))
_FIND_PAIRS: tuple[Leading, ...] = (((2, 3), (2, 4)),)
_CONFIRM_ROWS: tuple[Leading, ...] = tuple((size, size) for size in ((1,), (2, 1), (1, 3), (2, 3), (5,)))
_CONFIRM_PAIRS: tuple[Leading, ...] = (((1, 1), (1, 1)), ((3, 1), (3, 2)), ((1, 4), (1, 1)), ((2, 3), (2, 4)))
_ROW_OUTPUTS = ("o", "1")
_PAIR_OUTPUTS = (*("".join(order) for order in permutations("xyo")), "xy", "yx")


def recognise(module: nn.Module) -> Form | None:
    """The form of a module by its structure, or None; see the docstring of this file. The module is not called."""
    if not (_has_the_parameters(module) and _takes_two_inputs(module)):
        return None
    generator = torch.Generator().manual_seed(0)

    def random(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to("cpu", copy=True)
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            twin = copied(module, random).eval()
        except CompressionError:
            return None
        confirmed = (_confirmed(form, twin) for form in _matching(twin))
        return _agreed(form for form in confirmed if form is not None)


def _agreed(forms: Iterable[Form]) -> Form | None:
    """The form, if all that take inputs of the same sizes are one: a flat weight can be read in many ways.

    A form in blocks evaluates rows too, where input2 has the size of one block.
    """
    by_sizes: dict[tuple[int, int], Form] = {}
    for form in forms:
        by_sizes.setdefault(form.input_sizes, form)  # the first of several, which compute the same
        if len(by_sizes) > 2:
            return None
    for form in by_sizes.values():
        if form.mode == "blocks" and by_sizes.keys() <= {(form.sizes[0],) * 2, form.sizes}:
            return form
    return next(iter(by_sizes.values())) if len(by_sizes) == 1 else None


def _has_the_parameters(module: nn.Module) -> bool:
    """Whether it stores what a form stores: a 3-dimensional weight and maybe a bias, or one `nn.Linear`."""
    if type(module).__module__.partition(".")[0] == "torch" or list(module.buffers()):
        return False
    parameters = list(module.parameters())
    if any(is_lazy(p) or not p.is_floating_point() or p.numel() > _MOST for p in parameters):
        return False
    own = [p for p in module._parameters.values() if p is not None]
    children = list(module.children())
    if children:
        return len(children) == 1 and type(children[0]) is nn.Linear and not own
    return sorted(p.dim() for p in own) in ([3], [1, 3])


def _takes_two_inputs(module: nn.Module) -> bool:
    """Whether its class has a forward of exactly two positional arguments."""
    if "forward" in vars(module):
        return False
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == 2 and all(p.kind in plain and p.default is p.empty for p in parameters)


def _matching(twin: nn.Module) -> Iterator[Form]:
    """The forms that give the twin's output in one call, each with the leading dimensions of that call."""
    named = dict(twin.named_parameters())
    outputs: dict[tuple[torch.Size, torch.Size], Tensor | None] = {}
    for reading in _readings({name: tuple(value.shape) for name, value in named.items()}):
        layer, out = None, reading.to_weight(twin).shape[0]
        if reading.bias is not None and named[reading.bias].shape != (out,):
            continue
        for form in _with_ones(reading):
            input1, input2 = form.inputs(*form.leading, torch.float64)
            key = input1.shape, input2.shape
            if key not in outputs:
                outputs[key] = _output(twin, input1, input2)
            output = outputs[key]
            rows = math.prod(form.leading[0]) * (form.leading[1][-1] if form.mode == "pairs" else 1)
            if output is None or output.numel() != out * rows:
                continue
            layer = layer or DenseBilinear.from_weight(form.to_weight(twin), form.to_bias(twin))
            whole = form.call(twin, layer, input1, input2)
            for order in _PAIR_OUTPUTS if form.mode == "pairs" else _ROW_OUTPUTS:
                if ("o" in order or out == 1) and difference(output, arranged(whole, order)) is None:
                    yield replace(form, output=order)


def _readings(shapes: dict[str, tuple[int, ...]]) -> Iterator[Form]:
    """Every way to read the stored weight, without regard to ones and the order of the output."""
    weight, shape = next((name, shape) for name, shape in shapes.items() if len(shape) > 1)
    bias = next((name for name, shape in shapes.items() if len(shape) == 1), None)
    if len(shape) == 3:
        for letters in permutations("oij"):
            axes = "".join(letters)
            sizes = shape[axes.index("i")], shape[axes.index("j")]
            yield Form(weight, bias, axes, sizes, mode="pairs", output="xyo")
            yield Form(weight, bias, axes, sizes)
        return
    width = shape[1]
    for size1, axes in product((size for size in range(1, width + 1) if width % size == 0), ("o(ij)", "o(ji)")):
        sizes = size1, width // size1
        yield Form(weight, bias, axes, sizes, mode="pairs", output="xyo")
        yield Form(weight, bias, axes, sizes)
    for size in range(1, math.isqrt(width - 1) + 1):
        if width % size**2 == 0:
            yield Form(weight, bias, "o(kij)", (width // size, size), mode="blocks", blocks=width // size**2)


def _with_ones(reading: Form) -> Iterator[Form]:
    """The reading with every place of a 1 in each input, and with the leading dimensions to try."""
    places: tuple[Ones, ...] = ("none",) if reading.mode == "blocks" else ("none", "last", "first")
    for ones1, ones2, leading in product(places, places, _FIND_PAIRS if reading.mode == "pairs" else _FIND_ROWS):
        form = replace(reading, ones=(ones1, ones2), leading=leading)
        if min(form.input_sizes) > 0:
            yield form


def _output(module: nn.Module, input1: Tensor, input2: Tensor) -> Tensor | None:
    try:
        output = module(input1, input2)
    except Exception:  # sizes that it does not take; whatever it raises, it is not this form
        return None
    return output if isinstance(output, Tensor) else None


def _confirmed(form: Form, twin: nn.Module) -> Form | None:
    """The form with the dimensions of inputs at all of whose sizes it holds.

    None where it does not hold at the dimensions that found it, at another magnitude, or in training.
    """
    layer = DenseBilinear.from_weight(form.to_weight(twin), form.to_bias(twin))

    def holds(leading: Leading, magnitude: float = 1.0) -> bool | None:
        """None where the module does not take such inputs."""
        input1, input2 = (magnitude * value for value in form.inputs(*leading, torch.float64))
        output = _output(twin, input1, input2)
        return None if output is None else difference(output, form.call(twin, layer, input1, input2)) is None

    right: set[int] = set()
    wrong: set[int] = set()
    for leading in _CONFIRM_PAIRS if form.mode == "pairs" else _CONFIRM_ROWS:
        held = holds(leading)
        if held is not None:
            (right if held else wrong).add(len(leading[0]) + 1)
    dims = tuple(sorted(right - wrong))
    if len(form.leading[0]) + 1 not in dims or not all(holds(form.leading, size) for size in _MAGNITUDES):
        return None
    twin.train()
    same = holds(form.leading)
    twin.eval()
    return replace(form, dims=dims) if same else None
