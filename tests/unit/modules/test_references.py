import functools

import pytest
import torch
from torch import nn

from compress_bilinear.modules import WeightReads, function_reference, plain_reference


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"rel": nn.Bilinear(3, 3, 2), "other": nn.Linear(2, 2)})

    def forward(self, x, y):
        return self.inner["other"](self.inner["rel"](x, y))


def holding(value):
    """A function that closes over a value."""
    return lambda *args: (value, args)


def with_default(value):
    def function(*args, default=value):
        return default, args

    return function


def wrapped(value):
    @functools.wraps(value if callable(value) else print)
    def function(*args):
        return args

    return function


FUNCTIONS = {
    "closure": holding,
    "closure over a list": lambda value: holding([{"a": (value,)}]),
    "closure over a closure": lambda value: holding(holding(value)),
    "default": with_default,
    "default in place": lambda value: eval("lambda x, held=held: (x, held)", {"held": value}),
    "wraps": wrapped,
    "in a partial": lambda value: functools.partial(print, holding(value)),
    "in a container": lambda value: {"hooks": [holding(value)]},
}


class TestFunctionsThatHoldTheModel:
    @pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
    @pytest.mark.parametrize("target", ["", "inner", "inner.rel"])
    def test_they_are_found_wherever_they_are(self, make, target):
        net = Net()
        net.inner.helper = make(net.get_submodule(target))
        assert function_reference(net, ["inner.rel"]) == "the attribute 'inner.helper'"

    def test_a_method_of_the_model_in_a_closure_is_found(self):
        net = Net()
        net.forward = holding(net.forward)
        assert function_reference(net, ["inner.rel"]) == "the attribute 'forward'"

    def test_hooks_that_hold_the_model_are_found(self):
        net = Net()
        net.inner["other"].register_forward_hook(holding(net))
        assert function_reference(net, ["inner.rel"]) == "the attribute 'inner.other._forward_hooks'"

    @pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
    def test_functions_of_other_modules_do_no_harm(self, make):
        net = Net()
        net.helper = make(net.inner["other"])
        assert function_reference(net, ["inner.rel"]) is None

    def test_what_a_copy_copies_does_no_harm(self):
        net = Net()
        net.parts = [net.inner, functools.partial(print, net), net.forward, {"net": net}]
        assert function_reference(net, ["inner.rel"]) is None

    def test_a_closure_whose_value_is_not_set_yet_does_no_harm(self):
        net = Net()

        def outer():
            def inner():
                return later

            net.helper = inner
            if net is None:
                later = 1

        outer()
        assert function_reference(net, ["inner.rel"]) is None


@pytest.mark.parametrize("make", [*FUNCTIONS.values(), lambda value: [value], lambda value: value.forward])
def test_whatever_holds_the_layer_itself_is_found(make):
    net = Net()
    net.helper = make(net.inner["rel"])
    assert plain_reference(net, net.inner["rel"]) == "the attribute 'helper'"
    assert plain_reference(net, net.inner["other"]) is None


USES = {
    "product": lambda layer: layer.weight @ torch.ones(3, 1),
    "turned": lambda layer: layer.weight.mT,
    "data": lambda layer: layer.weight.data,
    "in a list": lambda layer: torch.cat([layer.weight, layer.weight]),
    "by keyword": lambda layer: torch.sum(input=layer.weight),
    "as its function": lambda layer: nn.functional.bilinear(torch.ones(1, 3), torch.ones(1, 3), layer.weight),
}
QUESTIONS = {
    "dtype": lambda layer: layer.weight.dtype,
    "shape": lambda layer: layer.weight.shape[0] + layer.weight.size(1) + layer.weight.dim(),
    "device": lambda layer: torch.zeros(2, device=layer.weight.device, dtype=layer.weight.dtype),
}


class TestReadsOfAWeight:
    def reads(self, use):
        class Reading(Net):
            def forward(self, x, y):
                use(self.inner["rel"])
                return super().forward(x, y)

        net = Reading()
        with WeightReads(net, [net.inner["rel"]]) as reads:
            net(torch.ones(4, 3), torch.ones(4, 3))
        assert not net._forward_hooks
        assert not net.inner["rel"]._forward_hooks
        return reads.found, id(net.inner["rel"].weight)

    @pytest.mark.parametrize("use", USES.values(), ids=USES)
    def test_a_use_of_its_values_is_found(self, use):
        found, weight = self.reads(use)
        assert list(found) == [weight]

    @pytest.mark.parametrize("use", [*QUESTIONS.values(), lambda layer: None], ids=[*QUESTIONS, "nothing"])
    def test_questions_and_the_own_forward_are_none(self, use):
        assert self.reads(use)[0] == {}

    def test_reads_outside_the_model_are_none(self):
        net = Net()
        with WeightReads(net, [net.inner["rel"]]) as reads:
            net.inner["rel"].weight.sum()
        assert reads.found == {}

    def test_a_forward_that_fails_leaves_it_able_to_go_on(self):
        net = Net()
        with WeightReads(net, [net.inner["rel"]]) as reads:
            with pytest.raises(RuntimeError):
                net(torch.ones(4, 5), torch.ones(4, 3))
            net.inner["rel"].weight.sum()
            net(torch.ones(4, 3), torch.ones(4, 3))
        assert reads.found == {}
