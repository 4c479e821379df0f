"""What CP and Tucker layers have in common: a small product between linear layers."""

from abc import abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..config import Quantize
from ..quantization import QuantizedTensor
from ._base import CompressedBilinear, block_rows, has_other
from ._dense import DenseBilinear
from ._linear import AddBias, QuantizedLinear

_Rank = TypeVar("_Rank", int, tuple[int, int, int])

_WRITES = {"__set__", "__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow"))}
PLAIN = (nn.Linear, QuantizedLinear, DenseBilinear, AddBias, nn.Identity)  # modules that only multiply, or add a bias


class ProjectedBilinear(CompressedBilinear, Generic[_Rank]):
    """A small product between linear layers: what CP and Tucker have in common.

    Attributes:
        in1_proj, in2_proj, out_proj: linear layers, the last one with the bias. They are ordinary ones, except for a
            Tucker mode of rank near its size (`InterpolativeLinear`) or of full rank (`nn.Identity`, `AddBias`).
    """

    part_names: ClassVar[tuple[str, ...]]  # the inner layers in the order in which `ops` takes their weights
    takes_identities: ClassVar[bool] = False  # whether one of them may have no weight

    in1_proj: nn.Module
    in2_proj: nn.Module
    out_proj: nn.Module

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        rank: _Rank,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quantize: Quantize | None = None,
    ) -> None:
        super().__init__(in1_features, in2_features, out_features, quantize)
        self._rank: _Rank = rank
        self._make_parts(bias, quantize, device, dtype)

    @abstractmethod
    def _make_parts(self, bias: bool, *stored: Any) -> None:
        """Check the rank and make the inner layers; `stored` is their (format, device, dtype), as of `make_linear`."""

    @classmethod
    def from_decomposition(
        cls,
        decomposition: Any,
        bias: Tensor | None = None,  # (O,)
        *,
        quantize: Quantize | None = None,
    ) -> Self:
        """The layer whose weight is `decomposition.to_tensor()`, up to rounding, in its dtype and on its device.

        Args:
            decomposition: a `CPDecomposition` for a `CPBilinear`, a `TuckerDecomposition` for a `TuckerBilinear`.
        """
        (out, in1, in2), dtype = decomposition.shape, decomposition.factors[0].dtype
        new = cls(in1, in2, out, decomposition.rank, bias is not None, "meta", dtype, quantize=quantize)
        new._fill(decomposition)
        if bias is not None:
            new.set_bias(nn.Parameter(bias.detach().clone()))
        return new

    def _fill(self, decomposition: Any) -> None:
        """Store the parts of a decomposition in the inner layers."""
        raise NotImplementedError(f"{type(self).__name__} is made from no decomposition.")

    @property
    def rank(self) -> _Rank:
        return self._rank

    @property
    def weight(self) -> Tensor:
        """The weight (O, I, J) that the layer stands for, computed in each access (`to_dense()`): it cannot be set."""
        dense = self.to_dense()
        return dense if torch.compiler.is_compiling() else dense.as_subclass(_Computed)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (O,) of `out_proj`."""
        bias: nn.Parameter | None = getattr(self.out_proj, "bias", None)
        return bias

    def _first_weight(self) -> Tensor | None:
        modules: Any = self._modules
        for name in self.part_names:
            weight: Tensor | None = modules[name]._parameters.get("weight")
            if weight is not None and weight.is_floating_point():  # others replace it by integers
                return weight
        return None

    def _operands(self) -> list[Any] | str:
        """What an operation of `ops` takes besides the inputs, or the reason to call the inner modules one by one.

        That is the weight of each inner module, or None where it has none, and the last module's bias. A user may wrap
        an inner module (hooks, parametrizations, LoRA, sharding, a `forward` set on the instance): then it does more
        than to multiply. Every call asks this, so tensors are read from the dicts where `nn.Module` keeps them: a
        lookup through its `__getattr__` takes as long as a small sum.
        """
        if torch.nn.modules.module._has_any_global_hook():
            return "a global module hook is set"
        modules: Any = self._modules
        operands: list[Any] = []
        bias = None
        for name in self.part_names:
            if bias is not None:
                return f"`{self.part_names[len(operands) - 1]}` has a bias"
            module = modules[name]
            reason = reason_against(module)
            if reason is not None:
                return f"`{name}` {reason}"
            parameters = module._parameters
            weight = parameters["weight"] if "weight" in parameters else _tensor_of(module, "weight")
            bias = parameters["bias"] if "bias" in parameters else _tensor_of(module, "bias")
            if weight is None and not self.takes_identities:
                return f"`{name}` has no weight"
            if isinstance(weight, QuantizedTensor) and module.integer_rows:
                return f"`{name}` multiplies integers"
            operands.append(weight)
        operands.append(bias)
        return operands

    def _reason_against_kernels(self) -> str | None:
        reason = self._operands()
        return reason if isinstance(reason, str) else super()._reason_against_kernels()

    def set_bias(self, bias: nn.Parameter | None) -> None:
        self.out_proj.register_parameter("bias", bias)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"`{name}` of a {type(self).__name__} is computed from its parts: set out_proj.bias, or the weights of "
                "in1_proj, in2_proj and out_proj."
            )
        super().__setattr__(name, value)


class _Computed(Tensor):
    """A tensor that is computed in each access: a write, which would change nothing, raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = func.__name__, kwargs or {}
        writes = name.endswith("_") != name.startswith("__") or name in _WRITES
        if (writes and isinstance(args[0], cls)) or isinstance(options.get("out"), cls):
            raise AttributeError(
                f"The weight of a compressed layer should not be written to (`{name}`), for it is computed from the "
                "layer's parts. Change in1_proj, in2_proj and out_proj, or the network before it is compressed."
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **options)
        return found.as_subclass(cls) if func == Tensor.data.__get__ else found  # type: ignore[attr-defined]


def reason_against(module: nn.Module, kinds: tuple[type[nn.Module], ...] = PLAIN) -> str | None:
    """What the module does besides multiplying by its weight and adding its bias; None where it does nothing else."""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "has hooks"
    if "forward" in own and has_other("forward", module):
        return "has a `forward` of its own"
    return None if type(module) in kinds else f"is a {type(module).__name__}"


def _tensor_of(module: nn.Module, name: str) -> Any:
    """What takes the place of a parameter: a `QuantizedTensor`, any other attribute, or None."""
    if name in module._modules:
        return module._modules[name]
    return None if type(module) is nn.Identity else getattr(module, name, None)


def project_blocks(
    linear: nn.Module,
    input: Tensor,  # (..., K, I / K)
) -> Tensor:  # (..., K, out_features)
    """Each of K blocks of the input times its own columns of a linear layer of I inputs."""
    if type(linear) is nn.Linear and linear.bias is None and reason_against(linear) is None:
        weight = linear.weight.unflatten(1, tuple(input.shape[-2:]))
        return torch.einsum("...kb,rkb->...kr", input, weight)
    projected: Tensor = linear(block_rows(input))  # any other module takes whole rows
    return projected
