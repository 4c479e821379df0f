import itertools

import pytest
import torch
from support import assert_same_state, bilinear, state_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compress_bilinear as cb
from compress_bilinear.errors import CompressionError, ConfigError
from compress_bilinear.modules import CompressedBilinear
from compress_bilinear.planning import BatchSample, _distill, _planner, distil

IN1, IN2, OUT = 8, 7, 5


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rel = bilinear(IN1, IN2, OUT, dtype=dtype)
        self.norm = nn.BatchNorm1d(OUT, dtype=dtype)
        self.head = nn.Linear(OUT, 3, dtype=dtype).requires_grad_(False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        self.count += 1
        return self.head(torch.tanh(self.norm(self.rel(x1, x2))))


def batches(count: int = 16, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Inputs of three hidden dimensions and some noise, so that a low rank can be fitted to them."""
    generator = torch.Generator().manual_seed(0)
    mixings = [torch.randn(3, size, generator=generator) for size in (IN1, IN2)]
    found = []
    for _ in range(count):
        hidden = torch.randn(32, 3, generator=generator)
        noise = [0.1 * torch.randn(32, size, generator=generator) for size in (IN1, IN2)]
        found.append(tuple((hidden @ m + n).to(dtype) for m, n in zip(mixings, noise, strict=True)))
    return found


def made(model: Net, method: str, quantize) -> CompressedBilinear:
    kind, rank = (cb.CPBilinear, 5) if method == "cp" else (cb.TuckerBilinear, (4, 4, 6))
    return kind.from_bilinear(model.rel, rank, quantize=quantize)


@pytest.mark.parametrize("method", ["cp", "tucker"])
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_falls_and_the_format_stays(method, quantize, dtype, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(_distill.time, "perf_counter", lambda: float(next(ticks)))  # about one a step
    model = Net(dtype).train()
    model.norm.eval()
    before, flags = state_of(model), [part.training for part in model.modules()]
    module = made(model, method, quantize)
    stored = state_of(module)
    found = distil(model, {id(model.rel): module}, batches(dtype=dtype), trained_bias=[id(model.rel)], seconds=240)
    new = found.modules[id(model.rel)]
    assert found.after < found.before
    assert new is not module
    assert (type(new), new.quantize, new.rank) == (type(module), quantize, module.rank)
    assert {k: (v.dtype, v.shape) for k, v in state_of(new).items()} == {
        k: (v.dtype, v.shape) for k, v in stored.items()
    }
    assert_same_state(module, stored)
    assert_same_state(model, before)
    assert [part.training for part in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.head.parameters())


def test_what_is_not_accepted_is_not_kept():
    model = Net()
    module = made(model, "cp", None)
    found = distil(model, {id(model.rel): module}, batches(), seconds=0.2, accept=lambda _: False)
    assert found.modules[id(model.rel)] is module
    assert found.after == found.before


def solves_nothing(monkeypatch) -> None:
    def solve(*args, **options):
        raise AssertionError("solved before everything was checked")

    monkeypatch.setattr(_planner, "fit", solve)


def test_one_batch_is_an_error_before_anything_is_solved(monkeypatch):
    solves_nothing(monkeypatch)
    with pytest.raises(ConfigError, match="at least two calibration batches"):
        cb.plan(Net(), cb.CPConfig(rank=4), calibration=batches(1), refine="network", measure_latency=False)


class Wrapped(Net):
    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def forward(self, x1: Tensor, x2: Tensor):
        return self.change(super().forward(x1, x2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.argmax(-1), "should return a floating tensor"),
        (lambda y: None, "should return a floating tensor"),
        (lambda y: y.detach(), "should be differentiable"),
    ],
    ids=["integers", "nothing", "detached"],
)
def test_outputs_that_cannot_be_matched_are_an_error_before_anything_is_solved(change, message, monkeypatch):
    solves_nothing(monkeypatch)
    model = Wrapped(change)
    before = state_of(model)
    with pytest.raises(CompressionError, match=message):
        cb.compress(
            model, cb.CPConfig(rank=4), calibration=batches(), refine="network", measure_latency=False, inplace=True
        )
    assert isinstance(model.rel, nn.Bilinear)
    assert_same_state(model, before)


def test_batches_with_labels_need_a_forward_fn():
    labelled = [(x1, x2, x1[:, 0]) for x1, x2 in batches()]
    options = {"calibration": labelled, "refine": "network", "measure_latency": False, "max_seconds": 1.0}
    with pytest.raises(CompressionError, match="Pass `forward_fn`"):
        cb.plan(Net(), cb.CPConfig(rank=4), loss_fn=lambda m, b: m(*b[:2]).square().mean(), **options)
    (found,) = cb.plan(Net(), cb.CPConfig(rank=4), forward_fn=lambda m, b: m(*b[:2]), **options).report.layers
    assert "error on held-out batches" in found.reason


def test_a_target_of_a_layer_still_holds_afterwards():
    config = cb.CPConfig(rank=cb.MaxError(0.5))
    options = {"calibration": batches(), "refine": "network", "measure_latency": False, "max_seconds": 0.6}
    (found,) = cb.plan(Net(), config, **options).report.layers
    assert found.decision == "replaced"
    assert found.weight_error <= 0.5


def labelled_loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.cat(values) for values in zip(*batches(), strict=True))
    return DataLoader(TensorDataset(first, second, first.argmax(1)), batch_size=40, shuffle=True, generator=generator)


@pytest.mark.parametrize("quantize", [None, "int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_loader_with_labels_refines_and_what_comes_of_it_is_saved_whole(quantize, tmp_path, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(_distill.time, "perf_counter", lambda: float(next(ticks)))
    model, loader = Net(), labelled_loader()
    config = {"rel": cb.CPConfig(rank=4, quantize=quantize)}
    options = {"forward_fn": lambda m, b: m(*b[:2]), "measure_latency": False, "max_seconds": 2000.0}
    new, report = cb.compress(model, config, calibration=loader, refine="network", **options)
    assert "refined: the network's error on held-out batches fell" in report.layers[0].reason
    assert report.layers[0].amplification == pytest.approx(new.rel.to_decomposition().amplification)
    cb.save(new, tmp_path / "small.safetensors")
    again = cb.load(tmp_path / "small.safetensors", Net())
    assert_same_state(again, state_of(new))
    first, second = batches()[0]
    assert torch.equal(again(first, second), new(first, second))


def test_the_report_says_where_distilling_did_not_help():
    class Blind(Net):
        def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
            return super().forward(x1, x2) * 0

    config = {"rel": cb.CPConfig(rank=5)}
    options = {"calibration": batches(), "refine": "network", "measure_latency": False, "max_seconds": 0.5}
    (found,) = cb.plan(Blind(), config, **options).report.layers
    assert "not refined: the network's error on held-out batches did not fall from 0" in found.reason
    (found,) = cb.plan(Net(), {"rel": cb.DenseConfig(quantize="int8")}, **options).report.layers
    assert "not refined, for it is dense" in found.reason


def test_the_sample_of_a_long_stream_is_uniform_and_bounded():
    sample, most = BatchSample(most_bytes=10 * 32 * 8), 0
    for _ in sample.watch((torch.full((32,), k), {"label": torch.zeros(32).byte()}) for k in range(3000)):
        most = max(most, sum(_distill._bytes(batch) for batch in sample.batches))
    assert most <= 10 * 32 * 8
    kept = [int(values[0]) for values, _ in sample.batches]
    assert len(kept) == len(set(kept)) == 8
    drawn = [int(batch) for seed in range(40) for batch in _kept(BatchSample(seed), range(1000))]
    assert sum(drawn) / len(drawn) == pytest.approx(500, rel=0.02)


def _kept(sample: BatchSample, stream) -> list[int]:
    for _ in sample.watch(stream):
        pass
    return sample.batches


def test_outputs_that_are_infinite_refine_nothing():
    model = Wrapped(lambda y: y.masked_fill(y > 0, float("-inf")))
    module = made(model, "cp", None)
    assert distil(model, {id(model.rel): module}, batches(), seconds=30).modules[id(model.rel)] is module


@pytest.mark.parametrize("compute", ["on_the_fly", "int8"])
def test_a_trained_replacement_is_judged_in_the_mode_of_the_one_before(compute):
    before = cb.TuckerBilinear.from_bilinear(bilinear(6, 5, 4), rank=(2, 3, 3), quantize="int8")
    before.set_compute(compute)
    after = _distill._restored(_distill._widened(before), before)
    assert after.compute == compute
    assert bool(after.in1_proj.integer_rows) == (compute == "int8")
