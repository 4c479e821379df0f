import types
from contextlib import nullcontext

import pytest
import torch
from support import assert_same_state, bilinear, state_of
from torch import Tensor, nn

from compress_bilinear.errors import CompressionError
from compress_bilinear.fitting import LayerInputs, collect_inputs

IN1, IN2, OUT = 5, 4, 3


class Net(nn.Module):
    """A layer behind batch normalisation and dropout, which count, draw and look at their mode."""

    def __init__(self) -> None:
        super().__init__()
        self.rel = bilinear(IN1, IN2, OUT)
        self.spare = bilinear(IN1, IN2, OUT)
        self.norm = nn.BatchNorm1d(IN1)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("in_place", torch.zeros(()))
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, left: Tensor, right: Tensor, fail: bool = False) -> Tensor:
        self.in_place += 1
        self.norm(torch.rand(6, IN1))
        self.modes.append((any(part.training for part in self.modules()), torch.is_grad_enabled()))
        output = self.rel(self.drop(left), self.drop(right))
        if fail:
            raise RuntimeError("no such word")
        return output


class Call(nn.Module):
    """Runs `call(layer, *batch)`."""

    def __init__(self, call) -> None:
        super().__init__()
        self.rel = bilinear(IN1, IN2, OUT)
        self.call = call

    def forward(self, *batch: Tensor) -> Tensor:
        return self.call(self.rel, *batch)


def pairs(*leading: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, IN1, generator=generator), torch.randn(*leading, IN2, generator=generator)


