"""What is asked: the configs, their targets, and recipes as text."""

from ._methods import (
    AutoConfig,
    Compute,
    Config,
    CPConfig,
    CPRank,
    DenseConfig,
    LayerConfig,
    MaxError,
    MaxSize,
    Quantize,
    TuckerConfig,
    TuckerRank,
    check_quantize,
    check_rank,
)
from ._recipe import METHODS, Recipe, asked, by_glob, parse_recipe, read_recipe

__all__ = [
    "METHODS",
    "AutoConfig",
    "CPConfig",
    "CPRank",
    "Compute",
    "Config",
    "DenseConfig",
    "LayerConfig",
    "MaxError",
    "MaxSize",
    "Quantize",
    "Recipe",
    "TuckerConfig",
    "TuckerRank",
    "asked",
    "by_glob",
    "check_quantize",
    "check_rank",
    "parse_recipe",
    "read_recipe",
]
