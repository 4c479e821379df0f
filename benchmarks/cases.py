"""The shape suite: bilinear layers of public networks, and what competes on each.

Needs torch alone, and for two of the contestants on a GPU Triton.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from compress_bilinear import ops
from compress_bilinear.quantization import QuantizedTensor, scale_grid

_WHOLE_MOST = 2**26  # elements of an intermediate that is held whole
_OUTER_MOST = 2**26


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
    return max(1, int(fraction * case.out * case.in1 * case.in2) // sum(case.shape))


def tucker_rank(case: Case, fraction: float) -> tuple[int, int, int]:
    """Ranks in proportion to the sizes, the largest within a fraction of the weight's parameters."""
    best = (1, 1, 1)
    for step in range(1, 101):
        out, in1, in2 = (max(1, step * size // 100) for size in case.shape)
        if (
            out * in1 * in2 + case.out * out + case.in1 * in1 + case.in2 * in2
            <= fraction * case.out * case.in1 * case.in2
        ):
            best = (out, in1, in2)
    return best


@dataclass(frozen=True)
class Contestant:
    """A way to evaluate a layer.

    Attributes:
        call: a function of `tensors`.
        tensors: inputs first, then what is stored.
        reference: the definition, of the same tensors in float64.
        flops: of a forward, multiply-add counted as 2.
    """

    family: str
    call: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    reference: Callable[..., Tensor]
    flops: float
    trains: bool = True
    compiled: bool = field(default=False)


def contestants(case: Case, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Contestant]:
    """All that compete on a case, by name; compressed layers hold a quarter of the parameters, of random values."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).div_(shape[-1] ** 0.5).to(dtype)

    lead = (rows, case.pairs) if case.pairs else (rows,)
    x1, x2 = normal(*lead, case.in1) * case.in1**0.5, normal(*lead, case.in2) * case.in2**0.5
    weight, bias = normal(*case.shape), normal(case.out)
    rank, (r_out, r_in1, r_in2) = cp_rank(case, 0.25), tucker_rank(case, 0.25)
    cp = (x1, x2, normal(rank, case.in1), normal(rank, case.in2), normal(case.out, rank), bias)
    cores = normal(r_in1, case.in1), normal(r_in2, case.in2), normal(r_out, r_in1, r_in2), normal(case.out, r_out)
    tucker = (x1, x2, *cores, bias)
    pairs, count = bool(case.pairs), rows * max(1, case.pairs**2)
    dense_flops = 2.0 * rows * max(1, case.pairs**2) * case.out * case.in1 * case.in2
    if pairs:
        dense_flops = 2.0 * rows * case.pairs * case.out * (case.in1 * case.in2 + case.pairs * case.in2)
    dense = (x1, x2, weight, bias)
    exact: dict[str, Callable[..., Tensor]] = {"nn.Bilinear": _expanded if pairs else functional.bilinear}
    einsum = ops.reference.pairwise_dense if pairs else ops.reference.bilinear_dense
    if count * case.out * case.in1 <= _WHOLE_MOST * (1 + 3 * (device.type == "cuda")):
        exact["einsum"] = einsum
        if not pairs:
            exact["one GEMM"] = _one_gemm
    if not pairs and count * case.in1 * case.in2 <= _OUTER_MOST:
        exact["outer"] = _outer
    exact["dense"] = ops.pairwise_dense if pairs else ops.bilinear_dense
    found = {name: Contestant("dense", call, dense, einsum, dense_flops) for name, call in exact.items()}
    cp_call, tucker_call = (ops.pairwise_cp, ops.pairwise_tucker) if pairs else (ops.bilinear_cp, ops.bilinear_tucker)
    per_row = count if not pairs else rows * case.pairs
    cp_flops = 2.0 * rank * (per_row * (case.in1 + case.in2) + count * case.out)
    tucker_flops = 2.0 * (per_row * (case.in1 * r_in1 + case.in2 * r_in2) + count * (case.out * r_out))
    tucker_flops += 2.0 * (
        rows * case.pairs * r_out * r_in1 * r_in2 + count * r_out * r_in2 if pairs else count * r_out * r_in1 * r_in2
    )
    cp_reference, tucker_reference = (_cp_pairs, _tucker_pairs) if pairs else (_cp, _tucker)
    found["CP"] = Contestant("CP", cp_call, cp, cp_reference, cp_flops)
    found["Tucker"] = Contestant("Tucker", tucker_call, tucker, tucker_reference, tucker_flops)
    if not pairs:
        found["CP composed"] = Contestant("CP", _cp_chain, cp, cp_reference, cp_flops)
        found["Tucker composed"] = Contestant("Tucker", _tucker_chain, tucker, tucker_reference, tucker_flops)
    stored = QuantizedTensor.empty(weight.shape, scale_grid(weight.shape)).to(device).requantized(weight)
    int8 = lambda x1, x2, bias: exact["dense"](x1, x2, stored.qdata, bias, scale=stored.scale)  # noqa: E731
    wide = lambda x1, x2, bias: einsum(x1, x2, stored.dequantize(torch.float64), bias)  # noqa: E731
    found["dense int8"] = Contestant("dense", int8, (x1, x2, bias), wide, dense_flops, trains=False)
    if device.type == "cuda":
        _on_gpu(found, exact, dense, cp, tucker, pairs)
    return found


def _on_gpu(
    found: dict[str, Contestant],
    exact: dict[str, Callable[..., Tensor]],
    dense: tuple[Tensor, ...],
    cp: tuple[Tensor, ...],
    tucker: tuple[Tensor, ...],
    pairs: bool,
) -> None:
    """What only a GPU has: each fused kernel insisted on, each composed path, compiled ones, and a plain kernel."""
    names = {"dense": "dense", "CP": "CP", "Tucker": "Tucker"}
    for name in names:
        base = found[name]
        for backend in ("triton", "composed"):
            if pairs and name == "dense":
                continue

            def call(*tensors: Tensor, base: Contestant = base, backend: str = backend) -> Tensor:
                return base.call(*tensors, backend=backend)

            found[f"{name}, {backend}"] = Contestant(
                base.family, call, base.tensors, base.reference, base.flops, trains=not (pairs and backend == "triton")
            )
    compiled = {"einsum": exact.get("einsum"), "CP composed": _cp_chain, "Tucker composed": _tucker_chain}
    for name, function in compiled.items():
        if function is not None and name in found:
            base = found[name]
            found[f"{name}, compiled"] = Contestant(
                base.family,
                torch.compile(function, dynamic=False),
                base.tensors,
                base.reference,
                base.flops,
                False,
                True,
            )
    if not pairs:
        from benchmarks.plain_triton import plain_dense

        base = found["dense"]
        found["plain Triton"] = Contestant("dense", plain_dense, dense, base.reference, base.flops, trains=False)


def _expanded(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What callers of `nn.Bilinear` have to write for all pairs."""
    pairs = (*x1.shape[:-1], x2.shape[-2])
    left = x1.unsqueeze(-2).expand(*pairs, -1).contiguous()
    right = x2.unsqueeze(-3).expand(*pairs, -1).contiguous()
    return functional.bilinear(left, right, weight, bias)


def _one_gemm(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    partial = functional.linear(x2, weight.flatten(0, 1)).view(-1, *weight.shape[:2])
    return torch.bmm(partial, x1.unsqueeze(2)).squeeze(2) + bias


def _outer(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear((x1.unsqueeze(2) * x2.unsqueeze(1)).flatten(1), weight.flatten(1), bias)


def _cp_chain(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    """What anyone would write."""
    return functional.linear(functional.linear(x1, in1) * functional.linear(x2, in2), out, bias)


def _tucker_chain(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, core: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    inner = functional.bilinear(functional.linear(x1, in1), functional.linear(x2, in2), core)
    return functional.linear(inner, out, bias)


def _cp(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    return ops.reference.bilinear_cp(x1, x2, (out, in1.mT, in2.mT), bias)


def _cp_pairs(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    return ops.reference.pairwise_cp(x1, x2, (out, in1.mT, in2.mT), bias)


def _tucker(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, core: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    return ops.reference.bilinear_tucker(x1, x2, core, (out, in1.mT, in2.mT), bias)


def _tucker_pairs(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, core: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    return ops.reference.pairwise_tucker(x1, x2, core, (out, in1.mT, in2.mT), bias)
