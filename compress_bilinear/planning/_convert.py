"""Convert compressed layers between storage formats, and set their compute mode."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from ..config import COMPUTE_ERROR, ComputeAsked, Quantize, check_compute, check_compute_error, check_quantize
from ..errors import CompressionError, ConfigError, MatchError
from ..fitting import ComputeChoice, choose_compute, timing_inputs
from ..modules import CompressedBilinear, check_inplace, find_compressed, reason_against_hooks, stored_as, swap

_Model = TypeVar("_Model", bound=nn.Module)


def dequantize(model: _Model, *, dtype: torch.dtype | None = None, inplace: bool = False) -> _Model:
    """Store the quantized layers in floating point, as parameters that can be fine-tuned.

    They compute the same, up to rounding in `dtype`, and take inputs of that dtype only, as plain layers do.
    `cb.quantize(model)` is the way back.

    Args:
        model: any module; a compressed layer itself too.
        dtype: of the factors. None takes that of each layer's bias; without one, of the model's first floating
            parameter; without one, float32.
        inplace: False leaves the model as it is and returns a copy.

    Returns:
        The model, its quantized layers in floating point. New factors require gradients; a bias keeps its flag.

    Raises:
        MatchError: no layer is quantized; the message lists what there is.
        ConfigError: `dtype` is not floating.
        CompressionError: a layer has hooks or wrapped inner layers, which would be lost; or `inplace=True` where the
            model is itself the layer. The model is left exactly as it was.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"`dtype` should be a floating torch.dtype or None. Found {dtype!r}.")
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return _converted(model, None, lambda layer: dtype or _bias_dtype(layer, first), inplace)


def quantize(model: _Model, quantize: Quantize = "int8", *, inplace: bool = False) -> _Model:
    """Store compressed layers that are in floating point in fewer bits: the way back from `dequantize`.

    It rounds the values of each `CPBilinear`, `TuckerBilinear` and `DenseBilinear` to the nearest. `compress` is for an
    `nn.Bilinear`: it also refits factors after rounding, and measures what the rounding costs.

    Args:
        model: any module; a compressed layer itself too.
        quantize: the name of a storage format.
        inplace: False leaves the model as it is and returns a copy.

    Raises:
        MatchError: no compressed layer is in floating point; the message lists what there is.
        ConfigError: another `quantize`.
        CompressionError: as for `dequantize`; or factors are not finite.
    """
    check_quantize(quantize)
    if quantize is None:
        raise ConfigError("`quantize` should name a storage format. Found None: `dequantize` gives floating point.")
    return _converted(model, quantize, lambda layer: torch.float64, inplace)


def set_compute(
    model: nn.Module,
    compute: ComputeAsked = "fastest",
    *,
    rows: int = 64,
    dtype: torch.dtype | None = None,
    compute_error: float = COMPUTE_ERROR,
) -> dict[str, ComputeChoice]:
    """Choose how the quantized layers of a model compute, in place. Values do not change; `save` keeps the modes.

    Args:
        model: any module; a compressed layer itself too.
        compute: a mode for each layer that has it (see `CompressedBilinear.set_compute`); others compute on the fly.
            "fastest" times every mode of each layer side by side, without gradients, and leaves "on_the_fly" only for
            one that is faster beyond the spread: its upper quartile below the other's lower one.
        rows: of a timed call.
        dtype: of the inputs of a timed call. None takes that of each layer's bias; without one, float32.
        compute_error: how far the fastest mode may change the outputs: ‖y − ŷ‖/‖ŷ − b‖ against those on the fly.

    Returns:
        For each layer's name the chosen mode, with bytes and latencies.

    Raises:
        MatchError: no layer is quantized; the message lists what there is.
        ConfigError: another `compute`, no positive number of rows, a `compute_error` below 0, or a mode that none of
            the layers has.
    """
    check_compute(compute)
    check_compute_error(compute_error)
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ConfigError(f"`rows` should be a positive int. Found {rows!r}.")
    layers = _compressed(model, quantized=True)
    if compute != "fastest":
        refused = [layer.refused_compute(compute) for layer in layers.values()]
        if None not in refused:
            reasons = "; ".join(dict.fromkeys(filter(None, refused)))
            raise ConfigError(f"A layer should have the mode {compute!r}. Found none: {reasons}.")
    choices = {}
    for name, layer in layers.items():
        like = torch.empty(0, device=next(layer.buffers()).device, dtype=dtype or _bias_dtype(layer, torch.float32))
        inputs = timing_inputs(layer, rows, like=like)
        choices[name] = choose_compute(layer, compute, inputs, timed=False, most_change=compute_error)
    return choices


def _bias_dtype(layer: CompressedBilinear, default: torch.dtype) -> torch.dtype:
    return layer.bias.dtype if isinstance(layer.bias, torch.Tensor) else default


def _compressed(model: nn.Module, quantized: bool) -> dict[str, CompressedBilinear]:
    """The compressed layers by name that are quantized, or in floating point. Raises: MatchError where none is."""
    layers = find_compressed(model)
    chosen = {name: layer for name, layer in layers.items() if (layer.quantize is not None) == quantized}
    if not chosen:
        what = "that is quantized" if quantized else "in floating point"
        there = ", ".join(f"{name or '(root)'} ({layer.method}, {layer.quantize})" for name, layer in layers.items())
        raise MatchError(f"The model should contain a compressed layer {what}. Found {there or 'no compressed layer'}.")
    return chosen


@torch.inference_mode(False)  # so that the layers can be trained
def _converted(
    model: _Model, quantize: Quantize | None, dtype: Callable[[CompressedBilinear], torch.dtype], inplace: bool
) -> _Model:
    """The model, or a copy, with its layers in floating point stored as `quantize`; with None, the quantized ones."""
    layers = _compressed(model, quantized=quantize is None)
    check_inplace(model, layers if inplace else ())
    for name, layer in layers.items():
        reason = reason_against_hooks(layer)
        if reason is not None:
            raise CompressionError(f"Layer {name or '(root)'!r} cannot be stored otherwise: {reason}.")
    target = model if inplace else copy.deepcopy(model)
    found = find_compressed(target)
    new = {id(found[name]): stored_as(found[name], quantize, dtype(found[name])) for name in layers}
    if "" in layers:
        return new[id(target)]  # type: ignore[return-value]
    swap(target, new)
    return target
