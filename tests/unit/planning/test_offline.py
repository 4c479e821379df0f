from functools import cache

import pytest
import torch
from support import bilinear, low_rank
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.errors import CheckpointError, MatchError
from compress_bilinear.files import written
from compress_bilinear.fitting import Latency, Timing
from compress_bilinear.planning import _verdict as selection
from compress_bilinear.planning import choose_weights, compare_files, compress_state, stored_weights

TUCKER = cb.TuckerConfig(rank=(2, 3, 14))  # of (7, 18, 17): the last is near its size
IN1, IN2, OUT = 18, 17, 7  # in2 is too long for a convolution's kernel


def weight(seed: int = 0, out: int = OUT) -> Tensor:
    return low_rank((out, IN1, IN2), 2, noise=0.1, seed=seed).float()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rel = bilinear(IN1, IN2, OUT)
        self.other = bilinear(IN1, IN2, OUT, bias=False, seed=1)
        self.head = nn.Linear(OUT, 3)
        nn.init.constant_(self.head.weight, 0.5)
        nn.init.constant_(self.head.bias, 0.25)
        with torch.no_grad():
            self.rel.weight.copy_(weight())
            self.other.weight.copy_(weight(1))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return self.head(self.rel(x1, x2) + self.other(x1, x2))


def names(found) -> list[str]:
    return [stored.names[0] for stored in found]


def compressed(state, patterns=("*",), config=TUCKER, **options):
    return compress_state(state, choose_weights(state, patterns), config, measure_latency=False, **options)


def same(state, expected) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


class TestStoredWeights:
    def test_they_are_the_three_dimensional_floating_weights(self):
        state = {
            "a.weight": torch.ones(4, 18, 17),
            "b.weight": torch.ones(4, 3),
            "c.weight": torch.ones(4, 3, 2, 2),
            "d.weight": torch.ones(4, 3, 2, dtype=torch.int64),
            "e.tensor": torch.ones(4, 3, 2),
            "f.reweight": torch.ones(4, 3, 2),
            "g.weight": torch.ones(4, 3, 2, dtype=torch.bfloat16),
            "h.weight": torch.ones(4, 3, 2),  # not an nn.Bilinear's: it would hold nothing but weight and bias
            "h.scale": torch.ones(4),
        }
        assert names(stored_weights(state)) == ["a", "g"]
        assert names(stored_weights({"weight": torch.ones(4, 3, 2), "bias": torch.ones(4)})) == [""]
        assert stored_weights({"weight": torch.ones(4, 3, 2), "other.bias": torch.ones(4)}) == []

    @pytest.mark.parametrize(
        ("bias", "fits"),
        [
            (torch.ones(4), True),
            (torch.ones(3), False),
            (torch.ones(4, 1), False),
            (torch.ones(4).double(), False),
            (None, True),
        ],
    )
    def test_a_bias_beside_it_has_to_fit(self, bias, fits):
        found = stored_weights({"a.weight": torch.ones(4, 18, 17)} | ({} if bias is None else {"a.bias": bias}))
        assert [(stored.layer.bias is None) == (bias is None) for stored in found] == ([True] if fits else [])

    def test_patterns_choose_weights(self):
        state = Net().state_dict() | {"conv.weight": torch.ones(4, 3, 2)}
        assert names(choose_weights(state, ["rel"])) == ["rel"]
        assert names(choose_weights(state, ["*o*"])) == ["other", "conv"]
        assert names(choose_weights(state, ["o*", "rel"])) == ["rel", "other"]

    @pytest.mark.parametrize("pattern", ["(root)", "*"])
    def test_a_whole_file_is_named_as_it_is_listed(self, pattern):
        assert names(choose_weights({"weight": weight()}, [pattern])) == [""]

    def test_an_only_weight_needs_no_pattern(self):
        assert names(choose_weights({"a.weight": weight()}, [])) == ["a"]

    @pytest.mark.parametrize(
        ("state", "listing"),
        [
            ({"a.weight": torch.ones(4, 8, 15)}, r"a \(4x8x15, conv1d\?\)"),
            ({"a.weight": weight(), "b.weight": weight()}, r"a \(7x18x17\), b \(7x18x17\)"),
        ],
    )
    def test_what_may_be_a_convolution_is_asked_for(self, state, listing):
        with pytest.raises(MatchError, match=f"--layers PATTERN is needed.*Found: {listing}"):
            choose_weights(state, [])

    def test_a_pattern_that_matches_nothing_lists_what_there_is(self):
        with pytest.raises(MatchError, match=r"'x\*' should match .* Found: rel \(7x18x17\), other"):
            choose_weights(Net().state_dict(), ["rel", "x*"])

    def test_without_weights_there_is_nothing_to_do(self):
        with pytest.raises(MatchError, match="Found none"):
            choose_weights({"a.weight": torch.ones(2, 2)}, ["*"])


