"""A file and a network fit each other whatever wraps one of them."""

import pytest
import torch
from support import assert_same_state
from torch import nn
from torch.nn.parallel import DataParallel

import compress_bilinear as cb
from compress_bilinear.errors import CheckpointError, CompressionError
from compress_bilinear.files import written
from compress_bilinear.planning import choose_weights, compress_state

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = nn.ModuleDict({"rel": nn.Bilinear(7, 6, 5)})
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x, y):
        return self.pair["rel"](x, y)


class Holder(nn.Module):
    def __init__(self, name, inner):
        super().__init__()
        self.add_module(name, inner)

    def forward(self, *args):
        return next(self.children())(*args)


WRAPPERS = {
    "none": lambda net: net,
    "module": lambda net: Holder("module", net),
    "_orig_mod": lambda net: Holder("_orig_mod", net),
    "two": lambda net: Holder("model", Holder("net", net)),
}


def compressed(net):
    config = cb.CPConfig(rank=3, quantize="int8")
    return cb.compress(net, config, force=True, progress=False, measure_latency=False)[0]


@pytest.mark.parametrize("small", [True, False], ids=["with replaced layers", "without"])
@pytest.mark.parametrize("there", WRAPPERS)
@pytest.mark.parametrize("here", WRAPPERS)
def test_wrappers_are_no_difference(there, here, small, tmp_path):
    net = compressed(Net()) if small else Net()
    cb.save(WRAPPERS[there](net), tmp_path / "net.safetensors")
    loaded = cb.load(tmp_path / "net.safetensors", WRAPPERS[here](Net()))
    assert_same_state(loaded, WRAPPERS[here](net).state_dict())


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_parts_that_others_wrap_are_no_difference(name, tmp_path):
    plain = compressed(Net())
    state, around = dict(plain.state_dict()), compressed(Net())
    around.pair = Holder(name, plain.pair)
    around.load_state_dict({key.replace("pair.", f"pair.{name}."): value for key, value in state.items()})
    cb.save(around, tmp_path / "parts.safetensors")
    assert_same_state(cb.load(tmp_path / "parts.safetensors", Net()), state)


@pytest.mark.parametrize("small", [True, False], ids=["with replaced layers", "without"])
def test_compiled_parts_of_a_network_are_no_difference(small, tmp_path):
    def parts(net):
        net.pair = torch.compile(net.pair)
        return net

    plain = compressed(Net()) if small else Net()
    state = dict(plain.state_dict())
    cb.save(plain, tmp_path / "plain.safetensors")
    loaded = cb.load(tmp_path / "plain.safetensors", parts(Net()))
    assert_same_state(loaded, {name.replace("pair.", "pair._orig_mod."): value for name, value in state.items()})
    cb.save(loaded, tmp_path / "parts.safetensors")
    assert_same_state(cb.load(tmp_path / "parts.safetensors", Net()), state)
    assert_same_state(cb.load(tmp_path / "parts.safetensors", parts(Net())), loaded.state_dict())


@pytest.mark.parametrize("whole", [True, False], ids=["the network", "a part"])
def test_a_layer_that_is_compiled_by_itself_is_refused(whole, tmp_path):
    """What calls it would go on calling the layer that was there."""
    layer = nn.Bilinear(7, 6, 5)
    net = layer if whole else nn.ModuleDict({"rel": layer})
    cb.save(compressed(net), tmp_path / "net.safetensors")
    fresh = torch.compile(nn.Bilinear(7, 6, 5)) if whole else nn.ModuleDict({"rel": torch.compile(layer)})
    with pytest.raises(CheckpointError, match="OptimizedModule"):
        cb.load(tmp_path / "net.safetensors", fresh)


def test_a_layer_that_was_compiled_by_itself_in_both_is_refused(tmp_path):
    def net():
        return nn.ModuleDict({"rel": torch.compile(nn.Bilinear(7, 6, 5))})

    by_the_state_alone(net(), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match="compile it once it is loaded"):
        cb.load(tmp_path / "net.safetensors", net())


def test_names_that_the_network_has_are_its_own(tmp_path):
    def net():
        return nn.ModuleDict({"rel": nn.Bilinear(7, 6, 5), "module": nn.ModuleDict({"rel": nn.Bilinear(7, 6, 5)})})

    small = compressed(net())
    cb.save(small, tmp_path / "net.safetensors")
    assert_same_state(cb.load(tmp_path / "net.safetensors", net()), small.state_dict())
    with pytest.raises(CheckpointError):
        cb.load(tmp_path / "net.safetensors", nn.ModuleDict({"rel": nn.Bilinear(7, 6, 5)}))


@pytest.mark.parametrize("wrap", [DataParallel, torch.compile, lambda net: torch.compile(DataParallel(net))])
def test_wrapped_networks_are_saved_without_the_wrapper(wrap, tmp_path):
    small = compressed(Net())
    cb.save(wrap(small), tmp_path / "net.safetensors")
    assert_same_state(cb.load(tmp_path / "net.safetensors", Net()), small.state_dict())


