import json

import pytest

import compress_bilinear as cb
from compress_bilinear.config import AutoConfig
from compress_bilinear.config import _recipe as config_text

CONFIGS = {
    "rel.*": cb.CPConfig(rank=64, quantize="int8", seed=3),
    "a b": cb.CPConfig(rank=cb.MaxError(0.05)),
    "head": cb.TuckerConfig(rank=(16, 32, 32)),
    "*": cb.TuckerConfig(rank=cb.MaxSize(0.25), quantize="nf4"),
    "dense": cb.DenseConfig(quantize="int8"),
}
OPTIONS = {"batch_size": 64, "force": True, "max_seconds": 1.5}

TOML = """
max_seconds = 60
[layers."rel.*"]
method = "cp"
rank = 64
quantize = "int8"
[layers."*"]
method = "tucker"
rank = [16, 32, 32]
"""


def test_plain_data_reads_back_as_the_same_configs():
    data = json.loads(json.dumps(config_text.plain(CONFIGS, OPTIONS)))
    found = config_text.parse_recipe(data)
    assert (found.configs, found.options) == (CONFIGS, OPTIONS)
    assert list(found.configs) == list(CONFIGS)  # the first match holds


AUTO = {
    "a": AutoConfig(error=0.1, prefer="speed", seed=2),
    "b": AutoConfig(error=cb.MaxError(0.1)),
    "c": AutoConfig(error=cb.MaxError(0.1, on="output")),
    "*": AutoConfig(size=0.25),
    "d": cb.CPConfig(rank=cb.MaxError(0.1, on="output"), fit="weight"),
}


def test_an_older_file_may_name_the_cost_that_always_holds_now():
    table = {"method": "tucker", "max_error": 0.1}
    old = config_text.parse_recipe({"layers": {"*": table | {"cost": "bytes"}}})
    assert old == config_text.parse_recipe({"layers": {"*": table}})
    with pytest.raises(cb.CompressionError, match=r"layers.*cost: Input should be 'bytes'"):
        config_text.parse_recipe({"layers": {"*": table | {"cost": "flops"}}})


def test_the_automatic_choice_reads_back_too():
    data = json.loads(json.dumps(config_text.plain(AUTO, {})))
    assert config_text.parse_recipe(data).configs == AUTO
    assert data["layers"]["c"] == {"method": "auto", "max_error": 0.1, "on": "output"}
    assert config_text.parse_recipe({"layers": {"*": {"method": "auto", "max_size": 0.5}}}).configs["*"].fraction == 0.5
    for entry, problem in (
        ({"rank": 3}, "layers.a.rank: unknown here"),
        ({"max_size": 0.5, "on": "output"}, "layers.a: `on` says what max_error counts on"),
        ({"max_error": 0.5, "on": "both"}, "layers.a.on: Input should be 'weight' or 'output'. Found 'both'"),
        (
            {"max_error": 7},
            "layers.a: `error` of an AutoConfig, where it is not a MaxError, should be",
        ),
        ({"max_error": 0.5, "prefer": "both"}, "layers.a.prefer: Input should be 'size' or 'speed'"),
    ):
        with pytest.raises(cb.CompressionError, match=problem):
            config_text.parse_recipe({"layers": {"a": {"method": "auto", **entry}}})


def test_include_and_exclude_of_older_files_become_globs():
    layers = {"*": {"method": "cp", "rank": 2}}
    found = config_text.parse_recipe({"layers": layers, "include": ["a.*", "b"], "exclude": "a.c"}).configs
    assert list(found.items()) == [("a.c", None), ("a.*", cb.CPConfig(rank=2)), ("b", cb.CPConfig(rank=2))]
    assert config_text.parse_recipe({"layers": layers, "include": "*"}).configs == {"*": cb.CPConfig(rank=2)}


def test_what_is_to_be_left_alone_reads_back():
    configs = {"a": None, "*": cb.DenseConfig()}
    assert config_text.plain(configs, {})["layers"]["a"] == {"method": "keep"}
    assert config_text.parse_recipe(config_text.plain(configs, {})).configs == configs