def test_the_report_of_a_file_does_not_speak_of_force(tmp_path):
    model = Net()
    large, _ = cb.compress(model, {"rel": cb.CPConfig(rank=60)}, force=True, measure_latency=False)
    cb.save(large, tmp_path / "large.safetensors")
    torch.save(model.state_dict(), tmp_path / "net.pt")
    (layer,) = compare_files(tmp_path / "net.pt", tmp_path / "large.safetensors").layers
    assert layer.reason.startswith("it is not smaller")


class TestCompressing:
    @pytest.mark.parametrize("config", [TUCKER, cb.CPConfig(rank=2, quantize="int8"), cb.DenseConfig(quantize="int8")])
    def test_it_is_what_compressing_the_network_gives(self, tmp_path, config):
        model = Net()
        _, state, descriptions = compressed(model.state_dict(), config=config)
        with written(state, descriptions, tmp_path / "small.safetensors"):
            pass
        loaded = cb.load(tmp_path / "small.safetensors", Net())
        expected, report = cb.compress(model, config, measure_latency=False)
        assert same(loaded.state_dict(), expected.state_dict())
        assert same(state, expected.state_dict())
        assert compressed(model.state_dict(), config=config)[0].report.model_bytes_after == report.model_bytes_after

    def test_the_rest_of_the_state_is_passed_on_untouched(self):
        before = Net().state_dict()
        _, state, _ = compressed(before, ["rel"])
        for name in ("other.weight", "head.weight", "head.bias"):
            assert state[name] is before[name]
        assert "rel.weight" not in state

    def test_a_bare_layer_is_the_root(self, tmp_path):
        layer = Net().rel
        _, state, descriptions = compressed(layer.state_dict(), ["(root)"], {"(root)": TUCKER})
        with written(state, descriptions, tmp_path / "small.safetensors"):
            pass
        assert isinstance(cb.load(tmp_path / "small.safetensors", bilinear(IN1, IN2, OUT)), cb.TuckerBilinear)

    def test_a_layer_under_two_names_stays_shared(self, tmp_path):
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one = self.two = bilinear(IN1, IN2, OUT)

        planned, state, descriptions = compressed(Shared().state_dict(), ["two"], {"two": TUCKER})
        assert [layer.names for layer in descriptions] == [("one", "two")]
        assert (planned.report.layers[0].name, planned.report.layers[0].aliases) == ("one", ("two",))
        assert len(planned.report.layers) == 1
        with written(state, descriptions, tmp_path / "small.safetensors"):
            pass
        loaded = cb.load(tmp_path / "small.safetensors", Shared())
        assert loaded.one is loaded.two

    @pytest.mark.parametrize(
        "biases",
        [(torch.zeros(OUT), torch.ones(OUT)), (torch.zeros(OUT), None), (None, torch.ones(OUT))],
        ids=["two", "only the first", "only the second"],
    )
    def test_two_layers_on_one_weight_keep_their_own_biases(self, biases):
        shared = weight()
        state = {"one.weight": shared, "two.weight": shared}
        state |= {f"{name}.bias": bias for name, bias in zip(("one", "two"), biases, strict=True) if bias is not None}
        _, new, _ = compressed(state)
        for name, bias in zip(("one", "two"), biases, strict=True):
            found = new.get(f"{name}.bias", new.get(f"{name}.out_proj.bias"))
            assert (found is None) == (bias is None)
            assert bias is None or torch.equal(found, bias)

    def test_weights_that_start_at_one_address_are_not_taken_for_one(self):
        whole = weight(out=12)
        _, state, _ = compressed({"one.weight": whole, "two.weight": whole[:OUT]})
        sizes = [state.get(f"{name}.out_proj.weight", state.get(f"{name}.weight")).shape[0] for name in ("one", "two")]
        assert sizes == [12, OUT]

    @pytest.mark.parametrize(
        "chosen",
        [("a", "b.c"), ("",), ("a.float",), ("a..b",)],
        ids=["two", "root", "a method's name", "dots"],
    )
    def test_every_chosen_layer_is_told_of(self, chosen):
        state = {(f"{name}." if name else "") + "weight": weight() for name in chosen}
        planned, _, _ = compressed(state)
        assert sorted(layer.name for layer in planned.report.layers) == sorted(chosen)

    def test_layers_that_are_kept_stay_in_the_state(self):
        before = Net().state_dict()
        before["rel.weight"] = before["rel.weight"] * torch.nan
        planned, state, descriptions = compressed(before)
        assert planned.report.layers[0].decision == "kept"
        assert state["rel.weight"] is before["rel.weight"]
        assert [layer.names for layer in descriptions] == [("other",)]

    def test_bytes_are_those_of_the_whole_state(self):
        before = Net().state_dict()
        planned, state, _ = compressed(before)
        for found, tensors in ((planned.report.model_bytes_before, before), (planned.report.model_bytes_after, state)):
            assert found == sum(value.numel() * value.element_size() for value in tensors.values())

    def test_empty_weights_are_refused(self):
        with pytest.raises(MatchError, match="Found none"):
            compressed({"a.weight": torch.ones(4, 0, 17)})


