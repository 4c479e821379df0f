"""Which form a module has: found by what it stores, and believed only where it computes the same.

Nothing is concluded from names. A copy of the module with random values in float64 is called on random inputs, and its
output is compared with every form that its shapes allow: at several batch sizes, lengths and magnitudes, in eval and in
training mode. So a module that does anything more (a mask, a dropout, an activation, a clamp) is not recognised.
"""

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import permutations, product

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...errors import CompressionError
from .._base import has_other
from .._dense import DenseBilinear
from ._copies import copied, difference
from ._forms import Form, Leading, arranged

_ROUNDING = 1e-12  # of a factor that is 1
_MOST, _MOST_OF_MATRIX = 2**28, 2**22  # elements of a weight above which no form is tried: 2 GB of random values
# Leading dimensions of the two inputs, by their number. The first tells whether the module takes so many; then a form
# has to hold at all of them that it takes: a module that squeezes sizes of 1 shows it there.
_ROWS: tuple[tuple[Leading, ...], ...] = tuple(
    tuple((size, size) for size in sizes) for sizes in (((5,), (1,)), ((2, 3), (1, 3), (2, 1)))
)
_PAIRS: tuple[Leading, ...] = (((2, 3), (2, 3)), ((2, 3), (2, 4)), ((1, 4), (1, 1)), ((3, 1), (3, 2)), ((1, 1), (1, 1)))
_LEADINGS = {"pairs": (_PAIRS,)}
_ROW_OUTPUTS = ("o", "1")
_PAIR_OUTPUTS = (*("".join(order) for order in permutations("xyo")), "xy", "yx")

# what the twin was called with, and its output, by the sizes of the inputs
_Calls = dict[tuple[tuple[int, int], bool, Leading], tuple[tuple[Tensor, Tensor], Tensor | None]]


def recognise(module: nn.Module) -> Form | None:
    """The form of a module by its structure, or None; see the docstring of this file. The module is not called."""
    if not (_has_the_parameters(module) and takes_two_inputs(module)):
        return None
    forms: list[Form] = []
    with suppress(CompressionError), trials(module) as twin:
        calls: _Calls = {}
        forms += (form for reading in _readings(twin, calls) for form in _confirmed(reading, twin, calls))
    # forms that take inputs of the same sizes compute the same; inputs of several sizes leave open which are meant
    return forms[0] if len({form.input_sizes for form in forms}) == 1 else None


@contextmanager
def trials(module: nn.Module) -> Iterator[nn.Module]:
    """Inside, a copy of the module with random values in float64, in eval mode, to be called.

    Raises: CompressionError where it cannot be copied.
    """
    generator = torch.Generator().manual_seed(0)

    def random(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to("cpu", copy=True)
        # float32's take a quarter of the time
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu").double()

    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield copied(module, random).eval()


def _has_the_parameters(module: nn.Module) -> bool:
    """Whether it stores what a form stores: a weight of 2 or 3 dimensions and maybe a bias, or one `nn.Linear`."""
    if type(module).__module__.partition(".")[0] == "torch" or list(module.buffers()):
        return False
    parameters = list(module.parameters())
    if any(is_lazy(p) or not p.is_floating_point() or p.numel() > _MOST for p in parameters):
        return False
    own = [p for p in module._parameters.values() if p is not None]
    children = list(module.children())
    if children:
        return len(children) == 1 and type(children[0]) is nn.Linear and not own
    if any(p.dim() == 2 and p.numel() > _MOST_OF_MATRIX for p in own):  # a table of embeddings, say
        return False
    return sorted(p.dim() for p in own) in ([3], [1, 3], [2], [1, 2])


def takes_two_inputs(module: nn.Module, optional: bool = False) -> bool:
    """Whether its class has a forward of exactly two positional arguments, or of `optional` ones besides."""
    if has_other("forward", module):
        return False
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except ValueError:  # a forward that is not written in Python
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p.kind in plain for p in parameters if p.default is p.empty]
    return required == [True, True] and (optional or len(parameters) == 2)


