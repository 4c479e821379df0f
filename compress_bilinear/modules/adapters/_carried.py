"""One module that carries a bilinear weight: the weight read from it, its calls observed, its replacement verified."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_flatten, tree_map

from ...errors import CompressionError, ConfigError
from .._base import CompressedBilinear, block_rows
from .._dense import DenseBilinear
from ._adapter import COMPRESSED, AdaptedBilinear, Adapter, Arguments, rebuilt, without

_EXACT = 1e-10  # relative; both are computed in float64


class AdaptedLayer:
    """A module with its adapter.

    Attributes:
        module: what stands in the model; it is never changed.
        weights: names in it of the parameters that its weight is computed from; `biases` of its bias.
        elsewhere: names outside the module of parts that hold its weight, as the model has them.
        probe: takes the layer's place in calls that are observed; its `rows` is called with every pair of rows.

    Raises: ConfigError where the adapter's `to_weight` or `to_bias` does not give what it should.
    """

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        self.module = module
        self.adapter = adapter
        self.elsewhere: tuple[str, ...] = ()
        self._call: Arguments | None = None
        self._failure: Exception | None = None
        self._observing = False
        bare = copied(module, lambda tensor: torch.empty_like(tensor, device="meta"), self.kind)
        weight = self._read("to_weight", bare)
        if weight is None or weight.dim() != 3 or not weight.is_floating_point():
            found = "None" if weight is None else f"{tuple(weight.shape)} {weight.dtype}"
            raise ConfigError(f"`to_weight` of {self._who} should give a floating (out, in1, in2). Found {found}.")
        bias = self._read("to_bias", bare)
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ConfigError(
                f"`to_bias` of {self._who} should give shape {tuple(weight.shape[:1])}. Found {tuple(bias.shape)}."
            )
        self.weights = _sources(weight, bare)
        self.biases = () if bias is None else _sources(bias, bare)
        if not self.weights:
            raise ConfigError(
                f"`to_weight` of {self._who} should compute the weight from its parameters by differentiable "
                "operations. Found none that it depends on (`.data` and `.detach()` hide them)."
            )

    @property
    def kind(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    @property
    def _who(self) -> str:
        return f"the adapter {self.adapter.name!r}"

    def _read(self, what: str, module: nn.Module) -> Tensor | None:
        function: Callable[[nn.Module], Tensor | None] | None = getattr(self.adapter, what)
        if function is None:
            return None
        try:
            found = function(module)
        except Exception as error:
            raise ConfigError(f"`{what}` of {self._who} failed: {type(error).__name__}: {error}") from error
        if found is not None and not isinstance(found, Tensor):
            raise ConfigError(f"`{what}` of {self._who} should give a tensor. Found a {type(found).__name__}.")
        return found

    def bilinear(self) -> nn.Bilinear:
        """An `nn.Bilinear` of the module's weight and bias as they are now; its bias is the module's own Parameter."""
        with torch.no_grad():
            weight = self._read("to_weight", self.module)
            bias = self._read("to_bias", self.module)
        if weight is None:
            raise ConfigError(f"`to_weight` of {self._who} should give a tensor. Found None.")
        out, in1, in2 = weight.shape
        layer = nn.Bilinear(in1, in2, out, False, device="meta", dtype=weight.dtype)
        trained = all(self.module.get_parameter(name).requires_grad for name in self.weights)
        layer.weight = nn.Parameter(weight.detach(), trained)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())
        return layer.train(self.module.training)

    def objection(self) -> str | None:
        """Why the module's call cannot be its adapter's, or None; see also `verify`."""
        if any(is_parametrized(part) for part in self.module.modules()):
            return (
                "it is parametrized: call torch.nn.utils.parametrize.remove_parametrizations first, which bakes the "
                "parametrization into the weight"
            )
        if "forward" in vars(self.module):
            return "its forward was replaced on the instance, which a replacement would not run"
        if hasattr(self.module, COMPRESSED):
            return f"it has an attribute {COMPRESSED!r} already, which is where its replacement holds the layer"
        if self.elsewhere:
            return f"a part that holds its weight is shared with {', '.join(self.elsewhere)}, which would keep it"
        inner = (nn.Bilinear, CompressedBilinear, AdaptedBilinear)
        for name, part in self.module.named_modules():
            if isinstance(part, inner):
                return f"it contains a bilinear layer itself, {name!r}: only one of the two can be replaced at a time"
        return None

    @property
    def owners(self) -> list[nn.Module]:
        """The module, and those in it that hold its weight."""
        inner = (name.rpartition(".")[0] for name in self.weights)
        return [self.module, *(self.module.get_submodule(name) for name in inner if name)]

    def replaced(self, layer: CompressedBilinear, memo: dict[int, Any] | None = None) -> nn.Module:
        """The module around `layer`: it shares the rest with the original, or with `memo` has a deep copy of it."""
        shell, gone = without(self.module, {*self.weights, *self.biases})
        if memo is not None:
            shell = copy.deepcopy(shell, memo)
        return rebuilt(shell, self.adapter, gone, layer)

    @cached_property
    def probe(self) -> "Probe":
        return Probe(self.bilinear())

    def arguments(self) -> Arguments:
        """Of a call: the first that was observed, otherwise the adapter's example.

        Raises: CompressionError where there is neither, or the example cannot be made.
        """
        if self._call is not None:
            return self._call
        if self.adapter.example is None:
            raise CompressionError(
                f"it has not been seen at work, so {self._who} cannot be verified: pass `calibration`, or register "
                "the adapter with an `example`"
            )
        try:
            made = self.adapter.example(self.module)
        except Exception as error:
            raise CompressionError(f"`example` of {self._who} failed: {type(error).__name__}: {error}") from error
        like = self.bilinear().weight
        args, kwargs = ((), made) if isinstance(made, dict) else (made if isinstance(made, tuple) else (made,), {})
        return _tensors((args, kwargs), lambda t: t.to(like) if t.is_floating_point() else t.to(like.device))

    def verify(self) -> None:
        """Compare the module's own forward with its adapter's call around the exact weight, both in float64.

        Raises: CompressionError where they differ or either fails; the message says how.
        """
        if self._failure is not None:
            raise CompressionError(f"`call` of {self._who} failed: {_what(self._failure)}") from self._failure
        args, kwargs = _tensors(self.arguments(), _double)
        original = copied(self.module, _double, self.kind).eval()
        wide = AdaptedLayer(original, self.adapter)
        layer = wide.bilinear()
        exact = DenseBilinear.from_weight(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
        again = wide.replaced(exact, {}).eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            try:
                expected = original(*args, **kwargs)
            except Exception as error:
                raise CompressionError(f"its own forward failed in float64: {_what(error)}") from error
            try:
                found = again(*args, **kwargs)
            except Exception as error:
                raise CompressionError(f"`call` of {self._who} failed: {_what(error)}") from error
        difference = differ(expected, found)
        if difference is not None:
            raise CompressionError(f"`call` of {self._who} is not its own forward: in float64 {difference}")

    def rows(self) -> int:
        """How many pairs of rows reach the layer in a call with `arguments()`."""
        counted = 0

        def count(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
            nonlocal counted
            counted += inputs[0].shape[:-1].numel()

        handle = self.probe.rows.register_forward_pre_hook(count)
        args, kwargs = self.arguments()
        try:
            self.adapter.call(self.module, self.probe, *args, **kwargs)
        finally:
            handle.remove()
        return counted

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._observing:  # a `call` that calls the module would go on for ever
            raise CompressionError("`call` should not call the module that it replaces")
        if self._call is None:
            self._call = _tensors((args, kwargs), lambda tensor: tensor.detach().clone())
        self._observing = True
        try:
            with torch.no_grad():
                self.adapter.call(module, self.probe, *args, **kwargs)
        except Exception as error:
            self._failure = error  # `verify` tells it
        finally:
            self._observing = False


@contextmanager
def observing(layers: Iterable[AdaptedLayer | None]) -> Iterator[None]:
    """Inside, every call of the modules is made through their probes too, so that the rows can be seen."""
    handles = []
    try:
        for layer in layers:
            if layer is not None:
                handles.append(layer.module.register_forward_pre_hook(layer._observe, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Rows(nn.Module):
    """Called with pairs of rows, for the sake of its hooks."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(
        self,
        input1: Tensor,  # (..., I)
        input2: Tensor,  # (..., J)
    ) -> Tensor:  # (0, O), which a hook may look at
        return input1.new_zeros(0, self.out_features)


