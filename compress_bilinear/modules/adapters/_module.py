"""One foreign module that holds bilinear weights: read them, observe its calls, verify and replace them."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ...errors import CompressionError, ConfigError
from .._base import CompressedBilinear, block_rows
from .._dense import DenseBilinear
from .._run import noting
from ._adapter import COMPRESSED, AdaptedBilinear, Adapter, Arguments, only, rebuilt, without
from ._copies import copied, described, difference, double


class _Rows(nn.Module):
    """Called with pairs of rows, so that its hooks see them."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(
        self,
        input1: Tensor,  # (..., I)
        input2: Tensor,  # (..., J)
    ) -> Tensor:  # (0, O), for a hook that looks at the output
        return input1.new_zeros(0, self.out_features)


class Probe(DenseBilinear):
    """The exact layer, in the original's memory, which calls `rows` with every pair of rows that it gets."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.rows = _Rows(self.out_features)

    def _forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        self.rows(input1, input2)
        return super()._forward(input1, input2)

    def _pairwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        self._pairs(input1, input2)
        return super()._pairwise(input1, input2)

    def _pairwise_sum(self, input1: Tensor, input2: Tensor) -> Tensor:
        self._pairs(input1, input2)
        return super()._pairwise_sum(input1, input2)

    def _pairs(self, input1: Tensor, input2: Tensor) -> None:
        left, right = input1.unsqueeze(-2), input2.unsqueeze(-3)
        pairs = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
        self.rows(left.expand(*pairs, -1), right.expand(*pairs, -1))  # views: no pair is written out

    def _blockwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        self.rows(block_rows(input1), input2)
        return super()._blockwise(input1, input2)

    def _indexed(self, input1: Tensor, index: Tensor) -> Tensor:
        self.rows(input1, nn.functional.one_hot(index.long(), self.in2_features).to(input1.dtype))
        return super()._indexed(input1, index)


class AdaptedModule:
    """A foreign module with its adapter.

    Attributes:
        module: the module of the model; it is never changed.
        weights: of each layer, names in the module of the parameters that its weight is computed from.
        biases: of each layer that has one, those of its bias.
        sources: those of all weights.
        elsewhere: the model's names, outside the module, of submodules that hold a weight.
        probes: take the layers' places in observed calls; the `rows` of each is called with every pair of rows.

    Raises: ConfigError where the adapter's `to_weight` or `to_bias` does not give what it should.
    """

    def __init__(self, module: nn.Module, adapter: Adapter) -> None:
        self.module = module
        self.adapter = adapter
        self.elsewhere: tuple[str, ...] = ()
        self._call: Arguments | None = None
        self._failure: Exception | None = None
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in: the graph is read
            on_meta = copied(module, lambda tensor: torch.empty_like(tensor, device="meta"))
            read = {key: self._weight_and_bias(on_meta, key) for key in adapter.to_weight}
        self.weights = {key: _source_parameters(weight, on_meta) for key, (weight, _) in read.items()}
        biases = {key: bias for key, (_, bias) in read.items() if bias is not None}
        self.biases = {key: _source_parameters(bias, on_meta) for key, bias in biases.items()}
        self.sources = [*chain(*self.weights.values())]
        if not all(self.weights.values()):
            raise ConfigError(
                f"`to_weight` of {self._who} should compute the weight from its parameters by differentiable "
                "operations. Found none that it depends on (`.data` and `.detach()` hide them; of a weight in "
                "a module that is no part of this one, register the class of a module that contains both)."
            )

    @property
    def _who(self) -> str:
        return f"the adapter {self.adapter.name!r}"

    def _weight_and_bias(self, module: nn.Module, key: str) -> tuple[Tensor, Tensor | None]:
        """What the adapter reads from the module, checked: (O, I, J), and (O,) or None."""
        what = "to_weight"
        try:
            weight = self.adapter.to_weight[key](module)
            what = "to_bias"
            bias = self.adapter.to_bias[key](module) if key in self.adapter.to_bias else None
        except Exception as error:
            raise ConfigError(f"`{what}` of {self._who} failed: {described(error)}") from error
        if not isinstance(weight, Tensor) or weight.dim() != 3 or not weight.is_floating_point():
            found = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else repr(weight)
            raise ConfigError(f"`to_weight` of {self._who} should give a floating (out, in1, in2). Found {found}.")
        if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
            found = str(tuple(bias.shape)) if isinstance(bias, Tensor) else repr(bias)
            raise ConfigError(f"`to_bias` of {self._who} should give shape {tuple(weight.shape[:1])}. Found {found}.")
        return weight, bias

    def bilinear(self, key: str = "") -> nn.Bilinear:
        """An `nn.Bilinear` of a layer's weight and bias as they are now; its bias is the module's own Parameter."""
        with torch.no_grad():
            weight, bias = self._weight_and_bias(self.module, key)
        out, in1, in2 = weight.shape
        layer = nn.Bilinear(in1, in2, out, False, device="meta", dtype=weight.dtype)
        trained = all(self.module.get_parameter(name).requires_grad for name in self.weights[key])
        layer.weight = nn.Parameter(weight.detach(), trained)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())
        return layer.train(self.module.training)

    def reads_as_stored(self) -> bool:
        """Whether it has one parameter, as it is, for a weight: another program may have taken it for a layer's."""
        if len(names := self.weights.get("", ())) != 1:
            return False
        weight, stored = self.adapter.to_weight[""](self.module), self.module.get_parameter(names[0])
        same = weight.shape == stored.shape and weight.stride() == stored.stride()
        return same and weight.data_ptr() == stored.data_ptr()

    def reason_against(self, key: str, size: int) -> str | None:
        """Why the adapter cannot stand for a module of this class and place, or None; see also `verify`.

        Args:
            key, size: of a layer, and the number of its weight's entries.
        """
        stored = sum(self.module.get_parameter(name).numel() for name in self.weights[key])
        if stored < size:
            return (
                f"its weight of {size} entries is computed from {stored}, so that it is compressed already: register "
                "what is multiplied last as the weight, and the rest as a part of its inputs"
            )
        if hasattr(self.module, COMPRESSED):
            return f"it has an attribute {COMPRESSED!r} already, which is where its replacement holds the layer"
        if self.elsewhere:
            keeping = ", ".join(self.elsewhere)
            return f"its weight is held by {keeping} too: register the class of a module that contains both"
        inner = (nn.Bilinear, CompressedBilinear, AdaptedBilinear)
        for name, part in self.module.named_modules():
            if isinstance(part, inner) and any(source.startswith(f"{name}.") for source in self.sources):
                return f"its weight is that of a bilinear layer in it, {name!r}: only one of the two can be replaced"
        return None

    @property
    def owners(self) -> list[nn.Module]:
        """The module, and its submodules that hold its weights."""
        inner = (name.rpartition(".")[0] for name in self.sources)
        return [self.module, *(self.module.get_submodule(name) for name in inner if name)]

    def replaced(
        self, layers: Mapping[str, CompressedBilinear] = MappingProxyType({}), memo: dict[int, Any] | None = None
    ) -> nn.Module:
        """The module around `layers` by their names, and around exact ones where there is none.

        It shares the rest with the original, or with `memo` has deep copies of it.
        """
        shell = without(self.module, {*self.sources, *chain(*self.biases.values())})
        exact = {key: self.bilinear(key) for key in self.weights if key not in layers}
        if memo is not None:
            shell, exact = copy.deepcopy((shell, exact), memo)
        there = {**layers, **{key: DenseBilinear.around(layer) for key, layer in exact.items()}}
        return rebuilt(shell, self.adapter, {key: there[key] for key in self.weights})

    @cached_property
    def probes(self) -> dict[str, Probe]:
        return {key: Probe.around(self.bilinear(key)) for key in self.weights}

    def arguments(self) -> Arguments:
        """The arguments of a call: the first observed one, otherwise the adapter's example.

        Raises: CompressionError where there is neither, or the example cannot be made.
        """
        if self._call is not None:
            return self._call
        if self.adapter.example is None:
            raise CompressionError(
                f"no call of it was observed, so {self._who} cannot be verified: pass `calibration`, or register "
                "the adapter with an `example`"
            )
        try:
            example = self.adapter.example(self.module)
        except Exception as error:
            raise CompressionError(f"`example` of {self._who} failed: {described(error)}") from error
        args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
        args = args if isinstance(args, tuple) else (args,)
        like = self.bilinear(next(iter(self.weights))).weight
        return _mapped((args, kwargs), lambda t: t.to(like) if t.is_floating_point() else t.to(like.device))

    def verify(self) -> None:
        """Compare the module's own method with its adapter's call around the exact weights, both in float64.

        Raises: CompressionError where they differ or either fails; the message says how.
        """
        if self._failure is not None:
            raise CompressionError(f"`call` of {self._who} failed: {described(self._failure)}") from self._failure
        args, kwargs = _mapped(self.arguments(), double)
        original = copied(self.module, double).eval()
        wide = AdaptedModule(original, self.adapter)
        replaced = wide.replaced(memo={}).eval()
        outputs, own = [], f"its own {self.adapter.method}"
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for module, what in ((original, own), (replaced, f"`call` of {self._who}")):
                try:
                    outputs.append(getattr(module, self.adapter.method)(*args, **kwargs))
                except Exception as error:
                    raise CompressionError(f"{what} failed in float64: {described(error)}") from error
        how = difference(*outputs)
        if how is not None:
            raise CompressionError(f"`call` of {self._who} is not {own}: in float64 {how}")

    def rows(self, key: str) -> int:
        """How many pairs of rows reach a layer in a call with `arguments()`."""
        counts: list[int] = []
        args, kwargs = self.arguments()
        with noting(self.probes[key].rows, "forward", lambda input1, _: counts.append(input1.shape[:-1].numel())):
            self.adapter.call(self.module, only(self.probes), *args, **kwargs)
        return sum(counts)

    def observe(self, *args: Any, **kwargs: Any) -> None:
        """Make a call of the module through the probe too."""
        if self._failure is not None:
            return
        if self._call is None:
            self._call = _mapped((args, kwargs), lambda tensor: tensor.detach().clone())
        try:
            with torch.no_grad():
                self.adapter.call(self.module, only(self.probes), *args, **kwargs)
        except Exception as error:
            self._failure = error  # `verify` reports it


@contextmanager
def observing(layers: Iterable[AdaptedModule | None]) -> Iterator[None]:
    """Inside, every call of the modules is also made through their probes, so that hooks on these see the rows."""
    with ExitStack() as stack:
        for layer in dict.fromkeys(layers):  # one module may hold several
            if layer is not None:
                stack.enter_context(noting(layer.module, layer.adapter.method, layer.observe))
        yield


def _source_parameters(value: Tensor, module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that a tensor was computed from, by its autograd graph."""
    reached: set[int] = {id(value)}
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))  # of a node that accumulates into a leaf
            waiting += [following for following, _ in node.next_functions]
    named = module.named_parameters(remove_duplicate=False)
    return tuple(name for name, parameter in named if id(parameter) in reached)


def _mapped(arguments: Arguments, function: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with `function` of each tensor in them."""
    mapped: Arguments = tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, arguments)
    return mapped
