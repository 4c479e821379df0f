"""The shape suite: bilinear layers of public networks, and what competes on each.

Needs torch alone, and for two of the contestants on a GPU Triton.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from compress_bilinear import ops
from compress_bilinear.quantization import FORMATS, QuantizedTensor

_WHOLE_MOST = 2**27  # elements of an intermediate that is held whole
_OUTER_MOST = 2**26
_CHAIN_MOST = 2**29  # elements of the product of all pairs' projections that a chain without blocks may hold
_SLICE = 2**25  # elements of a weight that are widened to float64 at once


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
        exact: the definition, of inputs in float64.
        reference: the same of all `tensors` in float64, for gradients; unused where it does not train.
        stored: what a call reads: inputs and weights.
        flops: of a forward, multiply-add counted as 2.
        trains: whether gradients are asked of it.
        compiled: whether torch.compile makes it.
        ours: whether kernels of this package run, whose gradients are looked at block by block.
        computed_in: the dtype of its products, whose tolerance it has; that of its tensors if None.
    """

    family: str
    call: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    exact: Callable[[Tensor, Tensor], Tensor]
    reference: Callable[..., Tensor]
    stored: tuple[Tensor, ...]
    flops: float
    trains: bool = True
    compiled: bool = False
    ours: bool = False
    computed_in: torch.dtype | None = None


@dataclass(frozen=True)
class _Weights:
    """What the layers of a case hold, of random values; the compressed ones a quarter of the parameters."""

    dense: tuple[Tensor, ...]
    int8: QuantizedTensor
    cp: tuple[Tensor, ...]
    cp_int8: tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor, Tensor]
    tucker: tuple[Tensor, ...]


