"""Replacements trained a little, without labels: the compressed network is to give the original network's outputs.

The factors of all CP and Tucker replacements move together, by Adam (Kingma and Ba, 2015) on the squared error of the
network's outputs (knowledge distillation: Hinton, Vinyals, Dean, 2015), through the rounding of their storage format
(straight-through gradients: Bengio, Léonard, Courville, 2013). What comes of it is kept only where the stored network's
error falls on batches that were not trained on.
"""

import bisect
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from random import Random
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..config import Quantize
from ..decomposition import Progress, stored_columns
from ..errors import CompressionError, ConfigError
from ..modules import (
    METHODS,
    Call,
    CompressedBilinear,
    DenseBilinear,
    FoundLayer,
    call,
    replacements,
    stored_as,
    undisturbed,
)
from ..quantization import FORMATS

DEFAULT_SECONDS = 60.0
Example: TypeAlias = tuple[Any, list[Tensor]]  # a batch, and what the network makes of it
_HELD_OUT = 4  # one batch in so many
_RATE = 1e-2  # of a parameter's root mean square, at first
_CHECKS = 12  # of the error on held-out batches
_MOST_BATCHES = 256
_MOST_BYTES = 2**28  # of the batches and of the network's outputs for them


class BatchSample:
    """A uniform sample of the calibration's batches, of bounded bytes, taken while something else consumes them."""

    def __init__(self, seed: int = 0, most_bytes: int = _MOST_BYTES) -> None:
        self._random = Random(seed)
        self._most_bytes = most_bytes
        self._kept: list[tuple[float, Any]] = []

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches."""
        for batch in batches:
            key = self._random.random()
            bisect.insort(self._kept, (key, batch), key=lambda pair: pair[0])
            while len(self._kept) > _MOST_BATCHES or (len(self._kept) > 2 and _bytes(self.batches) > self._most_bytes):
                self._kept.pop()
            yield batch

    @property
    def batches(self) -> list[Any]:
        """In random order."""
        return [batch for _, batch in self._kept]


@dataclass(frozen=True, eq=False)
class Distilled:
    """Distilled replacements, by the ids of the layers that they are for, and the network's error before and after."""

    modules: dict[int, CompressedBilinear]
    before: float
    after: float


def check_distillable(
    model: nn.Module, layers: Iterable[nn.Module], batches: Sequence[Any], forward_fn: Call | None
) -> None:
    """Run the model on one batch, and see that `distil` could match its outputs by `layers`. Raises: as `distil`."""
    if len(batches) < 2:
        raise ConfigError(
            "`refine='network'` needs at least two calibration batches, one of them to measure on. "
            f"Found {len(batches)}."
        )
    reached: list[nn.Module] = []

    def probed(module: nn.Module, args: object, output: object) -> object:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        reached.append(module)
        return output + torch.zeros_like(output, requires_grad=True)

    with undisturbed(model), torch.enable_grad(), ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(probed))
        outputs = _checked(_ran(partial(call, run=forward_fn), model, batches[0]))
    # where no layer was reached by this batch, it says nothing of the others
    if reached and not any(output.requires_grad for output in outputs):
        raise _not_differentiable()


