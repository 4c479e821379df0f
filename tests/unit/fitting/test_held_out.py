"""The held-out error is that of inputs that no fit has seen, however rows depend on each other."""

import pytest
import torch
from support import bilinear, layer_inputs
from torch import Tensor, nn

import compress_bilinear as cb
from compress_bilinear.fitting import LayerInputs, OutputError, collect_inputs

SIZE = 12


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(count, SIZE, seed=seed), normal(count, SIZE, seed=seed + 1000)


def seen(*batches, call=None, **options) -> LayerInputs:
    layer = bilinear(SIZE, SIZE, 2)
    found = collect_inputs(layer, {"": layer}, batches, forward_fn=call, **options)[""]
    assert found is not None
    return found


def distinct(*rows: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in torch.cat(rows, 1).tolist()}


def assert_nothing_is_shared(found: LayerInputs, which: tuple[int, ...] = (0, 1)) -> None:
    for k in which:
        assert not distinct(found.fit[k]) & distinct(found.held_out[k])


def moments(x1: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
    first, second = x1.double(), x2.double()
    return tuple(a.T @ b / len(first) for a, b in ((first, first), (second, second), (first, second)))


def assert_fit_moments(found: LayerInputs, x1: Tensor, x2: Tensor) -> None:
    for moment, expected in zip(found.fit_moments, moments(x1, x2), strict=True):
        torch.testing.assert_close(moment, expected, rtol=1e-9, atol=1e-9)


class TestWholeBatches:
    @pytest.mark.parametrize("count", [8, 11, 16, 40])
    def test_about_one_of_four_is_held_out(self, count):
        batches = [pairs(20, seed) for seed in range(count)]
        found = seen(*batches)
        held = [k for k, batch in enumerate(batches) if distinct(*batch) & distinct(*found.held_out)]
        assert count // 4 <= len(held) <= -(-count // 4)
        assert len({k // 4 for k in held}) == len(held)  # one of each four
        assert len(found.held_out[0]) == 20 * len(held)
        assert len(found.fit[0]) == 20 * (count - len(held))

    def test_their_rows_are_in_no_moment(self):
        batches = [pairs(20, seed) for seed in range(8)]
        found = seen(*batches)
        held = distinct(*found.held_out)
        left = [batch for batch in batches if not distinct(*batch) & held]
        assert len(left) == 6
        assert_fit_moments(found, *(torch.cat(parts) for parts in zip(*left, strict=True)))

    def test_all_calls_within_a_batch_are_one_group(self):
        batches = [[pairs(10, 10 * seed + k) for k in range(3)] for seed in range(8)]
        found = seen(*batches, call=lambda layer, batch: [layer(*pair) for pair in batch])
        for batch in batches:
            held = [bool(distinct(*pair) & distinct(*found.held_out)) for pair in batch]
            assert len(set(held)) == 1
        assert len(found.held_out[0]) == 60

    def test_batches_that_do_not_reach_the_layer_do_not_count(self):
        batches = [pairs(20 if seed % 4 == 0 else 0, seed) for seed in range(32)]
        assert len(seen(*batches).held_out[0]) == 2 * 20

    def test_the_seed_draws_them(self):
        batches = [pairs(20, seed) for seed in range(16)]
        held = [frozenset(distinct(*seen(*batches, seed=seed).held_out)) for seed in (0, 0, 1, 2)]
        assert held[0] == held[1]
        assert len(set(held)) > 1

    def test_batches_that_come_again_are_not_held_out_and_fitted_to(self):
        batches = [pairs(20, seed) for seed in range(3)] * 6
        found = seen(*batches)
        assert_nothing_is_shared(found)
        assert 0.15 < len(found.held_out[0]) / 360 < 0.35
        assert_fit_moments(found, *found.fit)

    def test_pairs_that_come_again_in_some_batches_are_not_fitted_to(self):
        batches = [pairs(20, seed) for seed in range(12)]
        again = [
            tuple(torch.cat([part, first[:3]]) for part, first in zip(b, batches[0], strict=True)) for b in batches
        ]
        found = seen(*again)
        assert not distinct(*found.fit) & distinct(*found.held_out)

    def test_values_that_come_again_with_others_are(self):
        table = normal(6, SIZE, seed=1)
        found = seen(*[(pairs(30, seed)[0], table[torch.arange(30) % 6]) for seed in range(8)])
        assert len(found.fit[0]) == 6 * 30
        assert found.split.groups() == 6


class TestFewBatches:
    @pytest.mark.parametrize("count", [1, 2, 8])
    def test_of_independent_rows_a_quarter_is_held_out(self, count):
        first, second = pairs(2048)
        found = seen(*zip(first.chunk(count), second.chunk(count), strict=True))
        assert (len(found.held_out[0]), len(found.fit[0])) == (512, 1536)
        assert found.split.groups() == 512

    def test_rows_that_share_an_input_stay_together(self):
        graphs = normal(6, SIZE, seed=1)
        found = seen((normal(240, SIZE, seed=2), graphs.repeat_interleave(40, 0)))
        assert_nothing_is_shared(found)
        assert (len(found.held_out[0]), found.split.groups()) == (80, 2)
        assert_fit_moments(found, *found.fit)

    def test_also_where_rounding_makes_them_differ(self):
        graphs = normal(6, SIZE, seed=1).repeat_interleave(40, 0)
        noisy = graphs * (1 + 1e-7 * normal(240, SIZE, seed=3))
        found = seen((normal(240, SIZE, seed=2), noisy))
        assert (len(found.held_out[0]), found.split.groups()) == (80, 2)

    def test_also_through_others(self):
        """Row k shares input1 with row k - 1, and input2 with row k + 1; ten chains of such rows."""
        first, second = pairs(200)
        index = torch.arange(200)
        found = seen((first[(index + 1) // 2], second[index // 2 + 100 * (index // 20 % 2)]))
        assert_nothing_is_shared(found)

    def test_copies_of_a_pair_stay_together(self):
        first, second = pairs(96)
        found = seen((first.repeat(4, 1), second.repeat(4, 1)))
        assert_nothing_is_shared(found)
        assert (len(found.held_out[0]), found.split.groups()) == (96, 24)

    def test_near_copies_of_held_out_rows_are_not_fitted_to(self):
        first, second = (rows.repeat(3, 1) for rows in pairs(96))
        found = seen((first + 1e-5 * normal(288, SIZE, seed=3), second * (1 + 1e-5)))
        distances = torch.cdist(torch.cat(found.fit, 1), torch.cat(found.held_out, 1))
        assert float(distances.min()) > 0.1
        assert len(found.fit[0]) > 96

    @pytest.mark.parametrize("shift", [0.0, 1000.0])
    def test_rows_with_a_large_mean_are_no_copies(self, shift):
        first, second = pairs(200)
        found = seen((first + shift, second + shift))
        assert len(found.fit[0]) + len(found.held_out[0]) == 200

    def test_of_all_pairs_both_inputs_are_new(self):
        first, second = pairs(30)
        found = seen((first.unsqueeze(1).expand(30, 30, SIZE), second.expand(30, 30, SIZE)))
        assert_nothing_is_shared(found)
        assert (len(found.held_out[0]), len(found.fit[0]), found.split.groups()) == (100, 400, 10)
        assert_fit_moments(found, *found.fit)

    @pytest.mark.parametrize("values", [1, 3])
    def test_where_one_input_has_few_values_the_other_is_new(self, values):
        table, index = normal(values, SIZE, seed=5), torch.arange(60) % values
        first = normal(20, SIZE, seed=1).repeat_interleave(3, 0)
        found = seen((first, table[index]))
        assert_nothing_is_shared(found, (0,))
        assert (len(found.held_out[0]), found.split.groups()) == (15, values)

    def test_all_values_of_an_index_are_fitted_to(self):
        index = torch.arange(SIZE).repeat(20)
        found = seen((normal(80, SIZE, seed=1).repeat_interleave(3, 0), nn.functional.one_hot(index).float()))
        assert_nothing_is_shared(found, (0,))
        assert len(distinct(found.fit[1])) == SIZE
        assert (len(found.held_out[0]), found.split.groups()) == (60, 20)

    def test_rows_that_are_all_alike_are_all_held_out(self):
        found = seen(tuple(rows[:1].expand(64, -1) for rows in pairs(1)))
        assert not found.is_enough
        assert (len(found.fit[0]), len(found.held_out[0]), found.split.groups()) == (0, 64, 1)

    def test_one_batch_of_most_rows_is_not_held_out_whole(self):
        found = seen(pairs(1000), *[pairs(4, seed) for seed in range(1, 12)])
        assert abs(len(found.held_out[0]) - 1044 / 4) < 2

    def test_the_cut_rows_of_one_source_are_not_batches(self):
        graphs = normal(6, SIZE, seed=1).repeat_interleave(40, 0)
        parts = zip(normal(240, SIZE, seed=2).split(24), graphs.split(24), strict=True)
        assert_nothing_is_shared(seen(*parts, whole_batches=False))


def test_the_groups_are_those_of_the_rows_that_are_measured_on():
    layer = bilinear(SIZE, SIZE, 2)
    measured = OutputError(layer, seen((normal(240, SIZE, seed=2), normal(6, SIZE, seed=1).repeat_interleave(40, 0))))
    assert (measured.rows, measured.groups) == (80, 2)


class Discriminator(nn.Module):
    """One summary beside every node of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.disc = bilinear(16, 16, 4)

    def forward(self, nodes: Tensor) -> Tensor:
        return self.disc(nodes, nodes.mean(0).expand_as(nodes))


def error_of(small: nn.Module, model: nn.Module, *inputs: Tensor) -> float:
    with torch.no_grad():
        exact = model(*inputs)
        return float((small(*inputs) - exact).norm() / (exact - bias(model)).norm())


def bias(model: nn.Module) -> Tensor:
    return next(value for name, value in model.named_parameters() if name.endswith("bias")).detach()


@pytest.mark.parametrize("config", [cb.TuckerConfig(rank=(4, 6, 6)), cb.CPConfig(rank=12)])
def test_the_error_of_a_summary_beside_every_node_is_that_of_new_graphs(config):
    graphs = [normal(80, 16, seed=seed) + 2 * normal(16, seed=seed + 100) for seed in range(104)]
    model = Discriminator()
    small, report = cb.compress(model, config, calibration=graphs[:40], measure_latency=False)
    new = [error_of(small, model, graph) for graph in graphs[40:]]
    told = report.layers[0].output_error
    assert sorted(new)[len(new) // 2] <= 1.5 * told + 1e-3
    assert report.layers[0].calibration_groups == 10
    assert not report.layers[0].has("few_groups")


@pytest.mark.parametrize("form", ["repeated", "all pairs"])
def test_the_error_of_repeated_rows_is_that_of_new_pairs(form):
    first, second = normal(96, 16, seed=1), normal(96, 16, seed=2)
    batch = (first.repeat(4, 1), second.repeat(4, 1))
    if form == "all pairs":
        batch = first[:20].unsqueeze(1).expand(20, 20, 16), second[:20].expand(20, 20, 16)
    model = bilinear(16, 16, 8)
    config = cb.TuckerConfig(rank=(8, 8, 8))
    small, report = cb.compress(model, config, calibration=[batch], measure_latency=False)
    (layer,) = report.layers
    truth = error_of(small, model, normal(500, 16, seed=3), normal(500, 16, seed=4))
    assert truth / 1.5 <= layer.output_error
    assert layer.calibration_groups == (24 if form == "repeated" else 7)
    assert layer.has("few_groups") == (form == "all pairs")


class TestNotes:
    @pytest.mark.parametrize("config", [cb.TuckerConfig(rank=(2, 6, 6)), cb.DenseConfig(quantize="nf4")])
    def test_too_few_rows_to_fit_to_are_told(self, config):
        (layer,) = self.report(config, pairs(20))
        assert layer.has("few_rows")
        assert "fitted to the weight, for only 20 calibration rows" in layer.reason

    @pytest.mark.parametrize(
        ("config", "count"),
        [
            (cb.TuckerConfig(rank=(2, 6, 6), fit="weight"), 20),  # what was asked for
            (cb.DenseConfig(), 20),  # exact
            (cb.TuckerConfig(rank=(2, 6, 6)), 64),
        ],
    )
    def test_otherwise_there_is_nothing_to_tell(self, config, count):
        (layer,) = self.report(config, pairs(count))
        assert not layer.has("few_rows")
        assert not layer.has("few_groups")

    @pytest.mark.parametrize(("rank", "decision"), [(8, "replaced"), (40, "kept")])
    def test_few_groups_are_told(self, rank, decision):
        first, second = pairs(64)
        (layer,) = self.report(cb.CPConfig(rank=rank), (first, second[:1].expand(64, -1)))
        assert (layer.decision, layer.calibration_rows, layer.calibration_groups) == (decision, 16, 1)
        assert layer.has("few_groups")
        assert "rests on 1 independent group of rows" in layer.reason

    @staticmethod
    def report(config, *batches) -> tuple[cb.LayerReport, ...]:
        layer = bilinear(SIZE, SIZE, 4)
        return cb.plan(layer, config, calibration=batches, measure_latency=False).report.layers


def test_inputs_that_were_made_by_hand_are_divided_too():
    found = layer_inputs(*pairs(64))
    assert (len(found.fit[0]), len(found.held_out[0])) == (48, 16)