class Probe(DenseBilinear):
    """The exact layer on the original's memory, which shows `rows` what it is called with."""

    def __init__(self, layer: nn.Bilinear) -> None:
        super().__init__(layer.in1_features, layer.in2_features, layer.out_features, False, "meta")
        self.weight, self.bias = cast(nn.Parameter, layer.weight), layer.bias
        self.rows = _Rows(layer.out_features)

    def _bare(self, input1: Tensor, input2: Tensor) -> None:
        """No way past `rows`."""

    def _forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        self.rows(input1, input2)
        return super()._forward(input1, input2)

    def _pairwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        left, right = input1.unsqueeze(-2), input2.unsqueeze(-3)
        pairs = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
        self.rows(left.expand(*pairs, -1), right.expand(*pairs, -1))  # views: nothing is written out
        return super()._pairwise(input1, input2)

    def _blockwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        self.rows(block_rows(input1), input2)
        return super()._blockwise(input1, input2)

    def _indexed(self, input1: Tensor, index: Tensor) -> Tensor:
        self.rows(input1, nn.functional.one_hot(index.long(), self.in2_features).to(input1.dtype))
        return super()._indexed(input1, index)


def copied(module: nn.Module, make: Callable[[Tensor], Tensor], who: str) -> nn.Module:
    """A deep copy whose tensors are `make` of the original's; no memory but theirs is taken.

    Raises: ConfigError where it cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        if torch.nn.parameter.is_lazy(parameter):
            raise ConfigError(f"The parameters of {who} should be initialised. Found lazy ones: run the model once.")
        memo[id(parameter)] = nn.Parameter(make(parameter.detach()), parameter.is_floating_point())
    memo |= {id(buffer): make(buffer.detach()) for buffer in module.buffers()}
    for part in module.modules():
        values = (value for value in vars(part).values() if isinstance(value, Tensor))
        memo |= {id(value): make(value.detach()) for value in values if id(value) not in memo}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise ConfigError(f"{who} should be a module that can be copied. Found {_what(error)}") from error


def differ(expected: Any, found: Any) -> str | None:
    """In what two outputs, of tensors in any containers, are not the same; None where they are."""
    (first, structure), (second, other) = tree_flatten(expected), tree_flatten(found)
    if structure != other:
        return f"it gives {structure}, not {other}"
    for left, right in zip(first, second, strict=True):
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            if type(left) is not type(right) or (not isinstance(left, Tensor) and left != right):
                return f"it gives {left!r}, not {right!r}"
        elif left.shape != right.shape or left.dtype != right.dtype:
            return f"it gives {tuple(left.shape)} {left.dtype}, not {tuple(right.shape)} {right.dtype}"
        elif left.numel() and not torch.equal(left, right):
            left, right = left.double(), right.double()
            finite = left.isfinite()
            if not torch.equal(torch.where(finite, 0, left), torch.where(finite, 0, right)):
                return "they are not infinite in the same places"
            scale = left[finite].norm(torch.inf).item()
            error = (left[finite] - right[finite]).norm(torch.inf).item()
            if not error <= _EXACT * scale:
                return f"they differ by {error / max(scale, 1e-300):.2g} of the largest output"
    return None


def _sources(value: Tensor, module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that a tensor was computed from."""
    reached: set[int] = {id(value)}
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))  # of a node that accumulates into a leaf
        waiting += [following for following, _ in node.next_functions]
    named = module.named_parameters(remove_duplicate=False)
    return tuple(name for name, parameter in named if id(parameter) in reached)


def _double(tensor: Tensor) -> Tensor:
    """A float64 copy on the CPU; integers stay integers."""
    return tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _tensors(arguments: Arguments, function: Callable[[Tensor], Tensor]) -> Arguments:
    mapped: Arguments = tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, arguments)
    return mapped


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
