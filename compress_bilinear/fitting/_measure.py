"""Errors in float64, bytes as stored, and what the figures were measured on."""

import math
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import ops
from ..decomposition import relative_errors, row_slices
from ..errors import ConfigError
from ..modules import CompressedBilinear
from ..quantization import QuantizedTensor
from ._calibrate import LayerInputs

_ROWS = 512  # whose outputs are computed at once
_HELD_OUT_FLOPS = 5e10  # of the exact outputs to measure against, a second's in float64


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; what is shared counts once, what is not initialised yet not at all."""
    unique = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()] if not is_lazy(tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def bias_bytes(layer: nn.Bilinear) -> int:
    """What a layer stores besides its weight: a replacement stores it as it is."""
    return stored_bytes(layer) - layer.weight.numel() * layer.weight.element_size()


def parameter_count(module: nn.Module) -> int:
    """Stored values: parameters and quantized values, without scales and other buffers; what is shared counts once."""
    quantized = {id(part.qdata): part.shape for part in module.modules() if isinstance(part, QuantizedTensor)}
    return sum(p.numel() for p in module.parameters()) + sum(shape.numel() for shape in quantized.values())


def weight_error(weight: Tensor, module: CompressedBilinear) -> float:  # weight (O, I, J)
    """‖W − Ŵ‖ / ‖W‖ (Frobenius), with Ŵ from what `module` stores; see `relative_errors`."""
    with torch.no_grad():
        return relative_errors(weight, module.dense_rows)[0]


class OutputError:
    """‖y − ŷ‖ / ‖y − b‖ over a layer's held-out rows: ŷ as a replacement computes it, y exactly, in float64.

    The bias is left out of the denominator, where it would flatter. The exact outputs are computed once; of a large
    layer, for fewer rows. `rows` is their number, and `groups` that of the independent groups among them.
    """

    def __init__(self, layer: nn.Bilinear, inputs: LayerInputs, rows: tuple[Tensor, Tensor] | None = None) -> None:
        """`rows`, (N, I) and (N, J), are measured on instead of the held-out ones; `groups` is of those in any case."""
        weight = layer.weight.detach()
        most = max(1, int(_HELD_OUT_FLOPS / max(1, 2 * weight.numel())))
        self._bias = 0.0 if layer.bias is None else layer.bias.detach().double()
        self._dtype = weight.dtype  # calibration under autocast may have seen other inputs
        self._rows = [
            (first.to(weight.device), second.to(weight.device))
            for first, second in zip(*(value[:most].split(_ROWS) for value in rows or inputs.held_out), strict=True)
        ]
        self.rows = sum(len(first) for first, _ in self._rows)
        self.groups = inputs.split.groups(most)
        parts: list[list[Tensor]] = [[] for _ in self._rows]
        with torch.no_grad():
            for outputs in row_slices(weight.shape):  # a large weight is not widened at once
                wide = weight[outputs].double()
                for part, (x, y) in zip(parts, self._rows, strict=True):
                    part.append(ops.bilinear_dense(x.double(), y.double(), wide))
        self._exact = [torch.cat(part, dim=-1) for part in parts]
        self._total = math.hypot(*(float(part.norm()) for part in self._exact))

    def of(self, module: Callable[[Tensor, Tensor], Tensor]) -> float | None:
        """The error of a replacement, or of any function of inputs: None where y − b is zero on all rows.

        It is NaN or infinite where ŷ is.
        """
        residual = 0.0
        device = self._rows[0][0].device.type if self._rows else "cpu"
        with torch.no_grad(), torch.autocast(device, enabled=False):  # as `_dtype`
            for (first, second), exact in zip(self._rows, self._exact, strict=True):
                found = module(first.to(self._dtype), second.to(self._dtype)).double()
                residual = math.hypot(residual, float((exact + self._bias - found).norm()))
        return residual / self._total if self._total else None


def task_metric(evaluate: Callable[[Any], float], model: nn.Module) -> float:
    """The caller's own metric of a model. Raises: ConfigError where it is no number."""
    found = evaluate(model)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"`evaluate` should return a number. Found {type(found).__name__}.") from error


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """What the figures were measured on: device, dtype, threads and versions."""
    found: dict[str, str | int] = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    found |= {"processor": processor, "threads": torch.get_num_threads(), "python": platform.python_version()}
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
