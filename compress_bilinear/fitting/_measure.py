"""Errors in float64, bytes as stored, and latencies side by side."""

import functools
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from .. import ops
from ..decomposition import relative_error, row_slices
from ..errors import ConfigError
from ..modules import AdaptedLayer, CompressedBilinear, DenseBilinear
from ..quantization import QuantizedTensor
from ._calibrate import LayerInputs

_BLOCK_SECONDS = 2e-3  # a timed block repeats a call until it lasts about this long
_ROUNDS = (5, 25)
_ROWS = 512  # whose outputs are computed at once
_WHOLE_MOST = 2**25  # elements between the steps above which an unblocked dense order is not tried
_SLOW = 2.0  # a dense order that a first try finds this much slower than the best is not timed further


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; what is shared counts once, what is not initialised yet not at all."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(module))


def resident_bytes(module: nn.Module) -> int:
    """Bytes in memory: what is stored, and what the compute mode "resident" keeps de-quantized beside it."""
    kept = {id(part): part.resident for part in module.modules() if isinstance(part, QuantizedTensor)}
    return stored_bytes(module) + sum(r.numel() * r.element_size() for r in kept.values() if r is not None)


def parameter_count(module: nn.Module) -> int:
    """Stored values: parameters and quantized values, without scales and other buffers; what is shared counts once."""
    quantized = {id(part.qdata): part.shape for part in module.modules() if isinstance(part, QuantizedTensor)}
    return sum(p.numel() for p in module.parameters()) + sum(shape.numel() for shape in quantized.values())


def _tensors(module: nn.Module) -> list[Tensor]:
    unique = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return [tensor for tensor in unique.values() if not torch.nn.parameter.is_lazy(tensor)]


def weight_error(
    weight: Tensor,  # (O, I, J)
    module: CompressedBilinear,
) -> float:
    """‖W − Ŵ‖ / ‖W‖ (Frobenius), with Ŵ from what `module` stores; summed in float64, slice by slice."""
    with torch.no_grad():
        return relative_error(weight, lambda rows, values: values.sub_(module.dense_rows(rows, torch.float64)))


_HELD_OUT_FLOPS = 2e11  # of the exact outputs to measure against


class OutputError:
    """‖y − ŷ‖ / ‖y − b‖ over a layer's held-out rows: ŷ as a replacement computes it, y exactly, in float64.

    The bias is left out of the denominator, where it would flatter. The exact outputs are computed once; of a large
    layer, for fewer rows.

    Attributes:
        rows: how many rows that is.
    """

    def __init__(self, layer: nn.Bilinear, inputs: LayerInputs) -> None:
        weight = layer.weight.detach()
        most = max(1, int(_HELD_OUT_FLOPS / max(1, 2 * weight.numel())))
        self._bias = None if layer.bias is None else layer.bias.detach().double()
        self._dtype = weight.dtype  # calibration under autocast may have seen other inputs
        self._rows = [
            (first.to(weight.device), second.to(weight.device))
            for first, second in zip(*(value[:most].split(_ROWS) for value in inputs.held_out), strict=True)
        ]
        self.rows = sum(len(first) for first, _ in self._rows)
        parts: list[list[Tensor]] = [[] for _ in self._rows]
        with torch.no_grad():
            for outputs in row_slices(weight.shape):  # a large weight is not widened at once
                wide = weight[outputs].double()
                for part, (x, y) in zip(parts, self._rows, strict=True):
                    part.append(ops.bilinear_dense(x.double(), y.double(), wide))
        self._exact = [torch.cat(part, dim=-1) for part in parts]
        self._total = math.hypot(*map(_norm, self._exact))

    def of(self, module: CompressedBilinear) -> float | None:
        """None where y − b is zero on all rows: then they say nothing. NaN or infinite where ŷ is."""
        residual = 0.0
        device = self._rows[0][0].device.type if self._rows else "cpu"
        with torch.no_grad(), torch.autocast(device, enabled=False):  # as `_dtype`
            for (first, second), exact in zip(self._rows, self._exact, strict=True):
                found = module(first.to(self._dtype), second.to(self._dtype)).double()
                difference = _norm(exact - found if self._bias is None else exact + self._bias - found)
                residual = math.hypot(residual, difference) if math.isfinite(difference) else math.nan
        return None if self._total == 0 else residual / self._total


def output_error(layer: nn.Bilinear, module: CompressedBilinear, inputs: LayerInputs) -> float | None:
    """The `OutputError` of one replacement."""
    return OutputError(layer, inputs).of(module)


def _norm(tensor: Tensor) -> float:
    """The Frobenius norm, also of values whose squares leave float64's range."""
    peak = float(tensor.abs().max()) if tensor.numel() else 0.0
    return peak * float((tensor / peak).norm()) if 0 < peak < math.inf else peak