def distil(
    model: nn.Module,
    replacements: Mapping[int, CompressedBilinear],
    batches: Sequence[Any],
    *,
    trained_bias: Iterable[int] = (),
    adapted: Mapping[int, FoundLayer] = MappingProxyType({}),
    forward_fn: Call | None = None,
    seconds: float = DEFAULT_SECONDS,
    progress: Progress | None = None,
    accept: Callable[[Mapping[int, CompressedBilinear]], bool] = lambda found: True,
) -> Distilled:
    """Fit replacements to the outputs of the whole network.

    Args:
        model: the original, which is left as it is; it runs in eval mode.
        replacements: for `nn.Bilinear` layers of it, by id. Dense ones stay as they are.
        batches: what the model takes, without labels; a quarter of them is held out.
        trained_bias: ids of the layers whose replacement's bias was corrected, and is trained too.
        adapted: those layers that modules of other forms hold, by the layer's id.
        forward_fn, seconds: how to run the model, and for how long in all.
        progress: as in `decomposition.cp`, with the error on held-out batches.
        accept: whether new replacements, by id, that lower the error will do.

    Returns:
        The replacements in their formats, distilled, or as they were where that is no better; and the relative error
        of the network's outputs on held-out batches before and after. Results depend on the machine's speed.

    Raises:
        ConfigError: there are not two batches; `check_distillable` says so before anything is solved.
        CompressionError: the model fails on a batch, its outputs hold no floating tensor or have no gradients, or it
            cannot be copied.
    """
    begun, run = time.perf_counter(), partial(call, run=forward_fn)
    with undisturbed(model):
        data = [(batch, _ran(run, model, batch)) for batch in batches]
    count = max(1, len(data) // _HELD_OUT)
    network = _Network(model, replacements, adapted, run, data[:count])
    before = network.error({})
    trained = {key: each for key, each in replacements.items() if METHODS[each.method].solve is not None}
    if not trained or not 0 < before < math.inf:
        return Distilled(dict(replacements), before, before)
    dtypes = {id(part): part.weight.dtype for part in model.modules() if isinstance(part, nn.Bilinear)}
    dtypes |= {key: each.layer.weight.dtype for key, each in adapted.items()}
    floating = {key: _trainable(module, dtypes[key]) for key, module in trained.items()}
    best, least = dict(replacements), before
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        parameters = [p for module in floating.values() for n, p in module.named_parameters() if not n.endswith("bias")]
        biases = [floating[key].bias for key in trained_bias if key in floating]
        parameters += [bias for bias in biases if isinstance(bias, nn.Parameter)]
        for done in _trained(network.student(floating), parameters, data[count:], run, begun, seconds):
            now = {key: _restored(module, trained[key]) for key, module in floating.items()}
            error = network.error(now)
            if error < least and accept(now):
                best, least = {**replacements, **now}, error
            if progress is not None:
                progress(done, least)
    return Distilled(best, before, least)


@dataclass(frozen=True, eq=False)
class _Network:
    """The original network, copies of it with replacements, and their errors on held-out batches."""

    model: nn.Module
    replacements: Mapping[int, CompressedBilinear]
    adapted: Mapping[int, FoundLayer]
    run: Call
    held_out: Sequence[Example]

    def student(self, changed: Mapping[int, CompressedBilinear]) -> nn.Module:
        """A copy in eval mode that holds the replacements themselves, of which some are changed."""
        modules, adapted = {**self.replacements, **changed}, self.adapted
        memo: dict[int, Any] = {key: module for key, module in modules.items() if key not in adapted}
        try:
            replacements(((adapted[key], modules[key]) for key in modules.keys() & adapted.keys()), memo)
            copied = copy.deepcopy(self.model, memo)
        except Exception as error:
            raise CompressionError(
                f"The model could not be copied to be distilled ({type(error).__name__}: {error})."
            ) from error
        own = {id(parameter) for module in modules.values() for parameter in module.parameters()}
        for parameter in copied.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)
        return copied.eval()

    def error(self, changed: Mapping[int, CompressedBilinear]) -> float:
        """‖f − f̂‖/‖f‖ of such a copy on the held-out batches, in float64; infinite where it is no number."""
        student, lost, total = self.student(changed), 0.0, 0.0
        with torch.no_grad():
            for batch, targets in self.held_out:
                found = zip(_outputs(self.run(student, batch)), _checked(targets), strict=True)
                lost = math.hypot(lost, _norm(f.double() - t.double() for f, t in found))
                total = math.hypot(total, _norm(targets))
        error = lost / total if total else 0.0
        return error if math.isfinite(error) else math.inf


def _trained(
    student: nn.Module, parameters: list[nn.Parameter], data: list[Example], run: Call, begun: float, seconds: float
) -> Iterator[float]:
    """Train until the time is up; whenever the error should be checked, yield the part of the time that is gone."""
    sizes = [float(parameter.detach().double().square().mean().sqrt()) or 1e-3 for parameter in parameters]
    rates = [_RATE * size for size in sizes]
    optimizer = torch.optim.Adam([{"params": [p]} for p in parameters], betas=(0.9, 0.99))
    norm = max(_norm(target for _, targets in data for target in targets) / math.sqrt(len(data)), 1e-30)
    checks = 1
    while (done := (time.perf_counter() - begun) / seconds) < 1:
        for number in torch.randperm(len(data), device="cpu").tolist():
            done = min((time.perf_counter() - begun) / seconds, 1.0)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
            batch, targets = data[number]
            found = zip(_outputs(run(student, batch)), targets, strict=True)
            loss = sum(((f - t) / norm).square().sum() for f, t in found)
            if not isinstance(loss, Tensor) or not loss.requires_grad:
                raise _not_differentiable()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if done >= checks / _CHECKS:
                break
        if done >= checks / _CHECKS:
            checks = int(done * _CHECKS) + 1
            yield min(done, 1.0)


