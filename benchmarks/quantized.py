"""The storage formats that are compared: ours, one scale for a whole tensor, torchao's and bitsandbytes' int8.

The libraries act on the composed linear layers of a CP or a Tucker layer, whose core stays in floating point: neither
quantizes a bilinear weight.
"""

import copy
import io
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from compress_bilinear.config import Compute, Quantize
from compress_bilinear.decomposition import CPDecomposition, TuckerDecomposition, rounded, tucker
from compress_bilinear.modules import CompressedBilinear, CPBilinear, DenseBilinear, QuantizedLinear, TuckerBilinear
from compress_bilinear.quantization import FORMATS, LEVELS, Buffer, Int8, Layout, QuantizedTensor

Source = Tensor | CPDecomposition | TuckerDecomposition
"""A dense weight (O, I, J) or a decomposition of one."""


def built(source: Source, quantize: Quantize | None = None) -> CompressedBilinear:
    """The layer of ours for a weight or a decomposition, without bias, its values rounded one by one."""
    if isinstance(source, Tensor):
        return DenseBilinear.from_weight(source, quantize=quantize)
    if isinstance(source, CPDecomposition):
        return CPBilinear.from_decomposition(source, quantize=quantize)
    return TuckerBilinear.from_decomposition(source, quantize=quantize)


def finished(source: Source, weight: Tensor, quantize: Quantize) -> CompressedBilinear:
    """The same with factors that are fitted to how others were rounded, as `compress` makes it."""
    if isinstance(source, CPDecomposition):
        return built(rounded(source, weight, quantize), quantize)
    return built(source if isinstance(source, Tensor) else rounded(source, weight, quantize), quantize)


def computing(layer: CompressedBilinear, compute: Compute) -> CompressedBilinear:
    """A copy of a quantized layer in another compute mode."""
    new = copy.deepcopy(layer)
    new.set_compute(compute)
    return new


def per_tensor(layer: CompressedBilinear) -> CompressedBilinear:
    """A copy of a floating layer in int8 with one scale for each tensor: what is simplest, and often done."""
    new = copy.deepcopy(layer)
    if isinstance(new, DenseBilinear):
        new = DenseBilinear.from_weight(new.to_dense().detach(), quantize="int8")
        new.weight = _one_scale(layer.to_dense().detach())
        return new
    for name, part in new.named_children():
        if isinstance(part, nn.Linear):
            setattr(new, name, QuantizedLinear(_one_scale(part.weight.detach())))
        elif isinstance(part, DenseBilinear):
            setattr(new, name, per_tensor(part))
    return new