def _readings(twin: nn.Module, calls: _Calls) -> Iterator[Form]:
    """Every way to read the stored weight and to add ones to the inputs, without regard to the output's order."""
    named = dict(twin.named_parameters())
    weight, shape = next((name, value.shape) for name, value in named.items() if value.dim() > 1)
    bias = next((name for name, value in named.items() if value.dim() == 1), None)
    if "." in weight:  # that of an `nn.Linear`
        for size in range(1, math.isqrt(shape[1] - 1) + 1):
            if shape[1] % size**2 == 0:
                sizes = (shape[1] // size, size)
                yield Form(weight, bias, "o(kij)", sizes, mode="blocks", blocks=sizes[0] // size)
        large = Form(weight, None, "oij", (shape[1], shape[0] + 1))
        if any(_called(large, twin, leadings[0], calls)[1] is not None for leadings in _ROWS):
            return  # it takes second inputs of any size
        one, divisors = bias is not None, (size for size in range(1, shape[0] + 1) if shape[0] % size == 0)
        for size, axes, one1, one2 in product(divisors, ("(oj)i", "(jo)i"), {one, True}, (False, True)):
            form = Form(weight, bias, axes, (shape[1] + one, size), (one1, one2))
            yield from (replace(form, mode="pairs", output="xyo"), form)
        return
    for letters in permutations("oij" if len(shape) == 3 else "ij"):
        out, in1, in2 = (shape[letters.index(letter)] if letter in letters else 1 for letter in "oij")
        for ones in product((False, True), (False, True)) if bias is None or len(named[bias]) in (1, out) else ():
            form = Form(weight, bias, "".join(letters), (in1, in2), ones)
            yield from (replace(form, mode="pairs", output="xyo"), form)
            yield from () if form.ones[1] else (replace(form, mode="index"),)


def _confirmed(form: Form, twin: nn.Module, calls: _Calls) -> Iterator[Form]:
    """The form in every order of the output in which it gives what the twin gives, with the dimensions where it does.

    That is at all leading dimensions that the twin takes, at other magnitudes, and in training mode.
    """
    if min(form.input_sizes) < 1:
        return
    layer, out = None, form.to_weight(twin).shape[0]
    orders = [each for each in (_PAIR_OUTPUTS if form.mode == "pairs" else _ROW_OUTPUTS) if "o" in each or out == 1]
    factors: dict[str, float] = {}  # of the orders that held
    held: dict[str, tuple[int, ...]] = {}
    for leadings in _LEADINGS.get(form.mode, _ROWS):
        left = orders
        for leading in leadings:
            inputs, output = _called(form, twin, leading, calls)
            if output is None and leading is not leadings[0]:
                continue
            count = out * math.prod(leading[0]) * (leading[1][-1] if form.mode == "pairs" else 1)
            if not left or output is None or output.numel() != count:
                left = []
                break
            layer = layer or DenseBilinear.from_weight(form.to_weight(twin), form.to_bias(twin))
            whole = form.call(twin, layer, *inputs)
            left = [order for order in left if _same(output, arranged(whole, order), order, factors)]
        for order in left:
            held[order] = (*held.get(order, ()), len(leadings[0][0]) + 1)
    for order, dims in held.items():
        ordered = replace(form, output=order, dims=dims, factor=factors[order])
        if _holds_otherwise(ordered, twin):
            yield ordered


def _called(
    form: Form, twin: nn.Module, leading: Leading, calls: _Calls
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """Random inputs for a form and what the twin gives for them; made once for all forms that take the same."""
    key = form.input_sizes, form.mode == "index", leading
    if key not in calls:
        inputs = form.inputs(*leading, torch.float64)
        calls[key] = inputs, output_of(twin, *inputs)
    return calls[key]


def _same(output: Tensor, found: Tensor, order: str, factors: dict[str, float]) -> bool:
    """Whether the two differ by a factor at most: that of the order, which the first comparison that holds sets."""
    if found.shape != output.shape:
        return False
    factor = factors.get(order) or float((output * found).sum() / found.square().sum())
    factor = factor if math.isfinite(factor) and factor and abs(factor - 1) > _ROUNDING else 1.0
    if difference(output, factor * found) is not None:
        return False
    factors[order] = factor
    return True


def _holds_otherwise(form: Form, twin: nn.Module) -> bool:
    """Whether a form that holds in eval mode for values of magnitude 1 also holds at others, and in training mode."""
    layer = DenseBilinear.from_weight(form.to_weight(twin), form.to_bias(twin))
    leading = next(each[0] for each in _LEADINGS.get(form.mode, _ROWS) if len(each[0][0]) + 1 in form.dims)
    for magnitude, training in ((1e-3, False), (1e3, False), (1.0, True)):
        first, second = form.inputs(*leading, torch.float64)
        input1, input2 = (magnitude * first, second if form.mode == "index" else magnitude * second)
        output = output_of(twin.train(training), input1, input2)
        twin.eval()
        if output is None or difference(output, form.call(twin, layer, input1, input2)) is not None:
            return False
    return True


def output_of(module: nn.Module, *inputs: Tensor) -> Tensor | None:
    try:
        output = module(*inputs)
    except Exception:  # sizes that it does not take; whatever it raises, it is not this form
        return None
    return output if isinstance(output, Tensor) else None
