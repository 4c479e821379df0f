from dataclasses import FrozenInstanceError

import pytest

from compress_bilinear import AutoConfig, CPConfig, DenseConfig, MaxError, MaxSize, TuckerConfig
from compress_bilinear.config import check_quantize, check_rank
from compress_bilinear.errors import ConfigError

VALID = (
    CPConfig(rank=3),
    CPConfig(rank=MaxError(0.1), quantize="int8", seed=7),
    TuckerConfig(rank=(1, 2, 3)),
    TuckerConfig(rank=MaxSize(0.5), quantize="int8"),
    DenseConfig(),
    DenseConfig(quantize="int8"),
)


@pytest.mark.parametrize("config", VALID, ids=repr)
def test_configs_are_frozen_and_compare_by_value(config):
    same = type(config)(**vars(config))
    assert same == config
    assert hash(same) == hash(config)
    with pytest.raises(FrozenInstanceError):
        config.quantize = None


@pytest.mark.parametrize("config_class", [CPConfig, TuckerConfig, DenseConfig])
def test_configs_take_keywords_only(config_class):
    with pytest.raises(TypeError, match="positional"):
        config_class(3)


@pytest.mark.parametrize("target", [MaxError, MaxSize])
@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), float("inf"), "0.1", None, True])
def test_targets_lie_strictly_between_0_and_1(target, value):
    with pytest.raises(ConfigError, match=f"{target.__name__}.*above 0 and below 1. Found {value!r}"):
        target(value)


@pytest.mark.parametrize("target", [MaxError(0.25), MaxSize(0.25)])
def test_targets_are_frozen(target):
    with pytest.raises(FrozenInstanceError):
        target.error = 0.5


@pytest.mark.parametrize("rank", [0, -1, 2.0, "3", None, True, (1, 2, 3)])
def test_a_cp_rank_is_a_positive_int_or_a_target(rank):
    with pytest.raises(ConfigError, match="positive int") as caught:
        CPConfig(rank=rank)
    assert str(caught.value).endswith(f"Found {rank!r}.")


def test_a_rank_beyond_all_sizes_is_an_error():
    with pytest.raises(ConfigError, match=r"below 2\*\*31"):
        CPConfig(rank=10**30)


@pytest.mark.parametrize("seed", ["x", 1.5, -1, 2**70, True])
def test_a_seed_is_a_natural_number_of_64_bits(seed):
    with pytest.raises(ConfigError, match="`seed` should be"):
        CPConfig(rank=2, seed=seed)


@pytest.mark.parametrize("rank", [5, None, (1, 2), (1, 2, 3, 4), "123"])
def test_a_tucker_rank_is_a_triple_or_a_target(rank):
    with pytest.raises(ConfigError, match="triple") as caught:
        TuckerConfig(rank=rank)
    assert str(caught.value).endswith(f"Found {rank!r}.")


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("value", [0, -2, 1.0, True, None])
def test_the_bad_axis_of_a_tucker_rank_is_named(axis, value):
    rank = [2, 2, 2]
    rank[axis] = value
    with pytest.raises(ConfigError, match=rf"`rank\[{axis}\]`.*positive int. Found {value!r}"):
        TuckerConfig(rank=tuple(rank))


def test_a_list_of_tucker_ranks_becomes_a_tuple():
    assert TuckerConfig(rank=[1, 2, 3]) == TuckerConfig(rank=(1, 2, 3))


@pytest.mark.parametrize("make", [lambda q: CPConfig(rank=1, quantize=q), lambda q: DenseConfig(quantize=q)])
@pytest.mark.parametrize("quantize", ["int4", "INT8", 8, True])
def test_another_storage_format_is_an_error_that_lists_what_there_is(make, quantize):
    with pytest.raises(ConfigError, match="one of None, 'bf16', 'int8', 'nf4'") as caught:
        make(quantize)
    assert repr(quantize) in str(caught.value)


def test_the_checks_accept_what_is_valid():
    check_quantize(None)
    check_quantize("int8")
    check_quantize("nf4")
    check_rank(1)


@pytest.mark.parametrize(
    "options",
    [{}, {"error": 0.1, "size": 0.1}, {"error": MaxError(0.1), "size": MaxSize(0.1)}, {"size": 0.1, "metric_drop": 1}],
)
def test_an_auto_config_has_one_target(options):
    with pytest.raises(ConfigError, match="one of `error`, `size` and `metric_drop`"):
        AutoConfig(**options)


@pytest.mark.parametrize("option", ["error", "size"])
@pytest.mark.parametrize("value", [0, 1, -1, "0.1", True, float("nan")])
def test_an_auto_configs_numbers_are_fractions(option, value):
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        AutoConfig(**{option: value})


def test_an_auto_configs_plain_error_is_of_the_outputs_where_there_are_rows():
    assert AutoConfig(error=0.1).limit(calibrated=True) == MaxError(0.1, on="output")
    assert AutoConfig(error=0.1).limit(calibrated=False) == MaxError(0.1)
    assert AutoConfig(error=MaxError(0.1)).limit(calibrated=True) == MaxError(0.1)
    assert AutoConfig(size=MaxSize(0.2)).fraction == AutoConfig(size=0.2).fraction == 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoConfig(size=0.1, prefer="accuracy"), "`prefer` should be one of 'size', 'speed'"),
        (lambda: CPConfig(rank=1, fit="outputs"), "`fit` should be one of 'output', 'weight'"),
        (lambda: MaxError(0.1, on="outputs"), "`on` of a MaxError"),
    ],
)
def test_other_words_are_errors(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
