import io
import sys
from functools import partial

import pytest
import torch
from rich.console import Console

import compress_bilinear as cb
from compress_bilinear.cli import _demo as demo
from compress_bilinear.fitting import Latency, Timing
from compress_bilinear.planning import _verdict as selection

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The rows, the report and the folder of a demo with a small network and little training."""
    folder = tmp_path_factory.mktemp("demo") / "networks"
    latencies = Latency(2, 1, 3), Latency(4, 3, 5), Latency(1, 1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "TwoViews", partial(demo.TwoViews, width=14))
        patch.setattr(demo, "train", partial(demo.train, epochs=8))
        patch.setattr(
            selection, "time_replacement", lambda layer, module, rows, seconds: Timing(*latencies, "outer", rows)
        )
        rows, report = demo.run(folder)
    return rows, report, folder


def test_there_is_a_row_for_the_original_and_one_for_each_way(ran):
    rows, _, _ = ran
    assert [row.name for row in rows] == ["nn.Bilinear", *demo.CONFIGS]
    assert [row.layer.decision for row in rows] == ["kept"] + ["replaced"] * 5
    assert (rows[0].layer.weight_error, rows[0].layer.bytes_after) == (0, rows[1].layer.bytes_before)


def test_the_network_has_learnt_something_and_int8_forgets_none_of_it(ran):
    accuracy = {row.name: row.accuracy for row in ran[0]}
    assert accuracy["nn.Bilinear"] > 0.8
    assert abs(accuracy["int8"] - accuracy["nn.Bilinear"]) <= 0.01


def test_targets_are_met_and_errors_measured(ran):
    for row in ran[0][1:]:
        config, layer = demo.CONFIGS[row.name], row.layer
        if not isinstance(config, cb.DenseConfig):
            assert layer.bytes_after <= config.rank.fraction * layer.bytes_before
        assert 0 < layer.weight_error < 1
        assert 0 < layer.output_error < 1
        assert 0.2 < layer.calibration_rows / 1257 < 0.3  # those of whole batches that no fit has seen


def test_the_networks_are_kept_where_asked(ran):
    folder = ran[2]
    names = ["cp", "cp_int8", "tucker", "tucker_int8", "int8"]
    assert {path.name for path in folder.iterdir()} == {f"{name}.safetensors" for name in names}
    loaded = cb.load(folder / "tucker.safetensors", demo.TwoViews(width=14))
    assert isinstance(loaded.fusion, cb.TuckerBilinear)


def test_a_network_that_reloads_to_another_is_an_error(monkeypatch):
    data = demo.load_digits()
    same = demo.TwoViews(width=2)
    demo._verify(same, same, data, "a file")
    with pytest.raises(cb.CompressionError, match="'a file' should reload to the network that was saved"):
        demo._verify(same, demo.TwoViews(width=2), data, "a file")


def test_the_table_shows_every_row(ran):
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(demo.table(ran[0]))
    text = console.file.getvalue()
    for row in ran[0]:
        assert row.name in text
        assert f"{row.accuracy:.4f}" in text
    assert "0.50x (slower)" in text
    assert "exact" in text


def test_the_split_is_seeded_and_leaves_no_image_out():
    data, again, other = demo.load_digits(0), demo.load_digits(0), demo.load_digits(1)
    assert (len(data.train[2]), len(data.test[2])) == (1257, 540)
    assert torch.equal(data.test[0], again.test[0])
    assert not torch.equal(data.test[0], other.test[0])
    images = torch.cat([torch.cat(part[:2], 1) for part in (data.train, data.test)])
    others = torch.cat([torch.cat(part[:2], 1) for part in (other.train, other.test)])
    assert torch.equal(images.sum(1).sort().values, others.sum(1).sort().values)
    assert images.shape == (1797, 64)
    assert (float(images.min()), float(images.max())) == (-1, 1)
    batches = data.batches
    assert torch.equal(torch.cat([top for top, _ in batches]), data.train[0])


def test_training_is_seeded_and_leaves_the_random_state_alone():
    random, data = torch.get_rng_state(), demo.load_digits()
    few = demo.Digits(tuple(part[:64] for part in data.train), data.test)
    first, second, third = (demo.train(few, seed, epochs=1) for seed in (0, 0, 1))
    assert torch.equal(first.fusion.weight, second.fusion.weight)
    assert not torch.equal(first.fusion.weight, third.fusion.weight)
    assert not first.training
    assert torch.equal(torch.get_rng_state(), random)


def test_without_scikit_learn_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(cb.CompressionError, match=r"pip install 'compress-bilinear\[demo\]'"):
        demo.load_digits()