def test_a_network_with_more_than_a_wrapper_has_is_saved_whole(tmp_path):
    net = compressed(Holder("_orig_mod", Net()))
    net.head = nn.Linear(2, 2)
    cb.save(net, tmp_path / "net.safetensors")
    fresh = Holder("_orig_mod", Net())
    fresh.head = nn.Linear(2, 2)
    assert_same_state(cb.load(tmp_path / "net.safetensors", fresh), net.state_dict())


def test_a_part_of_a_larger_state_is_refused_with_the_way_out(tmp_path):
    cb.save(compressed(nn.ModuleDict({"net": Net(), "loss": nn.Linear(2, 2)})), tmp_path / "task.safetensors")
    with pytest.raises(CheckpointError, match=r"Found no such layer: .* the part of it that --key chooses"):
        cb.load(tmp_path / "task.safetensors", Net())


def test_a_layer_that_is_loaded_in_inference_mode_can_be_trained(tmp_path):
    cb.save(compressed(Net()), tmp_path / "net.safetensors")
    net = Net()
    with torch.inference_mode():
        cb.load(tmp_path / "net.safetensors", net)
    net(torch.ones(2, 7), torch.ones(2, 6)).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()


def test_a_layer_that_a_list_holds_too_is_not_loaded_beside_it(tmp_path):
    net = Net()
    net.parts = [net.pair["rel"]]
    small = compressed(net)
    assert small.parts[0] is small.pair["rel"]
    cb.save(small, tmp_path / "net.safetensors")
    fresh = Net()
    fresh.parts = [fresh.pair["rel"]]
    before = fresh.pair["rel"]
    with pytest.raises(CompressionError, match=r"registered submodules alone. Found the attribute 'parts' with one"):
        cb.load(tmp_path / "net.safetensors", fresh)
    assert fresh.pair["rel"] is before
    with pytest.raises(CompressionError, match="Found the attribute 'parts' with one"):
        cb.dequantize(small)


def test_another_network_is_refused_as_before(tmp_path):
    cb.save(compressed(Holder("module", Net())), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"Layer 'module.pair.rel' should be an nn.Bilinear"):
        cb.load(tmp_path / "net.safetensors", nn.ModuleDict({"other": nn.Bilinear(7, 6, 5)}))


class Biaffine(nn.Module):
    """Its weight is a three-dimensional parameter named weight, as an nn.Bilinear's."""

    def __init__(self, equation="bxi,oij,byj->boxy", shape=(5, 7, 7)):
        super().__init__()
        self.equation, self.weight = equation, nn.Parameter(torch.randn(shape))

    def forward(self, x, y):
        x, y = (torch.cat([value, torch.ones_like(value[..., :1])], -1) for value in (x, y))
        return torch.einsum(self.equation, x, self.weight, y)


def by_the_state_alone(net, path):
    state = net.state_dict()
    config = cb.DenseConfig(quantize="int8")
    _, new, described = compress_state(
        state, choose_weights(state, ["*"]), config, measure_latency=False, progress=False
    )
    with written(new, described, path):
        pass


def test_a_shared_layer_may_have_one_of_its_names(tmp_path):
    """As transformers writes it, whose file the command line then compressed."""
    net = nn.ModuleDict({"one": nn.Bilinear(7, 6, 5)})
    by_the_state_alone(net, tmp_path / "net.safetensors")
    fresh = nn.ModuleDict({"one": nn.Bilinear(7, 6, 5)})
    fresh["other"] = fresh["one"]
    loaded = cb.load(tmp_path / "net.safetensors", fresh)
    assert loaded["other"] is loaded["one"]
    assert isinstance(loaded["one"], cb.DenseBilinear)


def test_a_weight_of_a_known_form_that_was_taken_for_a_bilinear_loads(tmp_path):
    net = nn.ModuleDict({"label": Biaffine()})
    by_the_state_alone(net, tmp_path / "net.safetensors")
    loaded = cb.load(tmp_path / "net.safetensors", nn.ModuleDict({"label": Biaffine()}))
    x, y = torch.randn(2, 3, 6), torch.randn(2, 4, 6)
    with torch.no_grad():
        expected = net["label"](x, y)
        assert float((loaded["label"](x, y) - expected).norm()) < 0.02 * float(expected.norm())
    cb.save(loaded, tmp_path / "again.safetensors")
    again = cb.load(tmp_path / "again.safetensors", nn.ModuleDict({"label": Biaffine()}))
    assert torch.equal(again["label"](x, y), loaded["label"](x, y))


def test_one_whose_axes_have_another_order_is_refused(tmp_path):
    def net():
        return nn.ModuleDict({"label": Biaffine("bxi,ijo,byj->boxy", (7, 7, 5))})

    by_the_state_alone(net(), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"should be an nn.Bilinear of a freshly built original network"):
        cb.load(tmp_path / "net.safetensors", net())