@cache
def made() -> tuple[nn.Module, cb.Report]:
    """A compressed network and its report."""
    config = {"rel": TUCKER, "*": cb.CPConfig(rank=2, quantize="int8")}
    return cb.compress(Net(), config, measure_latency=False)


class TestComparing:
    @pytest.fixture
    def files(self, tmp_path, monkeypatch):
        """An original checkpoint and a compressed one, and timing that takes no time."""
        latencies = Latency(2, 1, 3), Latency(4, 3, 5), Latency(1, 1, 1)
        monkeypatch.setattr(
            selection, "time_replacement", lambda layer, module, rows, seconds: Timing(*latencies, "outer", rows)
        )
        torch.save(Net().state_dict(), tmp_path / "net.pt")
        model, report = made()
        cb.save(model, tmp_path / "small.safetensors")
        return tmp_path / "net.pt", tmp_path / "small.safetensors", report

    def test_the_figures_are_those_of_compressing(self, files):
        original, small, made = files
        report = compare_files(original, small, 32)
        assert (report.model_bytes_before, report.model_bytes_after) == (
            made.model_bytes_before,
            made.model_bytes_after,
        )
        for found, expected in zip(report.layers, made.layers, strict=True):
            for what in ("name", "method", "rank", "quantize", "shape", "bytes_before", "bytes_after", "flops_after"):
                assert getattr(found, what) == getattr(expected, what)
            assert found.weight_error == pytest.approx(expected.weight_error, rel=1e-9)
            assert (found.speedup, found.speedup_vs_dense, found.batch_size) == (0.5, 0.25, 32)
            assert "slower here" in found.reason

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            (lambda state: state.pop("rel.weight"), "Found none"),
            (lambda state: state.update({"rel.weight": weight()[:3]}), "Found none"),  # for its bias does not fit
            (lambda state: state.update({"rel.weight": weight().mT}), r"Found weight \(7, 17, 18\), bias \(7,\)"),
            (lambda state: state.pop("rel.bias"), r"Found weight \(7, 18, 17\)"),
        ],
    )
    def test_another_original_is_refused(self, files, change, found):
        original, small, _ = files
        state = Net().state_dict()
        change(state)
        torch.save(state, original)
        with pytest.raises(CheckpointError, match=rf"should hold the weight of 'rel' of shape \(7, 18, 17\).*{found}"):
            compare_files(original, small)

    def test_a_file_without_replaced_layers_is_refused(self, files):
        original, small, _ = files
        cb.save(Net(), small)
        with pytest.raises(CheckpointError, match="should hold replaced layers"):
            compare_files(original, small)

    def test_an_uncompressed_file_is_refused(self, files):
        with pytest.raises(CheckpointError, match="should hold replaced layers"):
            compare_files(files[0], files[0])
