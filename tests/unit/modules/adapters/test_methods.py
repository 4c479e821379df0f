"""Adapters of another method than `forward`: what a link predictor or a discriminator scores with."""

import pickle

import pytest
import torch
from torch import nn

import compress_bilinear as cb

SMALL = cb.TuckerConfig(rank=(6, 6, 4))
FAST = {"measure_latency": False}


class LinkPredictor(nn.Module):
    """hᵀ W_r t: the scores of triples and of broken ones, as networks of knowledge graphs give them."""

    def __init__(self, entities=30, relations=5, size=8):
        super().__init__()
        self.size = size
        self.entities = nn.Embedding(entities, size)
        self.matrices = nn.Embedding(relations, size * size)

    def forward(self, heads, tails, relations, wrong):
        return self.scoring_function(heads, tails, relations), self.scoring_function(heads, wrong, r_idx=relations)

    def scoring_function(self, h_idx, t_idx, r_idx):
        h, t = (nn.functional.normalize(self.entities(index), dim=-1) for index in (h_idx, t_idx))
        return (h.unsqueeze(1) @ self.matrices(r_idx).view(-1, self.size, self.size) @ t.unsqueeze(2)).flatten()

    def embeddings(self):
        return self.entities.weight, self.matrices.weight

    def normalised(self):
        return nn.functional.normalize(self.entities.weight, dim=-1)


class Infomax(nn.Module):
    """A discriminator between rows and one summary of all."""

    def __init__(self, size=12):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))

    def discriminate(self, z, summary, sigmoid=True):
        value = z @ (self.weight @ summary)
        return value.sigmoid() if sigmoid else value

    def forward(self, z):
        summary = z.mean(0).tanh()
        return self.discriminate(z, summary), self.discriminate(z.flip(0), summary, sigmoid=False)


def score(module, layer, h_idx, t_idx, r_idx):
    normalised = module.normalised()
    return (layer.indexed(normalised[h_idx], r_idx) * normalised[t_idx]).sum(-1)


def discriminate(module, layer, z, summary, sigmoid=True):
    value = layer(z, summary.expand(len(z), -1)).squeeze(-1)
    return value.sigmoid() if sigmoid else value


def register(**changes):
    stated = {
        "to_weight": lambda m: m.matrices.weight.view(-1, m.size, m.size).permute(2, 1, 0),
        "call": score,
        "method": "scoring_function",
    }
    cb.register_adapter(LinkPredictor, **stated | changes)


def network():
    torch.manual_seed(0)
    return nn.ModuleDict({"kge": LinkPredictor()}).eval()


BATCH = tuple(torch.arange(20) * k % size for k, size in ((1, 30), (7, 30), (3, 5), (11, 30)))
OPTIONS = {"calibration": [BATCH], "forward_fn": lambda model, batch: model["kge"](*batch)}


@pytest.mark.parametrize("inplace", [False, True])
def test_the_method_runs_the_replacement_and_all_others_stay(inplace, tmp_path):
    register()
    model, exact = network(), network()["kge"]
    small, report = cb.compress(model, SMALL, inplace=inplace, force=True, **OPTIONS)
    (layer,) = report.layers
    assert (layer.decision, layer.form, layer.batch_size) == ("replaced", "LinkPredictor", 20)
    assert layer.calibration_rows > 0
    kge = small["kge"]
    assert isinstance(kge, LinkPredictor)
    assert kge.size == 8
    assert "matrices" not in dict(kge.named_children())
    assert torch.equal(kge.normalised(), exact.normalised())
    with torch.no_grad():
        for one, other in zip(kge(*BATCH), exact(*BATCH), strict=True):
            assert 0 < float((one - other).norm() / other.norm()) < 0.8
        assert torch.equal(kge(*BATCH)[0], score(kge, kge.compressed, *BATCH[:3]))
        cb.save(small, tmp_path / "kge.safetensors")
        for again in (cb.load(tmp_path / "kge.safetensors", network()), pickle.loads(pickle.dumps(small))):
            assert torch.equal(again["kge"](*BATCH)[1], kge(*BATCH)[1])


