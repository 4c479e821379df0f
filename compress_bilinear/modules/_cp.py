"""`CPBilinear`: three linear layers around an elementwise product."""

import math

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import ops
from ..config import CPRank, Quantize, check_quantize, check_rank
from ..decomposition import CPDecomposition, cp, rounded, unit_columns
from ..errors import CompressionError
from ._linear import QuantizedLinear, fill_linear, linear_weight, make_linear
from ._operands import reason_against
from ._projected import ProjectedBilinear, project_blocks


class CPBilinear(ProjectedBilinear):
    """y = out_proj(in1_proj(x1) * in2_proj(x2)): a bilinear layer whose weight has CP rank R.

    R(I + J + O) parameters and 2R(I + J + O) + R FLOPs a row. Quantized, the columns of the three weights have equal
    magnitudes, and `out_proj.sigma` (R,) in float32 has the whole scale of each component: scale that moves between the
    factors of a CP costs no accuracy. It multiplies the product of the projections, which is formed in float32.

    Args:
        in1_features, in2_features, out_features: I, J and O.
        rank: R, any positive int.
        bias: whether to add a bias (O,).
        quantize: the name of a storage format; None for floating point.
        device, dtype: of the parameters.

    Raises: CompressionError for sizes below 1; ConfigError for another `rank` or `quantize`.

    Source: Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition" (2015), for
    convolutions; Kim et al., "Hadamard product for low-rank bilinear pooling" (2017), for the form.
    """

    method = "cp"
    part_names = ("in1_proj", "in2_proj", "out_proj")

    def __init__(
        self,
        in1_features: int,
        in2_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quantize: Quantize | None = None,
    ) -> None:
        check_quantize(quantize)
        check_rank(rank)
        super().__init__(in1_features, in2_features, out_features, quantize)
        self._rank = rank
        self.in1_proj = make_linear(in1_features, rank, False, quantize, device, dtype)
        self.in2_proj = make_linear(in2_features, rank, False, quantize, device, dtype)
        self.out_proj = make_linear(rank, out_features, bias, quantize, device, dtype, scaled=True)

    @property
    def rank(self) -> int:
        return self._rank

    @classmethod
    def from_decomposition(
        cls,
        decomposition: CPDecomposition,
        bias: Tensor | None = None,  # (O,)
        *,
        quantize: Quantize | None = None,
    ) -> Self:
        """The layer whose weight is `decomposition.to_tensor()`, in its dtype and on its device."""
        out, in1, in2 = decomposition.shape
        weights, dtype = decomposition.weights, decomposition.factors[0].dtype
        new = cls(in1, in2, out, decomposition.rank, bias is not None, "meta", dtype, quantize=quantize)
        parts = (new.out_proj, new.in1_proj, new.in2_proj)
        factors, scale = decomposition.factors, weights.double()
        if quantize is not None:
            units, peaks = zip(*(unit_columns(factor) for factor in factors), strict=True)
            sigma = (scale * math.prod(peaks)).to(torch.float32)
            if not bool(torch.isfinite(sigma).all()):
                raise CompressionError("The components' scales should be finite in float32. Found an infinite one.")
            new.out_proj.sigma = sigma
        else:
            # the weights go to the factors in equal parts, which keeps half-precision products in range
            root = scale.abs() ** (1 / 3)
            units = tuple(
                (factor.double() * (root * scale.sign() if mode == 0 else root)).to(dtype)
                for mode, factor in enumerate(factors)
            )
        for mode, (linear, unit) in enumerate(zip(parts, units, strict=True)):
            fill_linear(linear, unit.T if mode else unit)
        if bias is not None:
            new.set_bias(nn.Parameter(bias.detach().clone()))
        return new

    @classmethod
    def from_bilinear(
        cls, layer: nn.Bilinear, rank: CPRank, *, seed: int = 0, quantize: Quantize | None = None
    ) -> Self:
        """The layer whose weight is `decomposition.cp(layer.weight, rank, seed=seed)`; raises what that raises."""
        bias = None if layer.bias is None else layer.bias.detach()
        weight = layer.weight.detach()
        decomposition = rounded(cp(weight, rank, seed=seed, quantize=quantize), weight, quantize)
        return cls.from_decomposition(decomposition, bias, quantize=quantize)

    def to_decomposition(self, dtype: torch.dtype = torch.float64) -> CPDecomposition:
        """The stored decomposition: the layer's factors, with weights of one."""
        factors = [linear_weight(layer, dtype).detach() for layer in (self.out_proj, self.in1_proj, self.in2_proj)]
        return CPDecomposition(factors[0].new_ones(self.rank), (factors[0], factors[1].T, factors[2].T))

    @property
    def flops_per_row(self) -> int:
        return 2 * self.rank * (self.in1_features + self.in2_features + self.out_features) + self.rank

    def dense_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        out, in1, in2 = (linear_weight(layer, dtype) for layer in (self.out_proj, self.in1_proj, self.in2_proj))
        return torch.einsum("or,ri->oir", out[rows], in1) @ in2

    def _forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        operands = self._operands()
        if isinstance(operands, str):
            return self._of_product(self.in1_proj(input1), self.in2_proj(input2), input1)
        in1, in2, out = operands.weights
        return ops.bilinear_cp(input1, input2, in1, in2, out, operands.bias, sigma=self._sigma())

    def _pairwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        operands = self._operands()
        if not isinstance(operands, str):
            in1, in2, out = operands.weights
            return ops.pairwise_cp(input1, input2, in1, in2, out, operands.bias, sigma=self._sigma())
        left, right = self.in1_proj(input1), self.in2_proj(input2)
        blocks = ops.pair_blocks(left, right, self.out_features)
        return ops.over_pairs(lambda p, q: self._of_product(p, q, input1), left, right, blocks)

    def _blockwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        return self._of_product(project_blocks(self.in1_proj, input1), self.in2_proj(input2), input1, blocks=True)

    def _of_product(self, left: Tensor, right: Tensor, input: Tensor, *, blocks: bool = False) -> Tensor:
        """`out_proj(left * right)`, summed over blocks before, in the dtype that a linear layer of `input` has.

        With a quantized `out_proj`, products and sums are in float32: without their scale they could overflow.
        """
        wide = type(self.out_proj) is QuantizedLinear and reason_against(self.out_proj) is None
        options: list[torch.dtype] = []
        if wide:
            options = [ops.autocast_dtype(input.device.type, input) or input.dtype]
            left, right = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (left, right))
        product = (left * right).sum(-2) if blocks else left * right
        output: Tensor = self.out_proj(product, *options)
        return output

    def _sigma(self) -> Tensor | None:
        return None if self.quantize is None else self.out_proj._buffers.get("sigma")
