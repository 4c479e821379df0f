"""What a review found, kept fixed: each was silently wrong, or broke the model, once."""

import copy
import json
import math

import pytest
import torch
from support import assert_matches_reference, assert_same_state, bilinear, low_rank, state_of
from torch import nn

import compress_bilinear as cb
from compress_bilinear import cli, decomposition, ops
from compress_bilinear.errors import CheckpointError, CompressionError, ConfigError, InputError
from compress_bilinear.fitting import _solve as solving


class Net(nn.Module):
    def __init__(self, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.rel = bilinear(12, 10, 8) if layer is None else layer

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        return self.rel(x1, x2)


def quick(model, config=None, **options):
    config = cb.DenseConfig(quantize="int8") if config is None else config
    return cb.compress(model, config, measure_latency=False, **options)


def test_a_replacement_whose_outputs_overflow_is_not_made():
    layer = nn.Bilinear(32, 32, 512, bias=False, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.fill_(512**-0.5 / 32)
    rows = torch.full((4, 32), 60.0, dtype=torch.float16)
    assert bool(torch.isfinite(layer(rows, rows)).all())
    _, report = quick(Net(layer), cb.CPConfig(rank=1), calibration=[(rows, rows)])
    assert report.layers[0].decision == "kept"
    assert "range of float16" in report.layers[0].reason


def test_rows_of_zeros_say_nothing_of_the_output():
    _, report = quick(Net(), cb.CPConfig(rank=2), calibration=[(torch.zeros(4, 12), torch.zeros(4, 10))])
    assert report.layers[0].output_error is None


def test_a_weight_that_rounds_to_nothing_is_kept():
    layer = bilinear(12, 10, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(1e-200)
    _, report = quick(Net(layer))
    assert report.layers[0].decision == "kept"
    assert "keeps nothing" in report.layers[0].reason


def test_a_copy_that_is_no_copy_is_an_error():
    class Stubborn(Net):
        def __deepcopy__(self, memo):
            return self

    model = Stubborn()
    before = state_of(model)
    with pytest.raises(CompressionError, match="__deepcopy__"):
        quick(model)
    assert_same_state(model, before)
    assert type(model.rel) is nn.Bilinear


def test_a_subclass_with_more_methods_is_kept():
    class Scored(nn.Bilinear):
        def score(self, x1, x2):
            return self(x1, x2).sum()

    _, report = quick(Net(Scored(12, 10, 8)))
    assert report.layers[0].decision == "kept"
    assert "own score" in report.layers[0].reason


def test_a_subclass_that_is_only_built_otherwise_is_replaced():
    class Square(nn.Bilinear):
        def __init__(self, size):
            super().__init__(size, size, size)

    small, _ = quick(Net(Square(12)))
    assert isinstance(small.rel, cb.DenseBilinear)


def test_a_bias_of_another_shape_is_kept():
    layer = bilinear(12, 10, 8)
    layer.bias = nn.Parameter(torch.ones(1))
    _, report = quick(Net(layer))
    assert "its bias has shape (1,)" in report.layers[0].reason


def test_calibration_does_not_initialise_lazy_layers():
    model = nn.Sequential()
    model.net, model.lazy = Net(), nn.LazyLinear(3)
    with pytest.raises(CompressionError, match="run the model once first"):
        cb.plan(model, cb.DenseConfig(quantize="int8"), calibration=[torch.ones(1)])
    assert isinstance(model.lazy, nn.LazyLinear)


def test_an_expanded_buffer_is_refused_by_load_and_the_model_untouched(tmp_path):
    def build():
        model = Net()
        model.register_buffer("expanded", torch.full((1,), float(torch.rand(()))).expand(4))
        return model

    cb.save(quick(build())[0], tmp_path / "small.safetensors")
    model = build()
    before = state_of(model)
    with pytest.raises(CheckpointError, match="Found an expanded one"):
        cb.load(tmp_path / "small.safetensors", model)
    assert_same_state(model, before)
    assert type(model.rel) is nn.Bilinear


def test_load_keeps_the_flag_of_the_bias(tmp_path):
    cb.save(quick(Net())[0], tmp_path / "small.safetensors")
    model = Net()
    model.rel.weight.requires_grad_(False)
    assert cb.load(tmp_path / "small.safetensors", model).rel.bias.requires_grad


def test_an_already_compressed_file_is_refused_by_the_command_line(tmp_path, monkeypatch, capsys):
    cb.save(quick(Net())[0], tmp_path / "small.safetensors")
    arguments = ["compress", str(tmp_path / "small.safetensors"), "-o", str(tmp_path / "out"), "--max-size", "0.5"]
    monkeypatch.setattr("sys.argv", ["compress-bilinear", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "compressed already" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_of_a_file_does_not_speak_of_force(tmp_path):
    from compress_bilinear.planning import compare

    model = Net()
    small, _ = quick(model, cb.CPConfig(rank=60), force=True)
    cb.save(small, tmp_path / "large.safetensors")
    torch.save(model.state_dict(), tmp_path / "net.pt")
    (layer,) = compare(tmp_path / "net.pt", tmp_path / "large.safetensors").layers
    assert layer.reason.startswith("it is not smaller")


@pytest.mark.parametrize("seed", ["x", 1.5, -1, 2**70, True])
def test_a_bad_seed_is_an_error_where_it_is_given(seed):
    with pytest.raises(ConfigError, match="`seed` should be"):
        cb.CPConfig(rank=2, seed=seed)


def test_a_rank_beyond_all_sizes_is_an_error():
    with pytest.raises(ConfigError, match=r"below 2\*\*31"):
        cb.CPConfig(rank=10**30)


def test_the_dense_op_does_not_pair_rows_of_other_shapes():
    weight = torch.ones(4, 3, 2)
    with pytest.raises(InputError, match="same leading dimensions"):
        ops.bilinear_dense(torch.ones(2, 3, 3), torch.ones(3, 2, 2), weight)
    with pytest.raises(InputError, match="`order`"):
        ops.bilinear_dense(torch.ones(3), torch.ones(2), weight, order="zz")  # type: ignore[arg-type]


def test_every_module_is_made_from_a_layer_and_from_a_decomposition():
    layer = bilinear(12, 10, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(low_rank((8, 12, 10), 3))
    rows = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 10, dtype=torch.float64)
    cp, tucker = cb.decomposition.cp(layer.weight, 3), cb.decomposition.tucker(layer.weight, (3, 3, 3))
    expected = layer(*rows).detach()
    for module in (
        cb.CPBilinear.from_bilinear(layer, 3),
        cb.TuckerBilinear.from_bilinear(layer, (3, 3, 3)),
        cb.DenseBilinear.from_bilinear(layer),
        cb.CPBilinear.from_decomposition(cp, layer.bias),
        cb.TuckerBilinear.from_decomposition(tucker, layer.bias),
        cb.DenseBilinear.from_decomposition(cp, layer.bias),
        cb.DenseBilinear.from_decomposition(tucker, layer.bias),
    ):
        assert_matches_reference(module(*rows).detach(), expected, factor=1e6)  # the solver stops at about 1e-7


def test_modules_compute_what_the_reference_ops_define():
    cp, tucker = (
        cb.decomposition.cp(low_rank((8, 12, 10), 3), 3),
        cb.decomposition.tucker(low_rank((8, 12, 10), 3), (2, 3, 2)),
    )
    rows, bias = (torch.randn(5, 12).double(), torch.randn(5, 10).double()), torch.randn(8).double()
    scaled = (cp.factors[0] * cp.weights, *cp.factors[1:])
    assert_matches_reference(
        cb.CPBilinear.from_decomposition(cp, bias)(*rows), ops.reference.bilinear_cp(*rows, scaled, bias)
    )
    assert_matches_reference(
        cb.TuckerBilinear.from_decomposition(tucker, bias)(*rows),
        ops.reference.bilinear_tucker(*rows, tucker.core, tucker.factors, bias),
    )


def test_a_deeply_nested_report_and_description_are_clear_errors(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "deep", {"compress_bilinear": "[" * 100_000})
    with pytest.raises(CheckpointError):
        cb.load(tmp_path / "deep", Net())
    report = json.loads(quick(Net())[1].to_json())
    assert cb.Report.from_dict(copy.deepcopy(report)).to_dict() == report


class TestSolvers:
    """What a review of the solvers found."""

    @pytest.mark.parametrize("config", [cb.DenseConfig(), cb.TuckerConfig(rank=(4, 5, 6))], ids=["dense", "absorbed"])
    def test_measuring_a_float64_layer_leaves_its_weight_alone(self, config):
        layer = bilinear(5, 6, 4, dtype=torch.float64)
        new, report = cb.compress(layer, config, force=True, measure_latency=False)
        torch.testing.assert_close(new.to_dense().detach(), layer.weight.detach(), rtol=0, atol=0)
        assert report.layers[0].weight_error == 0

    @pytest.mark.parametrize("inplace", [False, True])
    def test_an_absorbed_output_needs_no_bias(self, inplace):
        net = nn.Sequential(bilinear(9, 8, 2, bias=False))
        new, report = cb.compress(net, cb.TuckerConfig(rank=(2, 3, 3)), inplace=inplace, measure_latency=False)
        assert report.layers[0].decision == "replaced"
        assert new[0].bias is None

    def test_calibration_takes_a_stream_without_a_length(self):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter([(torch.ones(6), torch.ones(7))] * 4)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = bilinear(6, 7, 5)

            def forward(self, x1, x2):
                return self.layer(x1, x2)

        batches = torch.utils.data.DataLoader(Stream(), batch_size=2)
        plan = cb.plan(Net(), cb.TuckerConfig(rank=(2, 2, 2)), calibration=batches, measure_latency=False)
        assert plan.report.layers[0].calibration_rows == 4

    @pytest.mark.parametrize("scale", [1e-7, 1e5, 1e7])
    def test_ranks_do_not_depend_on_the_scale_of_the_core(self, scale):
        weight = 1 + 0.3 * low_rank((40, 40, 40), 400) / low_rank((40, 40, 40), 400).std()
        expected = decomposition.tucker(weight, cb.MaxError(0.2))
        found = decomposition.tucker(weight * scale, cb.MaxError(0.2))
        assert (found.rank, found.error <= 0.2) == (expected.rank, True)

    @pytest.mark.parametrize("weight", [low_rank((10, 10, 10), 1), torch.zeros(10, 10, 10)], ids=["rank 1", "zero"])
    @pytest.mark.parametrize("rank", [(8, 2, 2), (2, 9, 3)], ids=str)
    def test_a_rank_beyond_the_weights_is_still_the_one_asked_for(self, weight, rank):
        found = decomposition.tucker(weight, rank)
        assert found.rank == rank
        for factor in found.factors:
            torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1]).to(factor), rtol=0, atol=1e-6)

    def test_a_size_that_only_an_absorbed_mode_fits_is_feasible(self):
        # (1, 1, 1) stores 21 numbers, (4, 1, 1) only 20
        rank = decomposition.tucker(low_rank((4, 8, 8), 50), cb.MaxSize(20.5 / 256)).rank
        assert decomposition.tucker_parameters(rank, (4, 8, 8)) == 20

    @pytest.mark.parametrize(
        ("shape", "dtype", "scale"), [((6, 5, 7), torch.float64, 1e-310), ((50, 45, 40), torch.float32, 1e-41)]
    )
    def test_subnormal_weights_are_decomposed(self, shape, dtype, scale):
        weight = (low_rank(shape, 2) * scale).to(dtype)
        for found in (decomposition.cp(weight, 2), decomposition.tucker(weight, (2, 2, 2))):
            assert math.isfinite(found.error)

    def test_a_default_device_does_not_matter(self):
        weight = low_rank((6, 7, 8), 30)
        expected = decomposition.cp(weight, 3).error
        with torch.device("meta"):
            assert decomposition.cp(weight, 3).error == pytest.approx(expected)

    def test_autocast_does_not_matter(self):
        weight = low_rank((50, 45, 40), 5, noise=0.01).float()
        expected = decomposition.cp(weight, 5).error
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert decomposition.cp(weight, 5).error == pytest.approx(expected, rel=1e-3)
            assert decomposition.tucker(weight, (5, 5, 5)).error < 1.01 * expected

    def test_a_solve_of_several_attempts_has_one_progress(self):
        seen = []
        config = cb.TuckerConfig(rank=cb.MaxError(0.3), quantize="int8")
        solving.solve(bilinear(20, 18, 12), config, None, lambda done, error: seen.append(done))
        assert seen == sorted(seen)

    def test_an_int8_error_is_met_within_a_time_limit(self):
        net = nn.Sequential(bilinear(30, 30, 20))
        config = cb.CPConfig(rank=cb.MaxError(0.9), quantize="int8")
        _, report = cb.compress(net, config, max_seconds=60, measure_latency=False)
        assert report.layers[0].decision == "replaced"
        assert report.layers[0].weight_error <= 0.9

    def test_more_time_is_never_much_worse_for_an_exact_weight(self):
        weight = low_rank((60, 70, 80), 10).float()
        assert decomposition.cp(weight, 10, max_seconds=20).error < 1e-5
