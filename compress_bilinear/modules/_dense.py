"""`DenseBilinear`: the weight itself, exact or in a storage format, evaluated in the best order."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import ops
from ..config import Quantize
from ..decomposition import CPDecomposition, TuckerDecomposition
from ..quantization import FORMATS, QuantizedTensor
from ._base import CompressedBilinear
from ._linear import zero_bias


class DenseBilinear(CompressedBilinear):
    """`nn.Bilinear` with the same weight, evaluated in the best order for its shape, in bounded memory.

    Without `quantize` it is exact, has `nn.Bilinear`'s state_dict, and trains as it does. With it the weight is a
    `QuantizedTensor`, a module (`to_dense()` gives the tensor). An int8 weight has one bfloat16 scale for each output
    and each row along the longer input axis, or part of a row of at most 128 entries (`quantization.scale_grid`).
    Inputs may then have any floating dtype. Besides inputs and output, a forward holds at most 2²⁰ decoded values (or
    one output's) and a block of the intermediate (see `ops`). A backward keeps the inputs and at most one block of the
    intermediate; it decodes the weight again, slab by slab.

    Attributes:
        integer_rows: the rows of a `forward` from which it rounds the longer input's rows to int8 too, and multiplies
            integers, 0 for never: see `set_compute`. Pairs, blocks and indices are computed on the fly then.

    Args:
        in1_features, in2_features, out_features, bias, device, dtype: as of `nn.Bilinear`.
        quantize: the name of a storage format; None for floating point.

    Raises: CompressionError for sizes below 1; ConfigError for another `quantize`.
    """

    method = "dense"
    weight: nn.Parameter | QuantizedTensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quantize: Quantize | None = None,
    ) -> None:
        super().__init__(in1_features, in2_features, out_features, quantize)
        shape = (out_features, in1_features, in2_features)
        if quantize is None:
            self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        else:
            self.weight = FORMATS[quantize].zeros(shape, "weight", device)
        self.register_parameter("bias", zero_bias(out_features, bias, device, dtype))
        self.integer_rows = 0
        if quantize is None:
            self.reset_parameters()

    @property
    def takes_int8(self) -> bool:
        """Whether `integer_rows` may be set: the weight is int8."""
        return isinstance(self.weight, QuantizedTensor) and self.weight.format.integers

    def reset_parameters(self) -> None:
        """`nn.Bilinear`'s own initialisation. Raises: CompressionError where the weight is quantized."""
        if self.quantize is not None:
            super().reset_parameters()
        bound = 1 / math.sqrt(self.in1_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_bilinear(cls, layer: nn.Bilinear, *, quantize: Quantize | None = None) -> Self:
        """The same function as `layer`, exactly (or up to rounding), in its dtype and on its device."""
        return cls.from_weight(layer.weight, layer.bias, quantize=quantize)

    @classmethod
    def around(cls, layer: nn.Bilinear) -> Self:
        """The same function in the very Parameters of `layer`."""
        new = cls(layer.in1_features, layer.in2_features, layer.out_features, False, "meta")
        new.weight, new.bias = layer.weight, layer.bias  # type: ignore[assignment]  # a Parameter
        return new.train(layer.training)

    @classmethod
    def from_decomposition(
        cls,
        decomposition: CPDecomposition | TuckerDecomposition,
        bias: Tensor | None = None,  # (O,)
        *,
        quantize: Quantize | None = None,
    ) -> Self:
        """The layer with the whole weight `decomposition.to_tensor()`."""
        return cls.from_weight(decomposition.to_tensor(), bias, quantize=quantize)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,  # (O, I, J)
        bias: Tensor | None = None,  # (O,)
        *,
        quantize: Quantize | None = None,
    ) -> Self:
        """A layer with copies of this weight and bias."""
        out, in1, in2 = weight.shape
        new = cls(in1, in2, out, bias is not None, "meta", weight.dtype, quantize=quantize)
        if quantize is None:
            new.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        else:
            new.weight = FORMATS[quantize].encode(weight, "weight")
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone())
        return new

    @property
    def flops_per_row(self) -> int:
        return ops.dense_flops((self.out_features, self.in1_features, self.in2_features))

    def dense_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        if isinstance(self.weight, QuantizedTensor):
            return self.weight.decode(dtype, rows)
        return self.weight[rows].to(dtype)

    def _first_weight(self) -> Tensor | None:
        return self._parameters.get("weight")

    def set_bias(self, bias: nn.Parameter | None) -> None:
        self.bias = bias

    def _forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        if not self.integer_rows or not ops.has_rows(input1.shape[:-1], self.integer_rows):
            parameters: Any = self._parameters  # a lookup through `__getattr__` takes as long as a small sum
            weight, bias = parameters.get("weight"), parameters.get("bias")
            weight, bias = self.weight if weight is None else weight, self.bias if bias is None else bias
            return ops.bilinear_dense(input1, input2, weight, bias)
        assert isinstance(self.weight, QuantizedTensor)
        input1, input2 = self._inputs(input1, input2)
        with ops.without_autocast(input1.device.type):
            return ops.plus(ops.int8_bilinear(input1, input2, self.weight), self.bias)

    def _pairwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        return ops.pairwise_dense(input1, input2, self.weight, self.bias)

    def _pairwise_sum(self, input1: Tensor, input2: Tensor) -> Tensor:
        return self.contract(summed_products, input1, input2)

    def contract(self, multiply: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        """Σ_ij W_oij M_ij + b_o for M = `multiply(left, right)`, (..., I, J): a sum of products x1 ⊗ x2.

        In float16, in which products of inputs and their sums could overflow, both are computed in float32.
        """
        left, right = self._inputs(left, right)
        dtype = left.dtype
        wide = torch.float32 if dtype == torch.float16 else dtype
        with ops.without_autocast(left.device.type):
            product = multiply(left.to(wide), right.to(wide)).flatten(-2)
            weight = self.weight if isinstance(self.weight, QuantizedTensor) else self.weight.to(wide).flatten(1)
            return ops.plus(ops.project(product, weight), self.bias).to(dtype)

    def _blockwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        # (..., K, I / K, J), of which the first two axes are those of W
        return self.contract(lambda x1, x2: (x1.unsqueeze(-1) * x2.unsqueeze(-2)).flatten(-3, -2), input1, input2)

    def _indexed(self, input1: Tensor, index: Tensor) -> Tensor:
        (input1,) = self._inputs(input1)
        rows, columns = input1.reshape(index.numel(), self.in1_features, 1), index.reshape(-1)
        with ops.without_autocast(input1.device.type):
            slabs = ops.slabs(self.weight)
            run = ops.block_runner(isinstance(self.weight, QuantizedTensor) or len(slabs) > 1, rows)
            output = torch.cat([run(self._of_columns, rows, columns, slab) for slab in slabs], dim=1)
        return ops.plus(output.reshape(*index.shape, self.out_features), self.bias)

    def _of_columns(self, rows: Tensor, columns: Tensor, slab: slice) -> Tensor:
        """(N, I, 1), (N,) -> (N, slab, 1): each row times its own matrix."""
        return torch.bmm(self.dense_rows(slab, rows.dtype).movedim(2, 0)[columns], rows)

    def _inputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs in the dtype to compute in: autocast's, or the weight's."""
        weight = self._first_weight()
        dtype = ops.autocast_dtype(inputs[0].device.type, *inputs, weight)
        dtype = dtype or (inputs[0] if weight is None else weight).dtype
        return tuple(input.to(dtype) for input in inputs)


def summed_products(
    input1: Tensor,  # (..., S, L1, I)
    input2: Tensor,  # (..., S, L2, J)
) -> Tensor:  # (..., L1, L2, I, J)
    """Σ_s x1 ⊗ x2 of all pairs."""
    return torch.einsum("...ski,...slj->...klij", input1, input2)
