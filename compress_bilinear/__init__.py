"""Compress the `nn.Bilinear` layers of trained networks, and report what that did."""

from . import decomposition, ops
from .adapters import register_adapter
from .checkpoint import load, save
from .config import AutoConfig, CPConfig, DenseConfig, MaxError, MaxSize, TuckerConfig
from .conversion import dequantize, quantize, set_compute
from .errors import AmplificationWarning, CompressionError
from .modules import CPBilinear, DenseBilinear, TuckerBilinear
from .report import LayerReport, Report
from .surgery import Plan, compress, plan

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
