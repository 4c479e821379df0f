"""What is asked: the configs, their targets, and recipes as text."""

from ._methods import (
    CONFIGS,
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
from ._options import (
    COMPUTE_CHOICES,
    COMPUTE_ERROR,
    ComputeAsked,
    Evaluate,
    PlanOptions,
    check_compute,
    check_compute_error,
    check_max_seconds,
    completed,
    not_default,
)
from ._recipe import Recipe, by_glob, parse_config, parse_recipe, plain, read_recipe
