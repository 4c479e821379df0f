"""Compress the `nn.Bilinear` layers of trained networks, and report what that did."""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import decomposition, ops
    from .config import AutoConfig, CPConfig, DenseConfig, MaxError, MaxSize, TuckerConfig
    from .errors import AmplificationWarning, CompressionError
    from .files import PretrainedMixin, load, save
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
    "PretrainedMixin",
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

_ROOMS = ("errors", "config", "report", "files", "modules", "planning")
"""Where public names are, each looked up when it is first asked for: PyTorch takes a second to load, in which the
command line has to be able to answer Ctrl-C."""


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and find_spec(f".{name}", __name__) is not None:
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        rooms = (importlib.import_module(f".{room}", __name__) for room in _ROOMS)
        globals()[name] = found = next(getattr(room, name) for room in rooms if hasattr(room, name))
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
