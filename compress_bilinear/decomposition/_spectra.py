"""How fast the singular values of a weight's unfoldings fall: what no decomposition can change."""

import math
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from ._factors import peak
from ._source import Source, full_precision

_EVEN, _HEAD = 32, 16  # values kept of an unfolding: spread evenly, and denser where they fall fast
_LONGEST_MODE = 2048  # beyond which the eigenvalues take too long
_EXACT_FLOPS = 2e9  # of a Gram up to which float64 takes no time
_MOST_FLOPS = 3e10  # of a Gram, a second or less on two cores; a larger weight is sampled


class UnfoldingSpectrum(NamedTuple):
    """Some singular values of an unfolding over the weight's norm; `indices` count from 1, the largest first."""

    indices: tuple[int, ...]
    values: tuple[float, ...]
    sampled: bool


def spectra(
    weight: Tensor,  # (O, I, J)
    longest: int = _LONGEST_MODE,
    most_flops: float = _MOST_FLOPS,
) -> tuple[UnfoldingSpectrum, ...]:
    """The spectra of the three unfoldings, in the order of the axes; none for zero, NaN, or a mode above `longest`.

    Values below about 1e-4 of the largest are rounding of float32 where the weight is large. Above `most_flops`
    for its Gram, an unfolding is estimated from slices drawn at random.
    """
    largest = peak(weight.detach())
    if max(weight.shape) > longest or not 0 < largest < math.inf:
        return ()
    with torch.no_grad(), full_precision(weight.device):
        return tuple(_spectrum(weight.detach(), mode, most_flops) for mode in range(3))


def _spectrum(weight: Tensor, mode: int, most_flops: float) -> UnfoldingSpectrum:
    size, axis = weight.shape[mode], 1 if mode == 0 else 0
    flops = 2.0 * weight.numel() * size
    slices = weight.shape[axis]
    taken = min(slices, max(1, round(slices * most_flops / flops)))
    if taken < slices:
        drawn = torch.randperm(slices, generator=torch.Generator().manual_seed(0), device="cpu")[:taken].sort().values
        weight = weight.index_select(axis, drawn.to(weight.device))
    gram = Source(weight).gram(mode, torch.float64 if flops <= _EXACT_FLOPS else torch.float32)
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).double()
    values = (squares / squares.sum().clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    even, head = numpy.linspace(1, size, _EVEN), numpy.geomspace(1, size, _HEAD)
    indices = sorted({round(place) for place in (*even, *head)}) if size > _EVEN else [*range(1, size + 1)]
    kept = values.cpu()[[index - 1 for index in indices]].tolist()
    return UnfoldingSpectrum(tuple(indices), tuple(float(f"{value:.4g}") for value in kept), taken < slices)
