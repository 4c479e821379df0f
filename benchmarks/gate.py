"""Whether a contestant is right: outputs, and gradients where it trains, against the definition in float64.

Rows from all over the batch are compared, with those beside the edges of blocks of rows. Gradients are of a direction
that is zero elsewhere, so that those of the weights are exact for these rows too, and the inputs' are zero in others.
Our own are looked at in other directions too, of a few rows each, until every 64 rows have had one: what it adds to the
gradient of a weight is to show.
A dense weight is widened to float64 in slices of its outputs; what is exact is kept for the contestants that follow.
"""

import math
import random
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from benchmarks.cases import Contestant

# of the largest entry of what is exact, for inputs and weights as they are in the dtype; the tests' own table
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TERMS = 256  # of a sum in float32 from which its rounding is let grow, as the root of their number
_GRADIENTS = 2.0  # on the tolerance of 16 bits, for autograd sums the gradients of many outputs in the dtype itself
_EDGES = (16, 64, 128, 1024)  # rows of the blocks that kernels take
_BLOCK = 64  # rows of which one has a gradient
# rows in a direction, by the bytes of the dtype, of which one left out exceeds the tolerance; for pairs, of the batch
_TOGETHER = {4: 32, 2: 8}
# exact outputs by the function that gave them, which holds the case's weights and is not to outlive it
_kept: WeakKeyDictionary[Callable[..., Tensor], Tensor] = WeakKeyDictionary()


def checked(count: int, pairs: bool = False) -> list[int]:
    """The rows that are compared, of `count`: the first and the last of blocks and batch; of pairs two batches."""
    if pairs:
        return sorted({0, count - 1})
    found = {0, count // 3, count // 2, count - 2, count - 1}
    for edge in _EDGES:
        found |= {edge - 1, edge, count // edge * edge}  # and where the last, partial block begins
    return sorted(row for row in found if 0 <= row < count)


def others(count: int, together: int, pairs: bool = False) -> list[list[int]]:
    """Rows from the blocks that `checked` leaves out, in groups; of pairs the rest of the batch."""
    size, first = 1 if pairs else _BLOCK, checked(count, pairs)
    missing = sorted(set(range(0, count, size)) - {row // size * size for row in first})
    choice = random.Random(count)
    rows = [choice.randrange(start, min(start + size, count)) for start in missing]
    return [rows[start : start + together] for start in range(0, len(rows), together)]


def wrong(contestant: Contestant, pairs: bool, training: bool = False, most_widened: int = 2**25) -> str:
    """What is wrong with a contestant, "" where all is within tolerance.

    Args:
        most_widened: elements of a dense weight that are converted to float64 at once.
    """
    inputs = contestant.tensors[:2]
    rows = torch.tensor(checked(inputs[0].shape[0], pairs), device=inputs[0].device)
    with torch.no_grad():
        output = contestant.call(*contestant.tensors)
        exact = _exact(contestant, rows)
        if output.shape != (*inputs[0].shape[:1], *exact.shape[1:]) or output.dtype != inputs[0].dtype:
            return f"an output of {tuple(output.shape)} in {output.dtype}"
        found = output.index_select(0, rows)
        del output
    error = _error(found, exact)
    if not error <= _tolerance(contestant):
        return f"relative error {error:.3g}"
    if not training:
        return ""
    groups = others(inputs[0].shape[0], _TOGETHER[inputs[0].itemsize], pairs) if contestant.ours else []
    rounds = [rows, *(torch.tensor(group, device=rows.device) for group in groups)]
    for number, chosen in enumerate(rounds):
        for what, error, tolerance in _training_errors(contestant, chosen, None if number else exact, most_widened):
            if not error <= tolerance:
                return f"relative error {error:.3g} in {what}"
    return ""


def _tolerance(contestant: Contestant, gradient: bool = False) -> float:
    dtype = contestant.computed_in or contestant.tensors[0].dtype
    if dtype.itemsize < 4:  # whose products are summed in float32
        return TOLERANCES[dtype] * (_GRADIENTS if gradient else 1.0)
    terms = max(size for tensor in contestant.stored for size in tensor.shape[0 if gradient else 1 :])
    return TOLERANCES[dtype] * math.sqrt(max(1.0, terms / _TERMS))


def _error(found: Tensor, exact: Tensor) -> float:
    """The largest difference, relative to the largest exact entry; NaN where one is found."""
    largest = float(exact.abs().amax()) if exact.numel() else 0.0
    return float((found.double() - exact).abs().amax()) / max(largest, 1e-30) if exact.numel() else 0.0


def _exact(contestant: Contestant, rows: Tensor) -> Tensor:
    output = _kept.get(contestant.exact)
    if output is None:
        output = contestant.exact(*(tensor.index_select(0, rows).double() for tensor in contestant.tensors[:2]))
        _kept[contestant.exact] = output
    return output


def _training_errors(
    contestant: Contestant, rows: Tensor, exact_rows: Tensor | None, most_widened: int
) -> Iterator[tuple[str, float, float]]:
    """Of each tensor's gradient in the parts that are compared, each with what it is of, and its tolerance.

    First of the output where a gradient is wanted, if the exact one is given.
    """
    tolerance = _tolerance(contestant, gradient=True)
    given = [tensor.detach().requires_grad_() for tensor in contestant.tensors]
    with torch.enable_grad():
        output = contestant.call(*given)
    if exact_rows is not None:
        found_rows = output.detach().index_select(0, rows)  # other blocks than without a gradient, so not the same
        yield "the output in training", _error(found_rows, exact_rows), _tolerance(contestant)
    generator = torch.Generator(rows.device).manual_seed(2)
    shape = (len(rows), *output.shape[1:])
    chosen = torch.randn(shape, generator=generator, device=rows.device).to(output.dtype)
    direction = torch.zeros_like(output).index_copy_(0, rows, chosen)
    found = torch.autograd.grad(output, given, direction)
    del output, direction
    inputs = [tensor.index_select(0, rows).double().requires_grad_() for tensor in contestant.tensors[:2]]
    totals = [torch.zeros_like(tensor) for tensor in inputs]
    stored = contestant.tensors[2:]
    outputs = stored[-1].shape[0]
    step = max(1, most_widened // stored[0][0].numel()) if contestant.family == "dense" else outputs
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        whole = step >= outputs
        wide = [(tensor if whole else tensor[part]).double().requires_grad_() for tensor in stored]
        with torch.enable_grad():
            exact = contestant.reference(*inputs, *wide)
        of_inputs = torch.autograd.grad(exact, (*inputs, *wide), chosen[..., part].double())
        for total, gradient in zip(totals, of_inputs[:2], strict=True):
            total += gradient
        for index, (gradient, own) in enumerate(zip(of_inputs[2:], found[2:], strict=True)):
            yield f"the gradient of operand {index + 3}", _error(own if whole else own[part], gradient), tolerance
    for index, (total, own) in enumerate(zip(totals, found[:2], strict=True)):
        yield f"the gradient of input{index + 1}", _error(own.index_select(0, rows), total), tolerance
        elsewhere = float(own.index_fill(0, rows, 0.0).abs().amax())
        yield f"the gradient of input{index + 1}, which should be zero for other rows", elsewhere, 0.0
