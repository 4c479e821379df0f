"""Compress the `nn.Bilinear` layers of trained networks, and report what that did."""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import decomposition, ops
    from .config import AutoConfig, CPConfig, DenseConfig, MaxError, MaxSize, TuckerConfig
    from .errors import AmplificationWarning, CompressionError
    from .files import load, save
    from .modules import CPBilinear, DenseBilinear, TuckerBilinear, register_adapter
    from .planning import Plan, compress, dequantize, plan, quantize, set_compute
    from .report import LayerReport, Report

__all__ = [
    "AmplificationWarning",
    "AutoConfig",
    "CPBilinear",
    "CPConfig",
    "CompressionError",
    "DenseBilinear",
    "DenseConfig",
    "LayerReport",
    "MaxError",
    "MaxSize",
    "Plan",
    "Report",
    "TuckerBilinear",
    "TuckerConfig",
    "compress",
    "decomposition",
    "dequantize",
    "load",
    "ops",
    "plan",
    "quantize",
    "register_adapter",
    "save",
    "set_compute",
]

_HOMES = {
    "config": ("AutoConfig", "CPConfig", "DenseConfig", "MaxError", "MaxSize", "TuckerConfig"),
    "errors": ("AmplificationWarning", "CompressionError"),
    "files": ("load", "save"),
    "modules": ("CPBilinear", "DenseBilinear", "TuckerBilinear", "register_adapter"),
    "planning": ("Plan", "compress", "dequantize", "plan", "quantize", "set_compute"),
    "report": ("LayerReport", "Report"),
}
"""Which module each name is loaded from when it is first asked for: PyTorch takes a second, in which the command line
has to be able to answer Ctrl-C."""


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is not None:
        globals()[name] = found = getattr(importlib.import_module(f".{home}", __name__), name)
        return found
    if not name.startswith("_") and find_spec(f".{name}", __name__) is not None:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