def test_a_method_that_reads_the_weight_says_where_it_is():
    register()
    small, _ = cb.compress(network(), SMALL, force=True, **FAST | OPTIONS)
    with pytest.raises(AttributeError, match=r"'matrices'.*'scoring_function' alone.*register that one by `method=`"):
        small["kge"].embeddings()


class Queries(LinkPredictor):
    """Whose methods that read the weight have one in common."""

    def queries(self, h_idx, r_idx):
        matrices = self.matrices(r_idx).view(-1, self.size, self.size)
        return (self.normalised()[h_idx].unsqueeze(1) @ matrices).squeeze(1)

    def scoring_function(self, h_idx, t_idx, r_idx):
        return (self.queries(h_idx, r_idx) * self.normalised()[t_idx]).sum(-1)

    def inference_scoring_function(self, h_idx, r_idx):
        return self.queries(h_idx, r_idx) @ self.normalised().T


def test_several_methods_run_the_replacement_through_one_that_they_call():
    cb.register_adapter(
        Queries,
        to_weight=lambda m: m.matrices.weight.view(-1, m.size, m.size).permute(2, 1, 0),
        call=lambda m, layer, h_idx, r_idx: layer.indexed(m.normalised()[h_idx], r_idx),
        method="queries",
    )
    torch.manual_seed(0)
    model = Queries().eval()
    small, report = cb.compress(model, cb.DenseConfig(quantize="int8"), calibration=[BATCH], force=True, **FAST)
    assert report.layers[0].decision == "replaced", report.layers[0].reason
    with torch.no_grad():
        for method, arguments in (("__call__", BATCH), ("inference_scoring_function", (BATCH[0], BATCH[2]))):
            exact, found = getattr(model, method)(*arguments), getattr(small, method)(*arguments)
            torch.testing.assert_close(found, exact, rtol=0, atol=0.02 * float(exact[0].abs().max()))


def test_without_calibration_the_example_is_of_the_method():
    register(example=lambda m: {"h_idx": BATCH[0], "t_idx": BATCH[1], "r_idx": BATCH[2]})
    _, report = cb.compress(network(), SMALL, force=True, **FAST)
    assert report.layers[0].decision == "replaced", report.layers[0].reason


def test_a_discriminator_is_exact_to_rounding():
    cb.register_adapter(Infomax, to_weight=lambda m: m.weight[None], call=discriminate, method="discriminate")
    torch.manual_seed(0)
    model, batch = Infomax().double().eval(), torch.randn(7, 12, dtype=torch.float64)
    small, report = cb.compress(model, cb.DenseConfig(), calibration=[batch], force=True, **FAST)
    assert report.layers[0].decision == "replaced", report.layers[0].reason
    for one, other in zip(small(batch), model(batch), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_wrong_call_of_the_method_is_told():
    register(call=lambda *args, **names: 2 * score(*args, **names))
    _, report = cb.compress(network(), SMALL, force=True, **FAST | OPTIONS)
    assert "is not its own scoring_function: in float64 they differ by 1 of" in report.layers[0].reason


def test_a_method_that_was_replaced_on_the_instance_is_left_alone():
    register()
    model = network()
    model["kge"].scoring_function = lambda h_idx, t_idx, r_idx: h_idx * 1.0
    _, report = cb.compress(model, SMALL, force=True, **FAST | OPTIONS)
    assert "its scoring_function was replaced on the instance" in report.layers[0].reason


def test_the_model_is_as_before_where_calibration_fails():
    register()
    model = network()
    with pytest.raises(cb.CompressionError, match="failed on calibration batch 0"):
        cb.plan(model, SMALL, calibration=[BATCH[:2]], forward_fn=OPTIONS["forward_fn"])
    assert "scoring_function" not in vars(model["kge"])


@pytest.mark.parametrize("method", ["score", "size", "", 3])
def test_a_method_that_the_class_does_not_have_is_an_error(method):
    with pytest.raises(cb.CompressionError, match="`method` should be the name of a function of LinkPredictor"):
        register(method=method)
