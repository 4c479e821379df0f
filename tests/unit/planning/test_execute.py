import functools

import pytest
import torch
from support import assert_same_state, state_of
from torch import nn

import compress_bilinear as cb
from compress_bilinear.errors import CompressionError

QUIET = {"measure_latency": False, "progress": False}
CP = cb.CPConfig(rank=2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rel, self.head = nn.Bilinear(12, 12, 6), nn.Linear(6, 3)

    def forward(self, x, y):
        return self.head(self.rel(x, y))


def batches(count=8):
    return [(torch.randn(16, 12), torch.randn(16, 12)) for _ in range(count)]


def replaced_forward(make):
    net = Net()
    net.forward = make(net.forward)
    return net


WRAPPERS = {
    "lambda": lambda forward: lambda *args: forward(*args),
    "decorated": lambda forward: functools.wraps(forward)(lambda *args: forward(*args)),
    "autocast": lambda forward: torch.autocast("cpu", enabled=False)(forward),
    "no_grad": lambda forward: torch.no_grad()(forward),
}


class TestForwardsOnTheInstance:
    @pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)
    def test_a_copy_that_would_run_the_original_is_refused(self, make):
        net = replaced_forward(make)
        before = state_of(net)
        with pytest.raises(CompressionError, match=r"the attribute 'forward', which in the copy .* Use `inplace=True`"):
            cb.compress(net, CP, force=True, **QUIET)
        assert_same_state(net, before)

    @pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)
    def test_in_place_it_runs_the_replacement(self, make):
        net, pair = replaced_forward(make), batches(1)[0]
        with torch.no_grad():
            before = net(*pair)
            small, _ = cb.compress(net, CP, calibration=batches(), force=True, inplace=True, **QUIET)
            assert small is net
            assert not torch.allclose(small(*pair), before, atol=1e-3)

    def test_a_partial_and_a_method_are_copied_with_the_model(self):
        net, pair = Net(), batches(1)[0]
        net.forward = functools.partial(Net.forward, net)
        net.alias = net.forward.func.__get__(net)
        small, _ = cb.compress(net, CP, calibration=batches(), force=True, **QUIET)
        with torch.no_grad():
            assert not torch.allclose(small(*pair), net(*pair), atol=1e-3)
            torch.testing.assert_close(small(*pair), small.alias(*pair))


ELSEWHERE = {}


