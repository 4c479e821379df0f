"""`TuckerBilinear`: a small dense bilinear core between three linear layers."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import ops
from ..config import Quantize, TuckerRank
from ..decomposition import (
    TuckerDecomposition,
    check_tucker_rank,
    interpolation,
    is_interpolated,
    mode_product,
    rounded,
    tucker,
    tucker_flops,
    tucker_rows,
    unit_columns,
    working_dtype,
)
from ._dense import DenseBilinear, summed_products
from ._linear import AddBias, InterpolativeLinear, fill_linear, linear_weight, make_linear
from ._projected import ProjectedBilinear, project_blocks


class TuckerBilinear(ProjectedBilinear[tuple[int, int, int]]):
    """y = out_proj(core(in1_proj(x1), in2_proj(x2))): a bilinear layer whose weight has Tucker rank (R_o, R_i, R_j).

    I·R_i + J·R_j + O·R_o + R_o·R_i·R_j parameters. `core` is a `DenseBilinear` without bias, so its weight is
    `core.weight`, of shape (R_o, R_i, R_j). A mode whose rank R is above three quarters of its size d has an
    interpolative projection, `InterpolativeLinear`, of R (d - R) parameters instead of R d. A mode whose rank is its
    size is absorbed into the core: it has no projection (`nn.Identity` on an input, the bias alone on the output).

    Quantized, the columns of a projection have equal magnitudes. Their scales are multiplied into the core, which is
    stored like a `DenseBilinear`: scale that moves between core and factors costs no accuracy.

    Args:
        in1_features, in2_features, out_features, bias, device, dtype: as of `nn.Bilinear`.
        rank: (R_o, R_i, R_j), in the order of the weight's axes (O, I, J).
        quantize: the name of a storage format; None for floating point.

    Raises: CompressionError for sizes below 1; ConfigError for another `quantize` or a rank outside 1..size.

    Source: Ben-younes et al., "MUTAN: Multimodal Tucker fusion for visual question answering" (2017).
    """

    method = "tucker"
    part_names = ("in1_proj", "in2_proj", "core", "out_proj")
    takes_identities = True

    def _make_parts(self, bias: bool, *stored: Any) -> None:
        check_tucker_rank(self.rank, (self.out_features, self.in1_features, self.in2_features), "the layer")
        self._rank = (self.rank[0], self.rank[1], self.rank[2])

        def projection(size: int, kept: int, widening: bool, bias: bool) -> nn.Module:
            ends = (kept, size) if widening else (size, kept)
            if kept == size:
                return AddBias(size, bias, *stored[1:]) if widening else nn.Identity()
            return (InterpolativeLinear if is_interpolated(kept, size) else make_linear)(*ends, bias, *stored)

        out, in1, in2 = self.rank
        self.in1_proj = projection(self.in1_features, in1, False, False)
        self.in2_proj = projection(self.in2_features, in2, False, False)
        self.core = DenseBilinear(in1, in2, out, False, *stored[1:], quantize=self.quantize)
        self.out_proj = projection(self.out_features, out, True, bias)

    def _fill(self, decomposition: TuckerDecomposition) -> None:
        # a factor (d, r) with r > 3 d / 4 is stored in part; the rest is multiplied into the core: see `interpolation`
        dtype, core = decomposition.core.dtype, decomposition.core.to(working_dtype(decomposition.core))
        for mode, layer in enumerate((self.out_proj, self.in1_proj, self.in2_proj)):
            factor = decomposition.factors[mode]
            if is_interpolated(factor.shape[1], factor.shape[0]):
                order, coefficients, turn = interpolation(factor)
                if not torch.equal(turn, turn.new_ones(len(turn)).diag()):  # else the large core is not copied
                    core = mode_product(core, turn.T.to(core.dtype), mode)
                if isinstance(layer, InterpolativeLinear):
                    layer.fill(order, coefficients.to(dtype))
                continue
            if self.quantize is not None:
                factor, peak = unit_columns(factor)
                if bool((peak != 1).any()):
                    core = core * peak.to(core.dtype).view([-1 if axis == mode else 1 for axis in range(3)])
            fill_linear(layer, factor.T if mode else factor)
        self.core = DenseBilinear.from_weight(core if self.quantize else core.to(dtype), quantize=self.quantize)

    def to_decomposition(self, dtype: torch.dtype = torch.float64) -> TuckerDecomposition:
        """The stored decomposition. The factor of a mode that is absorbed into the core is the identity."""
        core, factors = self.core.to_dense(dtype).detach(), []
        for layer, size in zip((self.out_proj, self.in1_proj, self.in2_proj), self.rank, strict=True):
            absorbed = isinstance(layer, (AddBias, nn.Identity))
            factors.append(core.new_ones(size).diag() if absorbed else linear_weight(layer, dtype).detach())
        return TuckerDecomposition(core, (factors[0], factors[1].T, factors[2].T))

    @classmethod
    def from_bilinear(cls, layer: nn.Bilinear, rank: TuckerRank, *, quantize: Quantize | None = None) -> Self:
        """The layer of `decomposition.tucker(layer.weight, rank)`, up to rounding; raises what that raises."""
        weight = layer.weight.detach()
        decomposition = rounded(tucker(weight, rank, quantize=quantize), weight, quantize)
        return cls.from_decomposition(decomposition, layer.bias, quantize=quantize)

    @property
    def flops_per_row(self) -> int:
        return tucker_flops(self.rank, (self.out_features, self.in1_features, self.in2_features))

    def dense_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        def read(part: slice) -> Tensor:
            return self.core.dense_rows(rows if absorbed else part, dtype)

        in1, in2 = (
            None if isinstance(proj, nn.Identity) else linear_weight(proj, dtype).T
            for proj in (self.in1_proj, self.in2_proj)
        )
        absorbed = isinstance(self.out_proj, AddBias)
        out = None if absorbed else linear_weight(self.out_proj, dtype)[rows]
        return tucker_rows(read, out, in1, in2)

    def _forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        operands = self._operands()
        if not isinstance(operands, str):
            return ops.bilinear_tucker(input1, input2, *operands)
        output: Tensor = self.out_proj(self.core(self.in1_proj(input1), self.in2_proj(input2)))
        return output

    def _pairwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        operands = self._operands()
        if not isinstance(operands, str):
            return ops.pairwise_tucker(input1, input2, *operands)
        output: Tensor = self.out_proj(self.core.pairwise(self.in1_proj(input1), self.in2_proj(input2)))
        return output

    def _pairwise_sum(self, input1: Tensor, input2: Tensor) -> Tensor:
        projected = self.in1_proj(input1), self.in2_proj(input2)
        output: Tensor = self.out_proj(self.core.contract(summed_products, *projected))
        return output

    def _blockwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        # the core of Σ_k p_k ⊗ q_k, as of one row
        left, right = project_blocks(self.in1_proj, input1).mT, self.in2_proj(input2)
        output: Tensor = self.out_proj(self.core.contract(torch.matmul, left, right))
        return output
