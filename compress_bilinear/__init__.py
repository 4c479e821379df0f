"""Compress the `nn.Bilinear` layers of trained networks, and report what that did."""

from . import decomposition, ops
from .checkpoint import load, save
from .config import CPConfig, DenseConfig, MaxError, MaxSize, TuckerConfig
from .modules import CPBilinear, DenseBilinear, TuckerBilinear
from .surgery import Plan, compress, plan