class _PerTensor(Int8):
    """int8 with one scale for a whole tensor."""

    def buffers(self, shape: Sequence[Any], layout: Layout) -> tuple[Buffer, Buffer | None]:
        return Buffer(tuple(shape), torch.int8), Buffer((1,) * len(shape), torch.float32)

    def _encode(self, tensor: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        scale = (tensor.abs().max() / LEVELS).float()
        qdata = (tensor / scale.where(scale > 0, 1.0)).round().to(torch.int8)
        return qdata, scale.view([1] * tensor.dim())


def _one_scale(weight: Tensor) -> QuantizedTensor:
    return _PerTensor().encode(weight, "weight")


def torchao(layer: CompressedBilinear) -> CompressedBilinear:
    """A copy with torchao's int8 weight-only quantization of its linear layers. Raises: ImportError without torchao."""
    quantization = _quietly(lambda: import_module("torchao.quantization"))
    new = copy.deepcopy(layer)
    _quietly(lambda: quantization.quantize_(new, quantization.Int8WeightOnlyConfig()))
    return new


def linear8bit(layer: CompressedBilinear) -> CompressedBilinear:
    """A copy with bitsandbytes' `Linear8bitLt` in place of its linear layers."""
    modules: Any = _quietly(lambda: import_module("bitsandbytes.nn"))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # each call would say that it casts to float16
    new = copy.deepcopy(layer)
    for name, part in new.named_children():
        if isinstance(part, nn.Linear):
            made = modules.Linear8bitLt(part.in_features, part.out_features, False, has_fp16_weights=False)
            made.load_state_dict(part.state_dict())
            setattr(new, name, made.to("cpu").eval())
    return new


def held_bytes(layer: nn.Module) -> int:
    """What a layer stores: parameters and buffers, and within those of the libraries the tensors that they wrap."""
    total = 0
    for module in layer.modules():
        state = getattr(module, "state", None)  # where bitsandbytes puts its int8 matrix and scales
        if getattr(state, "CB", None) is not None:
            total += state.CB.nbytes + state.SCB.nbytes  # type: ignore[union-attr]
        elif isinstance(module, nn.Linear):
            total += sum(_wrapped_bytes(parameter) for parameter in module.parameters(recurse=False))
        else:
            total += sum(t.nbytes for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    return total


def _wrapped_bytes(tensor: Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.nbytes
    return sum(_wrapped_bytes(getattr(tensor, name)) for name in flatten()[0] if getattr(tensor, name) is not None)


def _quietly(call: Callable[[], Any]) -> Any:
    """Call without the warnings that these libraries print about CUDA kernels and deprecated decorators."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return call()


def output_error(found: Callable[[Tensor, Tensor], Tensor], exact: CompressedBilinear, rows: int = 64) -> float:
    """‖y − ŷ‖/‖y‖ on Gaussian rows, against the floating layer in float64: in expectation the weight's error."""
    generator = torch.Generator().manual_seed(1)
    sizes = (exact.in1_features, exact.in2_features)
    input1, input2 = (torch.randn(rows, size, generator=generator) for size in sizes)
    with torch.no_grad():
        wide = copy.deepcopy(exact).double()(input1.double(), input2.double())
        return float((found(input1, input2).double() - wide).norm() / wide.norm())


def gaussian(shape: tuple[int, int, int], rank: int | tuple[int, int, int] | None) -> Source:
    """A Gaussian weight, or a decomposition with Gaussian parts, whose entries have about unit variance."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    if rank is None:
        return normal(*shape)
    out, in1, in2 = shape
    if isinstance(rank, int):
        weights = torch.full((rank,), rank**-0.5)
        return CPDecomposition(weights, (normal(out, rank), normal(in1, rank), normal(in2, rank)))
    core = normal(*rank) / math.sqrt(math.prod(rank))
    return TuckerDecomposition(core, (normal(out, rank[0]), normal(in1, rank[1]), normal(in2, rank[2])))


def with_core(weight: Tensor, fraction: float, bits: int) -> tuple[TuckerDecomposition, int]:
    """The best Tucker within a fraction of the weight's float32 bytes, of int8 factors and a core of 8 or 16 bits.

    Of all ranks that no factor is interpolated at, the one with the least truncation error; then the factors are
    rounded, and the core is fitted to those and rounded.

    Returns: what is stored, and its bytes. Raises: RuntimeError where no rank is so small.
    """
    wide = weight.double() / weight.double().norm()
    turned, shape = wide, weight.shape
    for mode in range(3):
        unfolded = wide.movedim(mode, 0).flatten(1)
        basis = torch.linalg.eigh(unfolded @ unfolded.T)[1].flip(1)
        turned = torch.tensordot(basis.T, turned, dims=([1], [mode])).movedim(0, mode)
    kept = turned.square().cumsum(0).cumsum(1).cumsum(2)
    ranks = torch.meshgrid(*(torch.arange(1, size + 1) for size in shape), indexing="ij")
    out, in1, in2 = ranks
    size = FORMATS["int8" if bits == 8 else "bf16"].nbytes((out, in1, in2), "weight")
    fits = torch.ones_like(out, dtype=torch.bool)
    for rank, dimension in zip(ranks, shape, strict=True):
        size = size + dimension * rank * (rank != dimension)
        fits &= (4 * rank <= 3 * dimension) | (rank == dimension)
    fits &= size <= fraction * 4 * weight.numel()
    if not bool(fits.any()):
        raise RuntimeError(f"no rank takes {fraction:g} of the bytes")
    best = int(torch.where(fits, kept, -1.0).argmax())
    a, b, c = (int(rank.flatten()[best]) for rank in ranks)
    stored = rounded(tucker(weight, (a, b, c)), weight, "int8")
    if bits == 16:
        core = weight.double()
        for mode, factor in enumerate(stored.factors):
            core = torch.tensordot(torch.linalg.pinv(factor.double()), core, dims=([1], [mode])).movedim(0, mode)
        stored = TuckerDecomposition(core.bfloat16().float(), stored.factors)
    return stored, int(size.flatten()[best])
