"""The shape suite: bilinear layers of public networks, and the layers that compete on each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.decomposition import cp_bytes, tucker_parameters
from compress_bilinear.measure import dense_calls
from compress_bilinear.modules import CompressedBilinear


@dataclass(frozen=True)
class Case:
    """A layer's sizes, and the rows of a call; with `pairs` the rows are (batch, length) and all pairs are scored."""

    name: str
    in1: int
    in2: int
    out: int
    rows: int
    pairs: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(O, I, J)."""
        return self.out, self.in1, self.in2

    @property
    def flops(self) -> int:
        """What `nn.Bilinear` spends on a call."""
        return 2 * self.rows * max(1, self.pairs**2) * self.out * self.in1 * self.in2


SUITE = (
    Case("dgi_discriminator", 512, 512, 1, 5416),
    Case("layout_relation", 384, 384, 2, 512),
    Case("simgnn_ntn", 32, 32, 16, 128),
    Case("xpos_tagger", 401, 51, 50, 5000),
    Case("dep_label", 101, 101, 45, 32, pairs=30),
    Case("drug_rescal", 64, 64, 86, 1024),
    Case("docred", 148, 148, 97, 6000),
    Case("deprel_pairs", 401, 401, 50, 100, pairs=50),
    Case("sdp_label", 601, 601, 100, 40, pairs=40),
    Case("tucker_kge", 256, 128, 256, 256),
    Case("clip_fusion", 512, 512, 512, 256),
    Case("enormous", 1024, 1024, 1024, 64),
)


def cp_rank(case: Case, fraction: float) -> int:
    """The largest CP rank within a fraction of the weight's parameters."""
    return max(1, int(fraction * case.out * case.in1 * case.in2) // cp_bytes(1, case.shape, 1, None))


def tucker_rank(case: Case, fraction: float) -> tuple[int, int, int]:
    """Ranks in proportion to the sizes, the largest within a fraction of the weight's parameters."""
    best = (1, 1, 1)
    for step in range(1, 101):
        rank = tuple(max(1, step * size // 100) for size in case.shape)
        if tucker_parameters(rank, case.shape) <= fraction * case.out * case.in1 * case.in2:
            best = (rank[0], rank[1], rank[2])
    return best


def contestants(
    case: Case, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Callable[[], Tensor]]]:
    """Calls that evaluate the same weight exactly, by name; and calls of compressed layers of a quarter of its size.

    The latter have random factors: their speed does not depend on the values.
    """
    generator = torch.Generator().manual_seed(0)
    layer = nn.Bilinear(case.in1, case.in2, case.out, dtype=dtype)
    compressed: dict[str, CompressedBilinear] = {
        "DenseBilinear int8": cb.DenseBilinear.from_bilinear(layer, quantize="int8"),
        "CPBilinear 4x": cb.CPBilinear(case.in1, case.in2, case.out, cp_rank(case, 0.25), dtype=dtype),
        "TuckerBilinear 4x": cb.TuckerBilinear(case.in1, case.in2, case.out, tucker_rank(case, 0.25), dtype=dtype),
    }
    dense = cb.DenseBilinear.from_bilinear(layer)
    lead = (case.rows, case.pairs) if case.pairs else (case.rows,)
    input1 = torch.randn(*lead, case.in1, generator=generator).to(dtype)
    input2 = torch.randn(*lead, case.in2, generator=generator).to(dtype)
    if not case.pairs:
        exact: dict[str, Callable[[], Tensor]] = {"nn.Bilinear": lambda: layer(input1, input2)}
        exact |= dense_calls(layer, input1, input2)
        exact["DenseBilinear"] = lambda: dense(input1, input2)
        return exact, {name: _rows_call(module, input1, input2) for name, module in compressed.items()}

    def expanded() -> Tensor:
        """What callers of `nn.Bilinear` have to write."""
        pairs = (case.rows, case.pairs, case.pairs)
        left = input1.unsqueeze(2).expand(*pairs, case.in1).contiguous()
        right = input2.unsqueeze(1).expand(*pairs, case.in2).contiguous()
        return layer(left, right)

    exact = {"nn.Bilinear": expanded, "DenseBilinear": lambda: dense.pairwise(input1, input2)}
    exact["einsum"] = lambda: cb.ops.reference.pairwise_dense(input1, input2, layer.weight, layer.bias)
    return exact, {name: _pairs_call(module, input1, input2) for name, module in compressed.items()}


def _rows_call(module: CompressedBilinear, input1: Tensor, input2: Tensor) -> Callable[[], Tensor]:
    return lambda: module(input1, input2)


def _pairs_call(module: CompressedBilinear, input1: Tensor, input2: Tensor) -> Callable[[], Tensor]:
    return lambda: module.pairwise(input1, input2)