@lru_cache(maxsize=1)  # groups that differ in their rows follow each other
def _weights(case: Case, dtype: torch.dtype, device: torch.device) -> _Weights:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:  # with which outputs are about 1, and so is the bias: one left out shows
        return torch.randn(shape, generator=generator, device=device).div_(math.prod(shape[1:]) ** 0.5).to(dtype)

    weight, bias = normal(*case.shape), normal(case.out)
    rank, (r_out, r_in1, r_in2) = cp_rank(case, 0.25), tucker_rank(case, 0.25)
    cp = (normal(rank, case.in1), normal(rank, case.in2), normal(case.out, rank), bias)
    tucker = (
        normal(r_in1, case.in1),
        normal(r_in2, case.in2),
        normal(r_out, r_in1, r_in2),
        normal(case.out, r_out),
        bias,
    )
    # the scale of a component is in one number for all its factors
    units, peaks = zip(*(_unit(factor, 1 - at // 2) for at, factor in enumerate(cp[:3])), strict=True)
    first, second, last = (FORMATS["int8"].encode(unit, "factor") for unit in units)
    sigma = math.prod(peaks).flatten()
    return _Weights((weight, bias), FORMATS["int8"].encode(weight, "weight"), cp, (first, second, last, sigma), tucker)


def _unit(factor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """A factor whose largest entries along an axis are those that int8 holds, and what it was divided by."""
    peak = factor.float().abs().amax(axis, keepdim=True) * (128 / 127)
    return factor.float() / peak, peak.flatten()


def contestants(case: Case, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Contestant]:
    """All that compete on a case, by name; compressed layers hold a quarter of the parameters."""
    generator = torch.Generator(device).manual_seed(1)
    pairs, count = bool(case.pairs), rows * max(1, case.pairs**2)
    lead = (rows, case.pairs) if pairs else (rows,)
    inputs = tuple(
        torch.randn((*lead, size), generator=generator, device=device).to(dtype) for size in (case.in1, case.in2)
    )
    held = _weights(case, dtype, device)
    (weight, bias), (rank, _), (r_out, r_in1, r_in2) = held.dense, held.cp[0].shape, held.tucker[2].shape
    dense_flops = 2.0 * count * case.out * case.in1 * case.in2
    if pairs:
        dense_flops = 2.0 * rows * case.pairs * case.out * (case.in1 * case.in2 + case.pairs * case.in2)
    einsum = ops.reference.pairwise_dense if pairs else ops.reference.bilinear_dense
    calls: dict[str, Callable[..., Tensor]] = {"nn.Bilinear": _expanded if pairs else functional.bilinear}
    between = rows * case.pairs * case.out * case.in2 if pairs else count * case.out * case.in1
    if between <= _WHOLE_MOST * (1 + (device.type == "cuda")):
        calls["einsum"] = einsum
        if not pairs:
            calls["one GEMM"] = _one_gemm
    if not pairs and count * case.in1 * case.in2 <= _OUTER_MOST:
        calls["outer"] = _outer
    calls["dense"] = ops.pairwise_dense if pairs else ops.bilinear_dense
    exact = _by_outputs(einsum, case, lambda part: weight[part].double(), bias)
    dense = (*inputs, *held.dense)
    found = {name: Contestant("dense", call, dense, exact, einsum, dense, dense_flops) for name, call in calls.items()}
    per_row = count if not pairs else rows * case.pairs
    cp_flops = 2.0 * rank * (per_row * (case.in1 + case.in2) + count * case.out)
    tucker_flops = 2.0 * (per_row * (case.in1 * r_in1 + case.in2 * r_in2) + count * case.out * r_out)
    tucker_flops += 2.0 * r_out * r_in2 * (per_row * r_in1 + count if pairs else count * r_in1)
    cp, tucker = (*inputs, *held.cp), (*inputs, *held.tucker)
    cp_reference, tucker_reference = (_cp_pairs, _tucker_pairs) if pairs else (_cp, _tucker)
    exact_cp, exact_tucker = _widened(cp_reference, cp), _widened(tucker_reference, tucker)
    cp_call, tucker_call = (ops.pairwise_cp, ops.pairwise_tucker) if pairs else (ops.bilinear_cp, ops.bilinear_tucker)
    found["CP"] = Contestant("CP", cp_call, cp, exact_cp, cp_reference, cp, cp_flops)
    found["Tucker"] = Contestant("Tucker", tucker_call, tucker, exact_tucker, tucker_reference, tucker, tucker_flops)
    cp_chain, tucker_chain = (_cp_pairs_chain, _tucker_pairs_chain) if pairs else (_cp_chain, _tucker_chain)
    if count * rank <= _CHAIN_MOST:
        found["CP composed"] = replace(found["CP"], call=cp_chain)
    found["Tucker composed"] = replace(found["Tucker"], call=tucker_chain)

    def int8(x1: Tensor, x2: Tensor, bias: Tensor) -> Tensor:
        return calls["dense"](x1, x2, held.int8, bias)

    exact_int8 = _by_outputs(einsum, case, lambda part: held.int8.decode(torch.float64, part), bias)
    assert held.int8.scale is not None
    read = (*inputs, held.int8.qdata, held.int8.scale, bias)
    found["dense int8"] = Contestant(
        "dense", int8, (*inputs, bias), exact_int8, einsum, read, dense_flops, trains=False
    )
    first, second, last, sigma = held.cp_int8

    def cp_int8(x1: Tensor, x2: Tensor, bias: Tensor) -> Tensor:
        return cp_call(x1, x2, first, second, last, bias, sigma=sigma)

    wide = [each.decode(torch.float64) for each in (first, second, last)]
    exact_cp_int8 = _widened(cp_reference, (*inputs, wide[0] * sigma.double()[:, None], *wide[1:], bias))
    stored = (*inputs, first.qdata, second.qdata, last.qdata, sigma, bias)
    found["CP int8"] = replace(
        found["CP"], call=cp_int8, tensors=(*inputs, bias), exact=exact_cp_int8, stored=stored, trains=False
    )
    for name in ("dense int8", "CP int8") if dtype == torch.float32 else ():
        narrow = partial(_in_bfloat16, found[name].call)
        found[f"{name}, bfloat16"] = replace(found[name], call=narrow, computed_in=torch.bfloat16)
    for name in ("dense", "CP", "Tucker"):
        found[name] = replace(found[name], ours=True)
    if device.type == "cuda":
        _on_gpu(found, pairs)
    return found


def _by_outputs(
    reference: Callable[..., Tensor], case: Case, weight: Callable[[slice], Tensor], bias: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """The dense definition in slices of the outputs, for a large weight in float64 is not to be held whole."""
    step = max(1, _SLICE // (case.in1 * case.in2))
    parts = [slice(start, min(start + step, case.out)) for start in range(0, case.out, step)]
    return lambda x1, x2: torch.cat([reference(x1, x2, weight(part), bias[part].double()) for part in parts], dim=-1)


def _widened(reference: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x1, x2: reference(x1, x2, *(tensor.double() for tensor in tensors[2:]))


def _on_gpu(found: dict[str, Contestant], pairs: bool) -> None:
    """What only a GPU has: both paths where there is a kernel, compiled calls, and a plain kernel."""
    for name in () if pairs else ("dense", "CP"):
        base = found[name]
        if name == "dense" and base.tensors[0].dtype == torch.float16:
            continue  # for which the dense kernel is refused
        for backend in ("triton", "composed"):

            def call(*tensors: Tensor, base: Contestant = base, backend: str = backend) -> Tensor:
                return base.call(*tensors, backend=backend)

            found[f"{name}, {backend}"] = replace(base, call=call)
    torch.compiler.reset()  # of earlier cases: past 8 sizes of a function torch would run it uncompiled
    for name in ("einsum", "CP composed", "Tucker composed"):
        if name in found:
            compiled = torch.compile(found[name].call, dynamic=False)
            found[f"{name}, compiled"] = replace(found[name], call=compiled, trains=False, compiled=True)
    if not pairs:
        from benchmarks.plain_triton import plain_dense

        found["plain Triton"] = replace(found["dense"], call=plain_dense, trains=False)


def _in_bfloat16(call: Callable[..., Tensor], x1: Tensor, x2: Tensor, bias: Tensor) -> Tensor:
    """What a layer's `set_compute("bfloat16")` does."""
    return call(x1.bfloat16(), x2.bfloat16(), bias).to(x1.dtype)


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


def _cp_pairs_chain(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    left, right = functional.linear(x1, in1), functional.linear(x2, in2)
    return functional.linear(left.unsqueeze(-2) * right.unsqueeze(-3), out, bias)


def _tucker_pairs_chain(
    x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, core: Tensor, out: Tensor, bias: Tensor
) -> Tensor:
    left, right = functional.linear(x1, in1), functional.linear(x2, in2)
    turned = torch.einsum("bki,oij->bkoj", left, core)
    return functional.linear(torch.einsum("bkoj,blj->bklo", turned, right), out, bias)


def _cp(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    return ops.reference.bilinear_cp(x1, x2, (out, in1.mT, in2.mT), bias)


def _cp_pairs(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    return ops.reference.pairwise_cp(x1, x2, (out, in1.mT, in2.mT), bias)


def _tucker(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, core: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    return ops.reference.bilinear_tucker(x1, x2, core, (out, in1.mT, in2.mT), bias)


def _tucker_pairs(x1: Tensor, x2: Tensor, in1: Tensor, in2: Tensor, core: Tensor, out: Tensor, bias: Tensor) -> Tensor:
    return ops.reference.pairwise_tucker(x1, x2, core, (out, in1.mT, in2.mT), bias)
