import copy
import functools
import types
import weakref
from collections import deque

import pytest
import torch
from torch import nn

from compress_bilinear.modules import WeightReads, reference


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


def reading(names):
    """A function that reads a global by another function."""
    exec("def inner():\n    return held\ndef outer():\n    return inner()", names)
    return names["outer"]


def of_the_original(net):
    """The attribute by which a copy has the original's modules."""
    return reference(copy.deepcopy(net), {id(part) for part in (net, net.inner, net.inner["rel"])})


FUNCTIONS = {
    "closure": holding,
    "closure over a list": lambda value: holding([{"a": (value,)}]),
    "closure over a closure": lambda value: holding(holding(value)),
    "default": with_default,
    "default in place": lambda value: eval("lambda x, held=held: (x, held)", {"held": value}),
    "wraps": wrapped,
    "in a partial": lambda value: functools.partial(print, holding(value)),
    "in a container": lambda value: {"hooks": [holding(value)]},
    "in an object": lambda value: types.SimpleNamespace(hook=holding(value)),
    "cached": lambda value: functools.lru_cache(holding(value)),
    "global": lambda value: eval("lambda x: (lambda: held(x))", {"held": value if callable(value) else print}),
    "global of a global": lambda value: reading({"held": value}),
    "weak": lambda value: weakref.ref(value.__self__ if hasattr(value, "__self__") else value),
}


class Slots:
    __slots__ = ("held",)

    def __init__(self, held):
        self.held = held


HOLDERS = {
    "list": lambda value: [value],
    "method": lambda value: value.forward,
    "object": Slots,
    "namespace": lambda value: types.SimpleNamespace(inside=[value]),
    "queue": lambda value: deque([value]),
    "module in a list": lambda value: [nn.Sequential(value)],
}


class TestFunctionsThatHoldTheModel:
    @pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
    @pytest.mark.parametrize("target", ["", "inner", "inner.rel"])
    def test_they_are_found_wherever_they_are(self, make, target):
        net = Net()
        net.inner.helper = make(net.get_submodule(target))
        assert of_the_original(net) == "the attribute 'inner.helper'"

    def test_a_method_of_the_model_in_a_closure_is_found(self):
        net = Net()
        net.forward = holding(net.forward)
        assert of_the_original(net) == "the attribute 'forward'"

    def test_hooks_that_hold_the_model_are_found(self):
        net = Net()
        net.inner["other"].register_forward_hook(holding(net))
        assert of_the_original(net) == "the attribute 'inner.other._forward_hooks'"

    @pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)
    def test_functions_of_other_modules_do_no_harm(self, make):
        net = Net()
        net.helper = make(net.inner["other"])
        assert of_the_original(net) is None

    @pytest.mark.parametrize("make", HOLDERS.values(), ids=HOLDERS)
    def test_what_a_copy_copies_does_no_harm(self, make):
        net = Net()
        net.helper = make(net.inner["rel"])
        net.parts = [net.inner, functools.partial(print, net), net.forward, {"net": net}]
        assert of_the_original(net) is None

    def test_what_its_class_holds_is_found_but_for_what_makes_it(self):
        layer = nn.Bilinear(3, 3, 2)

        class Closing(Net):
            def __init__(self):
                super().__init__()
                self.inner["rel"] = layer

        assert of_the_original(Closing()) is None

        class Calling(Closing):
            def forward(self, x, y):
                return layer(x, y)

        assert of_the_original(Calling()) == "the attribute 'forward'"
        Closing.instances = [layer]
        assert of_the_original(Closing()) is None
        Closing.shared = layer
        assert of_the_original(Closing()) == "the attribute 'shared'"

    def test_a_closure_whose_value_is_not_set_yet_does_no_harm(self):
        net = Net()

        def outer():
            def inner():
                return later

            net.helper = inner
            if net is None:
                later = 1

        outer()
        assert of_the_original(net) is None


@pytest.mark.parametrize("make", [*FUNCTIONS.values(), *HOLDERS.values()], ids=[*FUNCTIONS, *HOLDERS])
def test_whatever_holds_the_layer_itself_is_found(make):
    net = Net()
    net.helper = make(net.inner["rel"])
    assert reference(net, {id(net.inner["rel"])}) == "the attribute 'helper'"
    assert reference(net, {id(net.inner["other"])}) is None


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
