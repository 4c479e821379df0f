"""Latencies side by side: of a layer, its replacement, and the exact dense evaluations."""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..decomposition import row_slices
from ..modules import AdaptedModule, CompressedBilinear
from ._calibrate import LayerInputs

_BLOCK_SECONDS = 2e-3  # a timed block repeats a call until it lasts about this long
_ROUNDS = (3, 25)
_LONG = 0.02  # seconds of a call that needs no other one to warm up
_MOST_CALLS = 24  # of one length, in `time_replacement`, where they are long
_WHOLE_MOST = 2**25  # elements between the steps above which an unblocked dense order is not tried
_SLOW = 2.0  # a dense order that a first try finds this much slower than the best is not timed further


def timing_inputs(
    layer: CompressedBilinear | nn.Bilinear, rows: int, seen: LayerInputs | None = None, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs (rows, I) and (rows, J) of a timed call, the same each time, of the device and dtype of `like`.

    They are rows that the layer has seen, taken over and over where they are too few, or Gaussian ones. By default
    they are like the layer's weight.
    """
    if like is None:
        like = layer.weight if isinstance(layer.weight, Tensor) else next(layer.buffers())
    if seen is not None and len(seen.input1) > 0:
        index = torch.arange(rows, device=seen.input1.device) % len(seen.input1)
        first, second = (value[index] for value in (seen.input1, seen.input2))
    else:
        generator = torch.Generator().manual_seed(0)
        sizes = (layer.in1_features, layer.in2_features)
        first, second = (
            torch.randn(rows, size, generator=generator, dtype=torch.float32, device="cpu") for size in sizes
        )
    return first.to(like.device, like.dtype), second.to(like.device, like.dtype)


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one call: the median over interleaved blocks, and the quartiles."""

    median: float
    lower: float
    upper: float


def latencies(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float = 1.0
) -> dict[str, Latency]:
    """Time calls side by side: in every round each is timed once, so that drift of the machine meets all alike.

    Short ones are warmed up, before each block too. It takes about `seconds`; long calls still have three rounds.
    """
    single = {name: _first_try(call, device) for name, call in calls.items()}
    repeats = {name: max(1, round(_BLOCK_SECONDS / max(duration, 1e-7))) for name, duration in single.items()}
    round_seconds = sum(single[name] * (repeats[name] + 1) for name in calls)
    rounds = round(min(max(seconds / max(round_seconds, 1e-9), _ROUNDS[0]), _ROUNDS[1]))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if single[name] <= _LONG:
                _seconds(call, device)
            samples[name].append(_seconds(call, device, repeats[name]) * 1e3)
    quartiles = {name: statistics.quantiles(values, n=4, method="inclusive") for name, values in samples.items()}
    return {name: Latency(median, lower, upper) for name, (lower, median, upper) in quartiles.items()}


def _first_try(call: Callable[[], object], device: torch.device) -> float:
    """Seconds for one call; where it is short, after one to warm up."""
    first = _seconds(call, device)
    return first if first > _LONG else _seconds(call, device)


def _seconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds for one of so many calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def expected_seconds(layer: nn.Bilinear, rows: int) -> float:
    """What `time_replacement` takes at least, from a call of a part of the layer, which loops over its outputs."""
    part = layer.weight.detach()[next(row_slices(layer.weight.shape))]
    call = functools.partial(torch.nn.functional.bilinear, *timing_inputs(layer, rows), part)
    return _MOST_CALLS * layer.out_features / len(part) * _first_try(call, part.device)


def expected_error_seconds(layer: nn.Bilinear) -> float:
    """What measuring a replacement's weight error takes, about: as some calls of many rows do."""
    return expected_seconds(layer, 256) / 3


def dense_calls(layer: nn.Bilinear, input1: Tensor, input2: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The exact ways to evaluate a bilinear layer, `nn.Bilinear` apart, for inputs (N, I) and (N, J) of this size."""
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    out, in1, in2 = weight.shape
    count, operands = input1.shape[0], (input1, input2, weight, bias)
    calls: dict[str, Callable[[], Tensor]] = {
        order: functools.partial(ops.bilinear_dense, *operands, order=order) for order in ops.ORDERS
    }
    if count * out * in1 <= _WHOLE_MOST:
        calls["one_gemm"] = functools.partial(_one_gemm, *operands)
    if in1 * in2 > 2**16:
        del calls["outer"]  # hundreds of times slower: a block has too few rows
    calls["DenseBilinear"] = functools.partial(ops.bilinear_dense, *operands)  # its own way for few rows
    return calls


def _one_gemm(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The flattened form: one matrix product with in2, then a batched one with in1."""
    out, in1, _ = weight.shape
    partial = torch.nn.functional.linear(input2, weight.flatten(0, 1)).view(-1, out, in1)
    output = torch.bmm(partial, input1.unsqueeze(2)).squeeze(2)
    return output if bias is None else output + bias


@dataclass(frozen=True)
class Timing:
    """A layer before and after, and the fastest exact dense evaluation, for calls of `batch_size` rows."""

    before: Latency
    after: Latency
    dense: Latency
    dense_order: str
    batch_size: int

    @property
    def speedup(self) -> float:
        """Against `nn.Bilinear`, of the medians."""
        return self.before.median / self.after.median

    @property
    def speedup_vs_dense(self) -> float:
        """Against the fastest exact dense evaluation, `nn.Bilinear` included, of the medians."""
        return self.dense.median / self.after.median


def time_replacement(layer: nn.Bilinear, module: CompressedBilinear, batch_size: int, seconds: float = 1.0) -> Timing:
    """Time a layer, its replacement and the exact dense evaluations in one interleaved run, without gradients."""
    device = layer.weight.device
    input1, input2 = timing_inputs(layer, batch_size)
    with torch.no_grad():
        dense = dense_calls(layer, input1, input2)
        tries = {name: _first_try(call, device) for name, call in dense.items()}
        calls: dict[str, Callable[[], object]] = {
            "before": lambda: layer(input1, input2),
            "after": lambda: module(input1, input2),
        }
        least = min(tries.values())
        near = least * (_SLOW if least <= _LONG else 1.0)  # a first try of a long call tells which is best
        calls |= {name: call for name, call in dense.items() if tries[name] <= near}
        return _timing(latencies(calls, device, seconds), "nn.Bilinear", batch_size)


def _timing(measured: dict[str, Latency], form: str, rows: int) -> Timing:
    """Of "before", a layer of that form, "after", and exact evaluations by their names."""
    after = measured.pop("after")
    best = min(measured, key=lambda name: measured[name].median)
    return Timing(measured["before"], after, measured[best], form if best == "before" else best, rows)


def time_adapted(adapted: AdaptedModule, key: str, module: CompressedBilinear, seconds: float = 1.0) -> Timing:
    """Time a module of another form: its own method, its replacement's, and that around the exact weight.

    In the mode of the module, without gradients, on the first call that calibration saw, or on its adapter's example.
    """
    args, kwargs = adapted.arguments()
    modules = {"before": adapted.module, "after": adapted.replaced({key: module}), "DenseBilinear": adapted.replaced()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        rows = adapted.rows(key)
        methods = {name: getattr(made, adapted.adapter.method) for name, made in modules.items()}
        calls = {name: functools.partial(method, *args, **kwargs) for name, method in methods.items()}
        measured = latencies(calls, adapted.bilinear(key).weight.device, seconds)
    return _timing(measured, type(adapted.module).__name__, max(1, rows))
