"""A layer that shows which pairs of rows it is called with."""

from typing import cast

import torch
from torch import Tensor, nn

from .._base import block_rows
from .._dense import DenseBilinear


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

    def __init__(self, layer: nn.Bilinear) -> None:
        super().__init__(layer.in1_features, layer.in2_features, layer.out_features, False, "meta")
        self.weight, self.bias = cast(nn.Parameter, layer.weight), layer.bias
        self.rows = _Rows(layer.out_features)

    def _forward(self, input1: Tensor, input2: Tensor) -> Tensor:
        self.rows(input1, input2)
        return super()._forward(input1, input2)

    def _pairwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        left, right = input1.unsqueeze(-2), input2.unsqueeze(-3)
        pairs = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
        self.rows(left.expand(*pairs, -1), right.expand(*pairs, -1))  # views: no pair is written out
        return super()._pairwise(input1, input2)

    def _blockwise(self, input1: Tensor, input2: Tensor) -> Tensor:
        self.rows(block_rows(input1), input2)
        return super()._blockwise(input1, input2)

    def _indexed(self, input1: Tensor, index: Tensor) -> Tensor:
        self.rows(input1, nn.functional.one_hot(index.long(), self.in2_features).to(input1.dtype))
        return super()._indexed(input1, index)