def test_toml_and_json_say_the_same(tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    found = config_text.read_recipe(tmp_path / "a.toml")
    assert found.configs == {"rel.*": cb.CPConfig(rank=64, quantize="int8"), "*": cb.TuckerConfig(rank=(16, 32, 32))}
    assert found.options == {"max_seconds": 60}
    (tmp_path / "a.json").write_text(json.dumps(config_text.plain(found.configs, found.options)))
    assert config_text.read_recipe(tmp_path / "a.json") == found


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (3, "Input should be an object. Found 3"),
        ({}, "layers: is required"),
        ({"layers": {"a": {"method": "dense"}}, "include": [1]}, "include[0]: Input should be a valid string. Found 1"),
        ({"layers": {}}, "layers: should have at least one table"),
        ({"layers": {"rel.*": 3}}, 'layers."rel.*": Input should be an object. Found 3'),
        ({"layers": {"rel.*": {}}}, 'layers."rel.*".method: is required. Found only an empty table'),
        ({"layers": {"a": {"method": "svd"}}}, "layers.a.method: should be one of 'cp', 'tucker', 'dense', 'auto', 'k"),
        ({"layers": {"a": {"method": "cp"}}}, "layers.a: cp takes one of rank, max_error, max_size. Found none"),
        (
            {"layers": {"a": {"method": "cp", "rank": 2, "max_size": 0.5}}},
            "layers.a: cp takes one of rank, max_error, max_size. Found rank, max_size",
        ),
        ({"layers": {"a": {"method": "cp", "rank": [1, 2, 3]}}}, "layers.a.rank: Input should be a valid integer."),
        ({"layers": {"a": {"method": "tucker", "rank": [0, 2, 3]}}}, "layers.a: `rank[0]` of a TuckerConfig"),
        ({"layers": {"a": {"method": "tucker", "rank": [1, 2.5, 3]}}}, "layers.a.rank[1]: Input should be a valid int"),
        ({"layers": {"a": {"method": "cp", "max_error": 3}}}, "layers.a: `MaxError`'s error should be"),
        ({"layers": {"a": {"method": "cp", "rank": 3, "seed": "x"}}}, "layers.a.seed: Input should be a valid integer"),
        (
            {"layers": {"a": {"method": "dense", "quantize": "int7"}}},
            "layers.a.quantize: Input should be 'bf16'",
        ),
        ({"layers": {"a": {"method": "dense", "rank": 3}}}, "layers.a.rank: unknown here"),
        ({"layers": {"a": {"method": "dense"}}, "speed": 1}, "speed: unknown."),
        ({"layers": {"a": {"methd": "cp", "rank": 2}}}, "layers.a.method: is required. Found only methd, rank"),
        ({"layers": {"a": {"method": "cp", "max_eror": 0.1}}}, "layers.a.max_eror: unknown. Did you mean max_error?"),
        ({"layers": {"a": {"method": "cp", "rnak": 2}}}, "layers.a.rnak: unknown. Did you mean rank?"),
        ({"layer": {"a": {"method": "dense"}}}, "layer: unknown. Did you mean layers?"),
        ({"layers": {}, "max_second": 3}, "max_second: unknown. Did you mean max_seconds?"),
        ({"layers": {"a": {"method": "dense"}}, "force": 1}, "force: Input should be a valid boolean. Found 1"),
        ({"layers": {"a": {"method": "dense"}}, "batch_size": True}, "batch_size: Input should be a valid integer."),
        (
            {"layers": {"a": {"method": "dense"}, "b": {"method": "keep"}}, "include": "a"},
            "include: should become globs under layers",
        ),
    ],
)
def test_a_mistake_is_told_with_its_path_in_the_file(tmp_path, data, problem):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(data))
    with pytest.raises(cb.CompressionError) as raised:
        config_text.read_recipe(path)
    assert str(raised.value).startswith(f"{path}: {problem}")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.toml", b"[layers", "should be valid TOML. Found"),
        ("a.json", b"{", "should be valid JSON. Found"),
        ("a.json", b"\xff", "should be valid JSON. Found"),
        ("a.json", b"[" * 100_000, "should be valid JSON. Found"),
        ("a.json", b"9" * 5000, "should be valid JSON. Found"),
        ("a.yaml", b"", "should end in .toml or .json. Found"),
        ("none.toml", None, "should be valid TOML. Found: .*No such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(cb.CompressionError, match=problem):
        config_text.read_recipe(tmp_path / name)
