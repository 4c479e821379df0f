import json

import pytest

import compress_bilinear as cb
from compress_bilinear.cli import _compress
from compress_bilinear.config import AutoConfig
from compress_bilinear.config import _recipe as config_text

CONFIGS = {
    "rel.*": cb.CPConfig(rank=64, quantize="int8", seed=3),
    "a b": cb.CPConfig(rank=cb.MaxError(0.05)),
    "head": cb.TuckerConfig(rank=(16, 32, 32)),
    "*": cb.TuckerConfig(rank=cb.MaxSize(0.25), quantize="nf4"),
    "dense": cb.DenseConfig(quantize="int8"),
}
OPTIONS = {"include": ["rel.*", "head"], "batch_size": 64, "force": True, "max_seconds": 1.5}

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
    with pytest.raises(cb.CompressionError, match="ranks are always chosen by stored bytes"):
        config_text.parse_recipe({"layers": {"*": table | {"cost": "flops"}}})


def test_the_automatic_choice_reads_back_too():
    data = json.loads(json.dumps(config_text.plain(AUTO, {})))
    assert config_text.parse_recipe(data).configs == AUTO
    assert data["layers"]["c"] == {"method": "auto", "max_error": 0.1, "on": "output"}
    assert config_text.parse_recipe({"layers": {"*": {"method": "auto", "max_size": 0.5}}}).configs["*"].fraction == 0.5
    for entry, problem in (
        ({"rank": 3}, "takes one of max_error, max_size. Found none"),
        ({"max_size": 0.5, "on": "output"}, "layers.a.on: unknown"),
        ({"max_error": 0.5, "on": "both"}, "layers.a.on: `on` of a MaxError should be 'weight' or 'output'"),
        ({"max_error": 7}, "layers.a.max_error: `MaxError`.s error should be a number above 0"),
        ({"max_error": 0.5, "prefer": "both"}, "layers.a.prefer: `prefer` should be 'size' or 'speed'"),
    ):
        with pytest.raises(cb.CompressionError, match=problem):
            config_text.parse_recipe({"layers": {"a": {"method": "auto", **entry}}})


def test_the_command_line_asks_for_the_automatic_choice():
    found = _compress._config("auto", None, 0.1, None, None, "speed", 2)
    assert found == AUTO["a"]
    for asked in (("auto", "3", None, None, None), ("auto", None, 0.1, 0.2, None), ("auto", None, 0.1, None, "int8")):
        with pytest.raises(cb.CompressionError, match="--method auto takes one of --max-error and --max-size alone"):
            _compress._config(*asked, "size", 0)
    with pytest.raises(cb.CompressionError, match="--prefer is for --method auto"):
        _compress._config("cp", "3", None, None, None, "speed", 0)


def test_what_is_at_its_default_is_left_out():
    options = {"include": ("*",), "exclude": (), "batch_size": None, "measure_latency": True, "force": False}
    assert config_text.asked({"*": cb.CPConfig(rank=2)}, options) == {"layers": {"*": {"method": "cp", "rank": 2}}}


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
        (3, "the file: should be a table. Found 3"),
        ({}, "layers: should be a table. Found none"),
        ({"layers": {"a": {"method": "dense"}}, "include": [1]}, "include: should hold strings. Found [1]"),
        ({"layers": {}}, "layers: should have at least one table"),
        ({"layers": {"rel.*": 3}}, 'layers."rel.*": should be a table. Found 3'),
        ({"layers": {"rel.*": {}}}, 'layers."rel.*".method: should be one of cp, tucker, dense, auto'),
        ({"layers": {"a": {"method": "svd"}}}, "layers.a.method: should be one of cp, tucker, dense, auto"),
        ({"layers": {"a": {"method": "cp"}}}, "layers.a: cp takes one of rank, max_error, max_size. Found none"),
        (
            {"layers": {"a": {"method": "cp", "rank": 2, "max_size": 0.5}}},
            "layers.a: cp takes one of rank, max_error, max_size. Found rank, max_size",
        ),
        ({"layers": {"a": {"method": "cp", "rank": [1, 2, 3]}}}, "layers.a.rank: `rank` of a CPConfig"),
        ({"layers": {"a": {"method": "tucker", "rank": [0, 2, 3]}}}, "layers.a.rank: `rank[0]` of a TuckerConfig"),
        ({"layers": {"a": {"method": "cp", "max_error": 3}}}, "layers.a.max_error: `MaxError`'s error should be"),
        ({"layers": {"a": {"method": "cp", "rank": 3, "seed": "x"}}}, "layers.a.seed: `seed` should be an int"),
        ({"layers": {"a": {"method": "dense", "quantize": "int7"}}}, "layers.a.quantize: `quantize` should be None"),
        ({"layers": {"a": {"method": "dense", "rank": 3}}}, "layers.a.rank: unknown. dense takes method, quantize"),
        ({"layers": {"a": {"method": "dense"}}, "speed": 1}, "speed: unknown. A file takes layers, include"),
        ({"layers": {"a": {"methd": "cp", "rank": 2}}}, "layers.a.methd: unknown. Did you mean method?"),
        ({"layers": {"a": {"method": "cp", "max_eror": 0.1}}}, "layers.a.max_eror: unknown. Did you mean max_error?"),
        ({"layers": {"a": {"method": "cp", "rnak": 2}}}, "layers.a.rnak: unknown. Did you mean rank?"),
        (
            {"layers": {"a": {"method": "tuker"}}},
            "layers.a.method: should be one of cp, tucker, dense, auto. Found 'tuker'.",
        ),
        ({"layer": {"a": {"method": "dense"}}}, "layer: unknown. Did you mean layers?"),
        ({"layers": {}, "max_second": 3}, "max_second: unknown. Did you mean max_seconds?"),
        ({"layers": {"a": {"method": "dense"}}, "force": 1}, "force: should be of type bool. Found 1"),
        ({"layers": {"a": {"method": "dense"}}, "batch_size": True}, "batch_size: should be of type int. Found True"),
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
        ("a.json", b"\xff", "should be a file of text to read"),
        ("a.json", b"[" * 100_000, "should be valid JSON. Found"),
        ("a.json", b"9" * 5000, "should be valid JSON. Found"),
        ("a.yaml", b"", "should end in .toml or .json. Found"),
        ("none.toml", None, "should be a file of text to read"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(cb.CompressionError, match=problem):
        config_text.read_recipe(tmp_path / name)