class TestCallsOfReplacements:
    def hidden(self):
        net = Net()
        ELSEWHERE["rel"] = net.rel  # nothing in the model refers to it
        net.forward = functools.partial(lambda self, x, y: self.head(ELSEWHERE["rel"](x, y)), net)
        return net

    @pytest.mark.parametrize("inplace", [False, True])
    def test_a_model_that_does_not_call_its_replacement_is_refused(self, inplace):
        net = self.hidden()
        before, parts = state_of(net), list(net.modules())
        with pytest.raises(CompressionError, match=r"call its replacements.* does not call \['rel'\]"):
            cb.compress(net, CP, calibration=batches(), force=True, inplace=inplace, **QUIET)
        assert_same_state(net, before)
        assert list(net.modules()) == parts

    @pytest.mark.parametrize("inplace", [False, True])
    def test_a_compressed_model_that_fails_is_refused(self, inplace):
        class Asking(Net):
            def forward(self, x, y):
                return super().forward(x, y) if type(self.rel) is nn.Bilinear else self.rel.nothing

        net = Asking()
        parts = list(net.modules())
        with pytest.raises(CompressionError, match=r"fails on the first calibration batch .*'nothing'"):
            cb.compress(net, CP, calibration=batches(), force=True, inplace=inplace, **QUIET)
        assert list(net.modules()) == parts

    def test_a_layer_that_calibration_did_not_reach_is_not_asked_for(self):
        class Sometimes(Net):
            def forward(self, x, y):
                return super().forward(x, y) if len(x) > 16 else x

        small, report = cb.compress(Sometimes(), CP, calibration=batches(), force=True, **QUIET)
        assert type(small.rel) is cb.CPBilinear
        assert report.layers[0].has("unreached")

    def test_batches_that_the_model_uses_up_are_no_reason_against(self):
        class Popping(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = Net()

            def forward(self, parts):
                return self.net(parts.pop(), parts.pop())

        small, _ = cb.compress(Popping(), CP, calibration=[([x, y],) for x, y in batches()], force=True, **QUIET)
        assert type(small.net.rel) is cb.CPBilinear

    def test_flags_buffers_and_random_state_stay(self):
        net = nn.Sequential()
        net.net, net.drop = Net(), nn.Dropout()
        net.forward = functools.partial(lambda self, x, y: self.drop(self.net(x, y)), net)
        net.train()
        torch.manual_seed(3)
        expected = torch.rand(1)
        data = batches()
        torch.manual_seed(3)
        small, _ = cb.compress(net, CP, calibration=data, force=True, **QUIET)
        assert torch.equal(torch.rand(1), expected)
        assert small.training
        assert small.net.rel.training


class Scorer(nn.Module):
    def __init__(self):
        super().__init__()
        self.rel = nn.Bilinear(12, 12, 1)

    def forward(self, h):
        return (h @ self.rel.weight.squeeze(0)) @ h.mT + self.rel.bias


@pytest.mark.parametrize("config", [CP, cb.DenseConfig(quantize="int8"), cb.AutoConfig(size=0.5)], ids=str)
def test_a_layer_whose_weight_is_read_is_kept(config):
    net = Scorer()
    small, report = cb.compress(net, config, calibration=[torch.randn(9, 12) for _ in range(4)], force=True, **QUIET)
    layer = report.layers[0]
    assert layer.decision == "kept"
    assert layer.has("weight_read")
    assert "read outside its own forward (squeeze)" in layer.reason
    assert layer.speedup is None
    torch.testing.assert_close(small(torch.ones(2, 12)), net(torch.ones(2, 12)))


def test_no_speed_is_told_of_a_layer_that_was_never_called():
    class Unused(Net):
        def forward(self, x, y):
            return self.head(x[:, :6] * y[:, :6])

    report = cb.plan(Unused(), cb.DenseConfig(quantize="int8"), calibration=batches(), progress=False).report
    layer = report.layers[0]
    assert layer.has("unreached")
    assert not layer.has("not_timed")
    assert layer.latency_after_ms is None
    assert layer.speedup is None


def test_one_tensor_as_both_inputs_is_fitted_by_the_symmetric_part():
    class Square(nn.Module):
        def __init__(self, same=True):
            super().__init__()
            self.same, self.rel = same, nn.Bilinear(12, 12, 6, bias=False)

        def forward(self, x):
            return self.rel(x, x if self.same else x.clone())

    torch.manual_seed(0)
    vectors, outs, noise = torch.randn(3, 12), torch.randn(6, 3), torch.randn(6, 12, 12)
    data = [torch.randn(32, 12) for _ in range(12)]
    errors = []
    for same in (True, False):
        net = Square(same)
        net.rel.weight.data = torch.einsum("or,ri,rj->oij", outs, vectors, vectors) + 3 * (noise - noise.mT)
        layer = cb.compress(net, cb.CPConfig(rank=3), calibration=data, **QUIET)[1].layers[0]
        assert layer.has("symmetric") is same
        errors.append(layer.output_error)
    assert errors[0] < 1e-4 < errors[1]
    exact = cb.compress(Square(), cb.DenseConfig(quantize="bf16"), calibration=data, **QUIET)[1].layers[0]
    assert not exact.has("symmetric")  # the weight itself is stored


@pytest.mark.parametrize("shape", [(1, 6, 4), (6, 1, 4), (6, 4, 1)], ids=str)
def test_a_transposed_weight_with_a_size_of_1_is_replaced_and_a_change_of_it_noticed(shape):
    in1, in2, out = shape
    layer = nn.Bilinear(in1, in2, out)
    layer.weight = nn.Parameter(layer.weight.detach().mT.contiguous().mT)
    config = cb.DenseConfig(quantize="int8")
    assert cb.plan(layer, config, force=True, **QUIET).apply()[0].quantize == "int8"
    plan = cb.plan(layer, config, force=True, **QUIET)
    with torch.no_grad():
        layer.weight[-1, -1, -1] += 1e-3
    with pytest.raises(CompressionError, match="changed"):
        plan.apply()
