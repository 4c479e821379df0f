"""`CPBilinear`: three linear layers around an elementwise product."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import ops
from ..config import CPRank, Quantize, check_rank
from ..decomposition import CPDecomposition, cp, rounded, unit_columns
from ..errors import CompressionError
from ._linear import QuantizedLinear, fill_linear, linear_weight, make_linear
from ._projected import ProjectedBilinear, project_blocks


class CPBilinear(ProjectedBilinear[int]):
    """y = out_proj(in1_proj(x1) * in2_proj(x2)): a bilinear layer whose weight has CP rank R.

    R(I + J + O) parameters and 2R(I + J + O) + R FLOPs a row. Quantized, the columns of the three weights have equal
    magnitudes, and `out_proj.sigma` (R,) in float32 has the whole scale of each component: scale that moves between the
    factors of a CP costs no accuracy. It multiplies the product of the projections, which is formed in float32.

    Args:
        in1_features, in2_features, out_features, bias, device, dtype: as of `nn.Bilinear`.
        rank: R, any positive int.
        quantize: the name of a storage format; None for floating point.

    Raises: CompressionError for sizes below 1; ConfigError for another `rank` or `quantize`.

    Source: Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition" (2015), for
    convolutions; Kim et al., "Hadamard product for low-rank bilinear pooling" (2017), for the form.
    """

    method = "cp"
    part_names = ("in1_proj", "in2_proj", "out_proj")

    def _make_parts(self, bias: bool, *stored: Any) -> None:
        check_rank(self.rank)
        self.in1_proj = make_linear(self.in1_features, self.rank, False, *stored)
        self.in2_proj = make_linear(self.in2_features, self.rank, False, *stored)
        self.out_proj = make_linear(self.rank, self.out_features, bias, *stored)
        if isinstance(self.out_proj, QuantizedLinear):
            self.out_proj.sigma = torch.zeros(self.rank, dtype=torch.float32, device=self.out_proj.weight.device)

    def _fill(self, decomposition: CPDecomposition) -> None:
        factors, scale = decomposition.factors, decomposition.weights.double()
        if self.quantize is not None:
            units, peaks = zip(*(unit_columns(factor) for factor in factors), strict=True)
            sigma = (scale * math.prod(peaks)).to(torch.float32)
            if not bool(torch.isfinite(sigma).all()):
                raise CompressionError("The components' scales should be finite in float32. Found an infinite one.")
            self.out_proj.sigma = sigma
        else:
            # the weights go to the factors in equal parts, which keeps half-precision products in range
            root = scale.abs() ** (1 / 3)
            units = tuple(
                (factor.double() * (root * scale.sign() if mode == 0 else root)).to(factor.dtype)
                for mode, factor in enumerate(factors)
            )
        parts = (self.out_proj, self.in1_proj, self.in2_proj)
        for mode, (linear, unit) in enumerate(zip(parts, units, strict=True)):
            fill_linear(linear, unit.T if mode else unit)

    @classmethod
    def from_bilinear(
        cls, layer: nn.Bilinear, rank: CPRank, *, seed: int = 0, quantize: Quantize | None = None
    ) -> Self:
        """The layer whose weight is `decomposition.cp(layer.weight, rank, seed=seed)`; raises what that raises."""
        weight = layer.weight.detach()
        decomposition = rounded(cp(weight, rank, seed=seed, quantize=quantize), weight, quantize)
        return cls.from_decomposition(decomposition, layer.bias, quantize=quantize)

    def to_decomposition(self, dtype: torch.dtype = torch.float64) -> CPDecomposition:
        """The stored decomposition: the layer's factors, with weights of one."""
        factors = [linear_weight(layer, dtype).detach() for layer in (self.out_proj, self.in1_proj, self.in2_proj)]
        return CPDecomposition(factors[0].new_ones(self.rank), (factors[0], factors[1].T, factors[2].T))

    @property
    def flops_per_row(self) -> int:
        return 2 * self.rank * (self.in1_features + self.in2_features + self.out_features) + self.rank

    def dense_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        out, in1, in2 = (linear_weight(layer, dtype) for layer in (self.out_proj, self.in1_proj, self.in2_proj))
        return torch.stack([(row * in1.T) @ in2 for row in out[rows]])  # an output at a time: (O, I, R) would be large

    def _forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        operands = self._operands()
        if isinstance(operands, str):
            return self._of_product(self.in1_proj(input1), self.in2_proj(input2))
        return ops.bilinear_cp(input1, input2, *operands, sigma=self._sigma())

    def _pairwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        operands = self._operands()
        if not isinstance(operands, str):
            return ops.pairwise_cp(input1, input2, *operands, sigma=self._sigma())
        return ops.over_pairs(self._of_product, self.in1_proj(input1), self.in2_proj(input2), self.out_features)

    def _sigma(self) -> Tensor | None:
        return cast(nn.Module, self._modules["out_proj"])._buffers.get("sigma")  # as fast as `_operands`

    def _pairwise_sum(self, input1: Tensor, input2: Tensor) -> Tensor:
        summed = partial(torch.einsum, "...skr,...slr->...klr")
        return self._of_product(self.in1_proj(input1), self.in2_proj(input2), summed)

    def _blockwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        projected = project_blocks(self.in1_proj, input1), self.in2_proj(input2)
        return self._of_product(*projected, lambda left, right: (left * right).sum(-2))

    def _of_product(
        self, left: Tensor, right: Tensor, multiply: Callable[[Tensor, Tensor], Tensor] = torch.mul
    ) -> Tensor:
        """`out_proj(multiply(left, right))` in the dtype of the projections.

        With a quantized `out_proj`, products and sums are in float32: without their scale they could overflow.
        """
        dtype = torch.promote_types(left.dtype, right.dtype)
        wide = torch.promote_types(dtype, torch.float32) if isinstance(self.out_proj, QuantizedLinear) else dtype
        with ops.without_autocast(left.device.type):
            product = multiply(left.to(wide), right.to(wide))
        output: Tensor = self.out_proj(product)
        return output.to(dtype)