def task_metric(evaluate: Callable[[Any], float], model: nn.Module) -> float:
    """The caller's own metric of a model. Raises: ConfigError where it is no number."""
    found = evaluate(model)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"`evaluate` should return a number. Found {type(found).__name__}.") from error


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

    Blocks are timed by `torch.utils.benchmark.Timer` with torch's current thread number, on CUDA by events.

    Args:
        calls: what to time, by name; each is warmed up first.
        device: where they run.
        seconds: about how long to spend in all; slow calls still have five rounds.
    """
    single = {name: _first_try(call, device) for name, call in calls.items()}
    repeats = {name: max(1, round(_BLOCK_SECONDS / max(duration, 1e-7))) for name, duration in single.items()}
    round_seconds = sum(single[name] * (repeats[name] + 2) for name in calls)  # a Timer warms up with two calls
    rounds = round(min(max(seconds / max(round_seconds, 1e-9), _ROUNDS[0]), _ROUNDS[1]))
    timers = {name: _block_timer(call, device) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in calls:
            samples[name].append(timers[name](repeats[name]) * 1e3)
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Latency:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Latency(median, lower, upper)


def _first_try(call: Callable[[], object], device: torch.device) -> float:
    """Seconds for one call, after one to warm up."""
    call()
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _block_timer(call: Callable[[], object], device: torch.device) -> Callable[[int], float]:
    """A function from a number of repeats to seconds for one call."""
    if device.type != "cuda":
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return lambda repeats: timer.timeit(repeats).mean

    def timed(repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    return timed


def dense_calls(
    layer: nn.Bilinear,
    input1: Tensor,  # (N, I)
    input2: Tensor,  # (N, J)
) -> dict[str, Callable[[], Tensor]]:
    """The exact ways to evaluate a bilinear layer, `nn.Bilinear` apart, that are fit for this shape."""
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    out, in1, in2 = weight.shape
    count = input1.shape[0]

    def in_order(order: ops.Order) -> Callable[[], Tensor]:
        return lambda: ops.bilinear_dense(input1, input2, weight, bias, order=order)

    calls: dict[str, Callable[[], Tensor]] = {order: in_order(order) for order in ops.ORDERS}
    if count * out * in1 <= _WHOLE_MOST:
        calls["one_gemm"] = lambda: _one_gemm(input1, input2, weight, bias)
    if count * out * min(in1, in2) <= _WHOLE_MOST:
        calls["einsum"] = lambda: ops.reference.bilinear_dense(input1, input2, weight, bias)
    if in1 * in2 > 2**16:
        del calls["outer"]  # hundreds of times slower: a block has too few rows
    calls["DenseBilinear"] = lambda: ops.bilinear_dense(input1, input2, weight, bias)  # its own way for few rows
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
    device, dtype = layer.weight.device, layer.weight.dtype
    generator = torch.Generator().manual_seed(0)
    input1, input2 = (
        torch.randn(batch_size, size, generator=generator).to(device, dtype)
        for size in (layer.in1_features, layer.in2_features)
    )
    with torch.no_grad():
        dense = dense_calls(layer, input1, input2)
        tries = {name: _first_try(call, device) for name, call in dense.items()}
        quickest = min(tries.values())
        calls: dict[str, Callable[[], object]] = {
            "before": lambda: layer(input1, input2),
            "after": lambda: module(input1, input2),
        }
        calls |= {name: call for name, call in dense.items() if tries[name] <= _SLOW * quickest}
        measured = latencies(calls, device, seconds)
    exact = {name: latency for name, latency in measured.items() if name != "after"}
    best = min(exact, key=lambda name: exact[name].median)
    order = "nn.Bilinear" if best == "before" else best
    return Timing(measured["before"], measured["after"], exact[best], order, batch_size)


def time_adapted(adapted: AdaptedLayer, module: CompressedBilinear, seconds: float = 1.0) -> Timing:
    """Time a module of another form: its own forward, its replacement's, and that around the exact weight.

    In the mode of the module, without gradients, on the first call that calibration saw, or on its adapter's example.
    """
    args, kwargs = adapted.arguments()
    layer = adapted.bilinear()
    exact = DenseBilinear(layer.in1_features, layer.in2_features, layer.out_features, False, "meta")
    exact.weight, exact.bias = nn.Parameter(layer.weight.detach()), layer.bias  # the original's memory
    modules = {"before": adapted.module, "after": adapted.replaced(module), "exact": adapted.replaced(exact)}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        rows = adapted.rows()
        calls = {name: functools.partial(made, *args, **kwargs) for name, made in modules.items()}
        measured = latencies(calls, layer.weight.device, seconds)
    best = min("before", "exact", key=lambda name: measured[name].median)
    order = adapted.kind if best == "before" else "DenseBilinear"
    return Timing(measured["before"], measured["after"], measured[best], order, max(1, rows))


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """What the figures were measured on: device, dtype, threads and versions."""
    found: dict[str, str | int] = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    found["processor"] = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    found["threads"] = torch.get_num_threads()
    found["python"] = platform.python_version()
    for package in ("compress-bilinear", "torch", "numpy", "tensorly", "bitsandbytes"):
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            found[package.replace("-", "_")] = "not installed"
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