def numbered(start: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows that say which they are, in both inputs."""
    number = torch.arange(start, start + count, dtype=torch.float32)[:, None]
    return number.expand(-1, IN1), -number.expand(-1, IN2)


def assert_same_rows(found: LayerInputs, input1: Tensor, input2: Tensor) -> None:
    """The sample is these pairs of rows, in any order."""
    rows = torch.cat([found.input1, found.input2], 1)
    expected = torch.cat([input1.reshape(-1, IN1), input2.reshape(-1, IN2)], 1)
    torch.testing.assert_close(rows[rows[:, 0].argsort()], expected[expected[:, 0].argsort()], rtol=0, atol=0)


def sample(call, batches, **options) -> LayerInputs | None:
    model = Call(call)
    return collect_inputs(model, {"rel": model.rel}, batches, **options)["rel"]


@pytest.mark.parametrize(
    "form",
    [tuple, list, lambda pair: {"right": pair[1], "left": pair[0]}],
    ids=["tuple", "list", "dict"],
)
def test_batches_are_the_models_arguments(form):
    model, batches = Net(), [pairs(3, seed=seed) for seed in range(2)]
    found = collect_inputs(model, {"rel": model.rel}, [form(batch) for batch in batches])["rel"]
    assert_same_rows(found, *(torch.cat(parts) for parts in zip(*batches, strict=True)))


def test_a_tensor_is_one_argument():
    x1, x2 = pairs(3)
    found = sample(lambda layer, x: layer(x[:, :IN1], x[:, IN1:]), [torch.cat([x1, x2], 1)])
    assert_same_rows(found, x1, x2)


def test_a_one_shot_generator_is_enough():
    batches = [pairs(3, seed=seed) for seed in range(4)]
    found = sample(lambda layer, x1, x2: layer(x1, x2), iter(batches))
    assert (found.rows_seen, found.calls, found.rows_per_call) == (12, 4, 3)
    assert_same_rows(found, *(torch.cat(parts) for parts in zip(*batches, strict=True)))


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x1, x2: layer(input1=x1, input2=x2),
        lambda layer, x1, x2: layer(x1, input2=x2),
        lambda layer, x1, x2: layer(input2=x2, input1=x1),
    ],
)
def test_keyword_calls_are_seen(call):
    batch = pairs(3)
    assert_same_rows(sample(call, [batch]), *batch)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 4)])
def test_any_leading_dimensions_are_rows(leading):
    batch = pairs(*leading)
    assert_same_rows(sample(lambda layer, x1, x2: layer(x1, x2), [batch]), *batch)


def test_expanded_inputs_are_sampled_as_pairs():
    x1, x2 = pairs(2, 4)
    pair1, pair2 = x1.unsqueeze(2).expand(2, 4, 4, IN1), x2.unsqueeze(1).expand(2, 4, 4, IN2)
    found = sample(lambda layer, x1, x2: layer(x1, x2), [(pair1, pair2)])
    assert found.rows_seen == 32
    # the first column ties among pairs, so the pairs are compared as sets
    rows = {tuple(row) for row in torch.cat([found.input1, found.input2], 1).tolist()}
    assert rows == {tuple(row) for row in torch.cat([pair1, pair2], -1).reshape(-1, IN1 + IN2).tolist()}


def test_expanded_inputs_are_never_written_out():
    class Sink(nn.Module):
        def forward(self, input1: Tensor, input2: Tensor) -> None:
            pass

    sink, width, length = Sink(), 1_000, 2_000  # written out, this is 32 GB
    pair = [torch.ones(width).expand(length, length, width) for _ in range(2)]
    found = collect_inputs(sink, {"": sink}, [pair], max_rows=3)[""]
    assert found.rows_seen == length**2
    assert found.input1.shape == (3, width)


def test_the_sample_is_bounded_and_keeps_pairs_together():
    sizes = (9, 1, 20, 7)
    batches = [numbered(sum(sizes[:k]), size) for k, size in enumerate(sizes)]
    found = sample(lambda layer, x1, x2: layer(x1, x2), batches, max_rows=10)
    assert (found.rows_seen, found.calls) == (37, 4)
    assert found.input1.shape == (10, IN1)
    assert found.input2.shape == (10, IN2)
    assert torch.equal(found.input1[:, 0], -found.input2[:, 0])
    assert len(set(found.input1[:, 0].tolist())) == 10


def test_the_sample_is_uniform_over_all_rows():
    sizes, draws, kept = (1, 20, 4, 15), 200, 10
    batches = [numbered(sum(sizes[:k]), size) for k, size in enumerate(sizes)]
    counts = torch.zeros(40)
    for seed in range(draws):
        rows = sample(lambda layer, x1, x2: layer(x1, x2), batches, max_rows=kept, seed=seed).input1[:, 0].long()
        counts[rows] += 1
    expected = draws * kept / 40
    deviation = (expected * (1 - kept / 40)) ** 0.5
    assert float((counts - expected).abs().max()) < 4.5 * deviation


def test_the_seed_decides_the_sample():
    batches = [numbered(0, 50)]
    samples = [sample(lambda layer, x1, x2: layer(x1, x2), batches, max_rows=5, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(samples[0].input1, samples[1].input1)
    assert not torch.equal(samples[0].input1, samples[2].input1)


def test_single_rows_fill_the_sample_and_no_more():
    batches = [(x1[0], x2[0]) for x1, x2 in (numbered(k, 1) for k in range(12))]
    found = sample(lambda layer, x1, x2: layer(x1, x2), batches, max_rows=4)
    assert (found.rows_seen, found.calls, len(found.input1)) == (12, 12, 4)


def test_a_layer_that_is_called_twice_has_the_rows_of_both_calls():
    batch, other = pairs(3, seed=0), pairs(2, seed=1)
    found = sample(lambda layer, a, b, c, d: (layer(a, b), layer(c, d)), [(*batch, *other)])
    assert (found.rows_seen, found.calls, found.rows_per_call) == (5, 2, 2)
    assert_same_rows(found, *(torch.cat(parts) for parts in zip(batch, other, strict=True)))


def test_a_shared_layer_has_the_union_under_each_name():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = bilinear(IN1, IN2, OUT)

        def forward(self, x1: Tensor, x2: Tensor, y1: Tensor, y2: Tensor) -> Tensor:
            return self.a(x1, x2).sum() + self.b(y1, y2).sum()

    model, batch, other = Shared(), pairs(3, seed=0), pairs(2, seed=1)
    found = collect_inputs(model, {"a": model.a, "b": model.b}, [(*batch, *other)])
    for name in ("a", "b"):
        assert_same_rows(found[name], *(torch.cat(parts) for parts in zip(batch, other, strict=True)))


@pytest.mark.parametrize("rows", [None, 0])
def test_a_layer_that_no_row_reaches_has_none(rows):
    model = Net()
    batches = [pairs(2)] if rows is None else [pairs(rows)]
    layer = model.spare if rows is None else model.rel
    assert collect_inputs(model, {"it": layer}, batches)["it"] is None


def test_empty_calls_do_no_harm():
    batch = pairs(3)
    assert_same_rows(sample(lambda layer, x1, x2: layer(x1, x2), [pairs(0), batch, pairs(2, 0)]), *batch)


@pytest.mark.parametrize("leading", [(3,), ()])
def test_the_sample_is_a_copy(leading):
    x1, x2 = pairs(*leading)
    before = x1.clone()
    found = sample(lambda layer, x1, x2: layer(x1, x2), [(x1, x2)])
    x1.zero_()
    assert_same_rows(found, before, x2)


def failing_batches():
    yield pairs(2)
    raise OSError("the disk is gone")


FAILING = {"left": pairs(2)[0], "right": pairs(2)[1], "fail": True}


def test_a_stream_without_a_length_is_enough():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(IN1), torch.ones(IN2))] * 4)

    found = sample(lambda layer, *batch: layer(*batch), torch.utils.data.DataLoader(Stream(), batch_size=2))
    assert found.rows_seen == 4


def test_lazy_layers_are_not_initialised():
    model = nn.Sequential()
    model.rel, model.lazy = bilinear(IN1, IN2, OUT), nn.LazyLinear(3)
    with pytest.raises(CompressionError, match="run the model once first"):
        collect_inputs(model, {"rel": model.rel}, [torch.ones(1)])
    assert isinstance(model.lazy, nn.LazyLinear)


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        (lambda: [pairs(2), pairs(2)], None),
        (lambda: [pairs(2), FAILING], CompressionError),
        (failing_batches, OSError),
        (list, CompressionError),
    ],
    ids=["done", "model fails", "batches fail", "no batches"],
)
class TestTheModelIsUndisturbed:
    @pytest.fixture
    def ended(self, batches, error):
        """The model, its state before, and its random state before, after calibration has ended in some way."""
        model = Net()
        model.train()
        model.spare.eval()
        before, random = state_of(model), torch.get_rng_state()
        with pytest.raises(error) if error is not None else nullcontext():
            collect_inputs(model, {"rel": model.rel}, batches())
        return model, before, random

    def test_buffers_and_parameters(self, ended):
        model, before, _ = ended
        assert_same_state(model, before)

    def test_training_flags(self, ended):
        model, _, _ = ended
        assert {name for name, part in model.named_modules() if not part.training} == {"spare"}

    def test_random_state(self, ended):
        assert torch.equal(torch.get_rng_state(), ended[2])

    def test_hooks(self, ended):
        assert not ended[0].rel._forward_pre_hooks
        assert not ended[0].rel._forward_pre_hooks_with_kwargs

    def test_gradients_stay_on(self, ended):
        assert torch.is_grad_enabled()


def test_a_buffer_that_forward_replaces_is_put_back():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rel = bilinear(IN1, IN2, OUT)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
            self.count = self.count + 1
            return self.rel(x1, x2)

    model = Counting()
    before = state_of(model)
    collect_inputs(model, {"rel": model.rel}, [pairs(2)])
    assert_same_state(model, before)


def test_the_model_runs_in_eval_mode_without_gradients():
    model = Net().train()
    collect_inputs(model, {"rel": model.rel}, [pairs(2)])
    assert model.modes == [(False, False)]


def test_no_batches_is_an_error():
    with pytest.raises(CompressionError, match="at least one batch"):
        sample(lambda layer, x1, x2: layer(x1, x2), [])


def test_the_failing_batch_is_named_and_described():
    model = Net()
    with pytest.raises(CompressionError, match=r"(?s)batch 1: RuntimeError: no such word.*left: a tensor of shape \(2"):
        collect_inputs(model, {"rel": model.rel}, [pairs(2), FAILING])


def reference(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Second moments and cross moment in float64."""
    first, second = x1.reshape(-1, IN1).double(), x2.reshape(-1, IN2).double()
    return tuple(a.T @ b / len(first) for a, b in ((first, first), (second, second), (first, second)))


def bilinear_call(layer, x1, x2):
    return layer(x1, x2)


class TestMoments:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_of_half_precision_are_summed_in_float64(self, dtype):
        batch = [value.to(dtype) * 100 for value in pairs(50)]
        layer = bilinear(IN1, IN2, OUT, dtype=dtype)
        found = collect_inputs(layer, {"rel": layer}, [tuple(batch)])["rel"]
        for moment, expected in zip(found.fit_moments, reference(*found.fit), strict=True):
            assert moment.dtype == torch.float64
            torch.testing.assert_close(moment, expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("most", [40, 1000])
    def test_for_fitting_leave_out_what_is_held_out(self, most):
        x1, x2 = pairs(200)
        x1[:, 0] = torch.arange(200)
        found = sample(bilinear_call, [(x1, x2)], max_rows=most)
        held, fit = (rows[0][:, 0].long() for rows in (found.held_out, found.fit))
        assert (len(held), len(fit)) == (min(most, 200) // 4, 3 * min(most, 200) // 4)
        assert not set(held.tolist()) & set(fit.tolist())
        for moment, expected in zip(found.fit_moments, reference(x1[fit], x2[fit]), strict=True):
            torch.testing.assert_close(moment, expected, rtol=1e-9, atol=1e-9)

    def test_a_tiny_sample_is_all_held_out_and_fits_nothing(self):
        found = sample(bilinear_call, [pairs(31)])
        assert not found.is_enough
        assert (len(found.fit[0]), len(found.held_out[0])) == (0, 31)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("which", [0, 1])
    def test_inputs_that_are_no_numbers_name_the_layer(self, value, which):
        batch = pairs(40)
        batch[which][3, 2] = value
        with pytest.raises(CompressionError, match=r"reach layer 'rel' should be finite.*in 1 of 40 sampled"):
            sample(bilinear_call, [batch])


class TestLabelledBatches:
    def test_without_forward_fn_the_error_suggests_it(self):
        model = Net()
        with pytest.raises(
            CompressionError, match=r"(?s)pass `forward_fn`.*Found a tuple of .* tensor of shape \(2,\)"
        ):
            collect_inputs(model, {"rel": model.rel}, [(*pairs(2), False, torch.zeros(2))])

    def test_forward_fn_says_what_is_run(self):
        x1, x2 = pairs(40)
        model = Call(bilinear_call)
        run = {"forward_fn": lambda model, batch: model(*batch["inputs"])}
        found = collect_inputs(model, {"rel": model.rel}, [{"inputs": (x1, x2), "label": "yes"}], **run)["rel"]
        assert_same_rows(found, x1, x2)

    def test_a_loss_gives_the_moment_of_its_gradients_and_touches_nothing(self):
        (x1, x2), target = pairs(40), torch.randn(40, OUT, generator=torch.Generator().manual_seed(5))
        model = Call(bilinear_call).train()
        model.rel.weight.grad = torch.ones_like(model.rel.weight)
        before = state_of(model)
        loss = {"loss_fn": lambda model, batch: (model(*batch[:2]) - batch[2]).square().sum()}
        found = collect_inputs(model, {"rel": model.rel}, [(x1, x2, target)], **loss)["rel"]
        with torch.no_grad():
            gradient = 2 * (model.rel(x1, x2) - target).double()
        torch.testing.assert_close(found.gradient, gradient.T @ gradient / 40, rtol=1e-5, atol=1e-6)
        assert torch.equal(model.rel.weight.grad, torch.ones_like(model.rel.weight))
        assert model.rel.bias.grad is None
        assert_same_state(model, before)
        assert model.training
        assert not model.rel._forward_hooks

    @pytest.mark.parametrize("loss", [lambda y: y, lambda y: 3.0, lambda y: y.detach().sum()])
    def test_a_loss_is_a_differentiable_scalar(self, loss):
        model = Call(bilinear_call)
        with pytest.raises(CompressionError, match="`loss_fn` should return a differentiable scalar"):
            collect_inputs(model, {"rel": model.rel}, [pairs(4)], loss_fn=lambda m, batch: loss(m(*batch)))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.rel = nn.Bilinear(4, 4, 2)

    def forward(self, a, b, mask=None):
        return self.rel(a, b)


ROWS, LABELS = torch.ones(5, 4), torch.zeros(5)


@pytest.mark.parametrize(
    ("batch", "example"),
    [
        ({"labels": LABELS, "a": ROWS, "b": ROWS}, "model(a=batch['a'], b=batch['b'])"),
        ([ROWS, ROWS, None, LABELS], "model(batch[0], batch[1])"),
        (((ROWS, ROWS), LABELS), "model(*batch[0])"),
        ([{"a": ROWS, "b": ROWS}, LABELS], "model(**batch[0])"),
        ({"left": ROWS, "right": ROWS, "labels": LABELS}, "model(batch['left'], batch['right'])"),
        (types.SimpleNamespace(labels=LABELS, a=ROWS, b=ROWS), "model(a=batch.a, b=batch.b)"),
    ],
)
def test_a_batch_with_more_than_inputs_is_told_by_a_call_that_works(batch, example):
    model = Pair()
    with pytest.raises(CompressionError) as told:
        collect_inputs(model, {"rel": model.rel}, [batch])
    assert f"`lambda model, batch: {example}` for" in str(told.value)
    forward = eval(f"lambda model, batch: {example}")
    seen = collect_inputs(model, {"rel": model.rel}, [batch], forward_fn=forward)["rel"]
    assert seen.rows_seen == 5


def test_an_argument_that_has_to_be_named_is_so_in_the_example():
    class Named(Pair):
        def forward(self, a, *, b):
            return self.rel(a, b)

    model = Named()
    with pytest.raises(CompressionError, match=r"model\(batch\[0\], b=batch\[1\]\)"):
        collect_inputs(model, {"rel": model.rel}, [(ROWS, ROWS, LABELS)])


class OneArgument(Pair):
    """Takes its two inputs together, as a list, a tuple or a dict."""

    def forward(self, both):
        return self.rel(*(both.pop(key) for key in ("a", "b"))) if isinstance(both, dict) else self.rel(*both)


@pytest.mark.parametrize(
    ("batch", "example"),
    [
        ([ROWS, ROWS], "model(batch)"),
        ((ROWS, ROWS), "model(batch)"),
        ({"a": ROWS, "b": ROWS}, "model(batch)"),
        (([ROWS, ROWS], LABELS), "model(batch[0])"),
        ([{"a": ROWS, "b": ROWS}, LABELS], "model(batch[0])"),
    ],
)
def test_a_batch_that_the_model_takes_as_one_is_given_as_one(batch, example):
    model = OneArgument()
    with pytest.raises(CompressionError) as told:
        collect_inputs(model, {"rel": model.rel}, [batch])
    assert f"`lambda model, batch: {example}` for" in str(told.value)
    forward = eval(f"lambda model, batch: {example}")
    assert collect_inputs(model, {"rel": model.rel}, [batch], forward_fn=forward)["rel"].rows_seen == 5


@pytest.mark.parametrize("wrap", [tuple, list])
@pytest.mark.parametrize("stated", [False, True])
def test_batches_that_the_model_changes_stay_as_they_were(wrap, stated):
    class Changing(Pair):
        def forward(self, given):
            return self.rel(given.pop("a").add_(1), given.pop("b"))

    model, batch = Changing(), {"a": ROWS.clone(), "b": ROWS.clone()}
    run = {"forward_fn": lambda model, batch: model(*batch)} if stated else {}
    seen = collect_inputs(model, {"rel": model.rel}, [wrap([batch])] * 2, **run)["rel"]
    assert seen.rows_seen == 10
    assert torch.equal(batch["a"], ROWS)
    assert list(batch) == ["a", "b"]


def test_one_tensor_given_twice_is_one_for_the_model_too():
    model = Pair()
    assert collect_inputs(model, {"rel": model.rel}, [(ROWS, ROWS)])["rel"].same
    assert not collect_inputs(model, {"rel": model.rel}, [(ROWS, ROWS.clone())])["rel"].same