def _ran(run: Call, model: nn.Module, batch: Any) -> list[Tensor]:
    try:
        return _outputs(run(model, batch))
    except Exception as error:
        raise CompressionError(
            f"The model failed on a calibration batch that `refine='network'` runs it on: {type(error).__name__}: "
            f"{error}\nPass `forward_fn`, say `lambda model, batch: model(batch[0])`, for batches with labels: a "
            "`loss_fn` does not say what the outputs are."
        ) from error


def _widened(module: CompressedBilinear) -> CompressedBilinear:
    """A copy in floating point, of float32 at least."""
    return stored_as(copy.deepcopy(module), None, torch.promote_types(module.weight_dtype, torch.float32))


def _trainable(module: CompressedBilinear, dtype: torch.dtype) -> CompressedBilinear:
    """Its factors as parameters, which are rounded as its format does whenever they are used; for inputs of `dtype`."""
    new = _widened(module)
    own = new.weight_dtype
    if dtype != own:
        new.register_forward_pre_hook(lambda _, inputs: tuple(value.to(own) for value in inputs))
        new.register_forward_hook(lambda _, inputs, output: output.to(dtype))
    if module.quantize is None:
        return new
    for name, mode in {"out_proj": 0, "in1_proj": 1, "in2_proj": 1, "core": None}.items():
        part = getattr(new, name, None)
        if isinstance(part, (nn.Linear, DenseBilinear)):
            parametrize.register_parametrization(part, "weight", _Rounded(module.quantize, mode))
    return new


class _Rounded(nn.Module):
    """What is stored of a factor, or of a core where `mode` is None; the gradient passes straight through."""

    def __init__(self, quantize: Quantize, mode: int | None) -> None:
        super().__init__()
        self._quantize, self._mode = quantize, mode

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            if self._mode is None:
                rounded = FORMATS[self._quantize].round_to(weight, "weight")
            else:
                factor = weight.T if self._mode else weight
                values, scale = stored_columns(factor, self._mode, self._quantize)
                rounded = (values * scale).T if self._mode else values * scale
        return weight + (rounded.to(weight.dtype) - weight).detach()


def _restored(module: CompressedBilinear, like: CompressedBilinear) -> CompressedBilinear:
    """In the storage format, dtype and compute mode of the replacement that it was made of."""
    plain = _widened(like)
    # by name: parametrizations cannot be removed from a copy, whose class is that of the module it was made of
    state = {name.replace(".parametrizations.weight.original", ".weight"): v for name, v in module.state_dict().items()}
    plain.load_state_dict(state)
    new = stored_as(plain, like.quantize, like.weight_dtype)
    bias, old = plain.bias, like.bias
    if isinstance(bias, nn.Parameter) and isinstance(old, nn.Parameter):
        new.set_bias(nn.Parameter(bias.detach().to(old.dtype), old.requires_grad))
    if new.quantize is not None:  # it is compared with `like`, and accepted, as it will compute
        new.set_compute(like.compute, like.compute_rows)
    return new


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a batch or in what a network returns, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def _bytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(value))


def _outputs(value: Any) -> list[Tensor]:
    return [tensor for tensor in _tensors(value) if tensor.is_floating_point()]


def _checked(outputs: list[Tensor]) -> list[Tensor]:
    if not outputs:
        raise CompressionError("The model should return a floating tensor, or a tuple or dict that has one.")
    return outputs


def _not_differentiable() -> CompressionError:
    return CompressionError(
        "The model's outputs should be differentiable by those of its bilinear layers, for `refine='network'`. "
        "Found outputs without gradients: is it run under no_grad, or detached?"
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(tensor.double().norm()) for tensor in tensors))
