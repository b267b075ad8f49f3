"""Fixed features: one function of each sample, whatever is beside it; else nothing is cached."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import twophase_ext as tp
from helpers import Given, bits, quiet, same_bits, toy_convnet, toy_data, toy_images, toy_mlp
from interrupts import End
from twophase_ext.model.network import Network
from twophase_ext.training.data.samples import Samples
from twophase_ext.training.features import agreement as fixed

pytestmark = pytest.mark.filterwarnings("ignore:nothing is cached")


def net(between):
    """`between` stands behind the first hidden layer: (module, h) -> h."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Given(
            lambda m, x: m.c(torch.tanh(m.b(between(m, m.a(x))))),
            a=nn.Linear(5, 16),
            b=nn.Linear(16, 64),
            c=nn.Linear(64, 3),
        )


def noise(m, h):
    return h + torch.randn_like(h)


KINDS = {
    "batch statistics": lambda m, h: F.batch_norm(h, None, None, training=True),
    "normalised over the batch": lambda m, h: h - h.mean(0),
    "always random": lambda m, h: F.dropout(h, 0.5, training=True),
    "random behind a fixed seed": lambda m, h: (torch.manual_seed(1), noise(m, h))[1],
    "by position": lambda m, h: h * torch.linspace(1, 2, len(h), device=h.device)[:, None],
    "by batch size": lambda m, h: h if len(h) > 7 else 2 * h,
    "neighbours": lambda m, h: h + h.roll(1, 0),
}


def features_premise(result):
    return next(row[1:] for row in result.guarantee.premises if row[0] == "fixed features")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", ["gd", "base", "sgd"])
def test_functions_of_the_whole_batch(kind, phase):
    model, data = net(KINDS[kind]), toy_data(12)
    result = quiet(model, batch_size=4, second_phase=phase).fit(data)
    status, evidence = features_premise(result)
    assert status == "failed" and "another batch: apart by" in evidence
    assert result.status == "completed" and result.feature_cache == "none"
    assert not result.guarantee.curve


def test_the_lazy_phase_says_so():
    model = net(KINDS["batch statistics"])
    result = quiet(model, second_phase="lazy", verify="svd", batch_size=4).fit(toy_data(12))
    assert features_premise(result)[0] == "failed" and result.guarantee.bound is None


def only(sizes):
    """h is the same function but for batches of these sizes."""
    return lambda m, h: h * 0.5 if len(h) in sizes else h


def zero_head(model):
    nn.init.zeros_(model.c.weight)
    nn.init.zeros_(model.c.bias)
    return model


def test_a_last_layer_of_zeros_hides_nothing():
    data = toy_data(12)
    for kind in ("normalised over the batch", "always random", "by position"):
        with pytest.raises(ValueError, match="model: its features are not fixed"):
            tp.FeatureCache(zero_head(net(KINDS[kind])).eval(), data)
    assert tp.FeatureCache(zero_head(net(lambda m, h: h)).eval(), data).mode == "hidden"
    other = zero_head(net(lambda m, h: h * 0.5 if torch.compiler.is_compiling() else h))
    settings = {"batch_size": 4, "second_phase": "gd"}
    result = quiet(torch.compile(other, backend="eager"), **settings).fit(data)
    assert features_premise(result)[0] == "failed"
    other = zero_head(net(lambda m, h: h * 0.5 if torch.compiler.is_compiling() else h))
    other.compile(backend="eager")
    assert features_premise(quiet(other, **settings).fit(data))[0] == "failed"


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_gates_that_open_in_the_first_phase(cache):
    """ReZero: at the start the branch is not there."""
    model = net(lambda m, h: h + m.gate * (h - h.mean(0)))
    model.gate = nn.Parameter(torch.zeros(()))

    class Open(tp.Callback):
        def on_epoch_end(self, run, record):
            if record["epoch"] == 0:
                with torch.no_grad():
                    model.gate.fill_(0.5)

    settings = {"feature_cache": cache, "batch_size": 4, "second_phase": "gd"}
    result = quiet(model, callbacks=[Open()], **settings).fit(toy_data(12))
    status, evidence = features_premise(result)
    assert status == "failed" and "another batch: apart by" in evidence
    assert not result.guarantee.curve


OF_SIZES = {  # n, batch_size, accumulate, size
    "the last batch": (11, 4, 1, 3),
    "a last batch of one": (13, 4, 1, 1),
    "nearly all samples": (12, 11, 1, 11),
    "more than are cached at once": (600, 280, 1, 280),
    "the rest of these": (600, 280, 1, 40),
    "a part of a batch": (12, 8, 2, 4),
}


@pytest.mark.parametrize("kind", OF_SIZES)
def test_every_size_of_a_batch_in_training(kind):
    n, batch_size, accumulate, size = OF_SIZES[kind]
    settings = {"batch_size": batch_size, "accumulate": accumulate, "second_phase": "gd"}
    result = quiet(net(only([size])), **settings).fit(toy_data(n))
    status, evidence = features_premise(result)
    assert status == "failed" and "another batch: apart by" in evidence
    assert not result.guarantee.curve


def test_gradients_are_on_where_training_has_them():
    model = net(lambda m, h: h * 0.5 if torch.is_grad_enabled() else h)
    status, evidence = features_premise(quiet(model, batch_size=4).fit(toy_data(11)))
    assert status == "failed" and "another batch: apart by" in evidence


def test_a_compiled_model_is_run_as_it_is_compiled():
    other = net(lambda m, h: h * 0.5 if torch.compiler.is_compiling() else h)
    plain = net(lambda m, h: h * 0.5)
    for model, expected in ((other, "failed"), (plain, "held")):
        compiled = torch.compile(model, backend="eager")
        result = quiet(compiled, batch_size=4, second_phase="gd").fit(toy_data(11))
        assert features_premise(result)[0] == expected


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (toy_convnet(), toy_images(70)),
        (toy_mlp(), toy_data()),
        (net(lambda m, h: h), toy_data(300)),
    ],
    ids=["convnet", "mlp", "two batches"],
)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_rounding_is_no_disagreement(model, data, precision):
    result = quiet(model, second_phase="gd", precision=precision).fit(data)
    status, evidence = features_premise(result)
    assert status == "held" and f"h is the same in other batches for all {len(data[1])}" in evidence
    assert result.guarantee.curve and result.feature_cache == "hidden"


def test_deep_batch_norm_at_any_weights_is_no_disagreement():
    torch.manual_seed(0)
    layers = [(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.ReLU()) for _ in range(20)]
    model = nn.Sequential(*[m for part in layers for m in part], nn.Linear(40, 3))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_var.uniform_(1e-6, 1e-2)
    data = torch.randn(300, 40), torch.randint(3, (300,))
    samples = Samples.of(data, name="train", device=torch.device("cpu"), dtype=torch.float32)
    found = fixed.agreement(Network(model, data[0][:2]), samples, 64)
    assert found.evidence is None and found.compared


@pytest.mark.parametrize("where", ["buffer", "parameter", "rebound buffer"])
def test_a_forward_that_changes_its_state_is_refused(where):
    def count(m, h):
        if len(h) < 10:  # not on a few samples, as other checks run it
            return h
        with torch.no_grad():
            if where == "buffer":
                m.seen.add_(1)
            elif where == "parameter":
                m.b.weight.mul_(1.001)
            elif m.seen is not None:
                m.seen = m.seen + 1
        return h

    model = net(count)
    model.register_buffer("seen", torch.zeros(2))
    name = "b.weight" if where == "parameter" else "seen"
    with pytest.raises(ValueError, match=f"model: its forward pass changes {name} in evaluation"):
        quiet(model).fit(toy_data(20))


def test_state_changes_are_undone():
    model = net(lambda m, h: (m.b.weight.data.mul_(1.5 if len(h) > 9 else 1), h)[1])
    before = bits(model)
    with pytest.raises(ValueError, match=r"changes b\.weight"):
        quiet(model).fit(toy_data(20))
    assert same_bits(bits(model), before)


class Hook:
    """At tau, behind the noise, the model's owner adds a hook."""

    def on_perturb(self, run):
        run.network.model.register_forward_hook(lambda m, args, out: out.clamp(min=0))


@pytest.mark.parametrize("mode", ["hidden", "backbone", "disk"])
def test_outputs_are_compared_with_the_cache_at_tau(mode):
    trainer = quiet(toy_mlp(), second_phase="gd", feature_cache=mode, callbacks=[Hook()])
    result = trainer.fit(toy_data())
    status, evidence = features_premise(result)
    assert status == "failed" and "not the last layer's of its features" in evidence
    assert result.feature_cache == "none" and not result.guarantee.curve


def test_a_hook_on_the_output_from_the_beginning():
    model = toy_mlp()
    model.register_forward_hook(lambda m, args, out: out.clamp(min=0) if len(out) > 9 else out)
    status, evidence = features_premise(quiet(model, second_phase="gd").fit(toy_data()))
    assert status == "failed" and "not the last layer's of its features" in evidence


def test_a_cache_of_ones_own_is_refused():
    model = net(KINDS["batch statistics"]).eval()
    with pytest.raises(ValueError, match="model: its features are not fixed"):
        tp.FeatureCache(model, toy_data(12))
    assert tp.FeatureCache(model, toy_data(12), mode="none").mode == "none"


def test_resumed_runs_remember_the_evidence(tmp_path):
    def trainer(epochs=4):
        return quiet(net(KINDS["neighbours"]), tmp_path, batch_size=4, second_phase="gd")

    whole = quiet(net(KINDS["neighbours"]), batch_size=4, second_phase="gd").fit(toy_data(12))

    first = quiet(
        net(KINDS["neighbours"]),
        tmp_path,
        batch_size=4,
        second_phase="gd",
        callbacks=[End(2, by=KeyboardInterrupt)],
    )
    with pytest.raises(KeyboardInterrupt):
        first.fit(toy_data(12))
    result = trainer().fit(toy_data(12), resume=True)
    assert features_premise(result) == features_premise(whole)
    assert same_bits(bits(result.model), bits(whole.model))


def test_the_time_is_bounded_and_said(monkeypatch):
    monkeypatch.setattr(fixed, "SECONDS", -1.0)
    result = quiet(toy_mlp(), second_phase="gd").fit(toy_data())
    assert features_premise(result) == ("held", "cached: hidden; not compared with other batches")
    ticks = iter(range(1000))
    monkeypatch.setattr(fixed, "SECONDS", 1.5)
    monkeypatch.setattr(fixed.time, "monotonic", lambda: float(next(ticks)))
    model, data = net(lambda m, h: h), toy_data(600)
    samples = Samples.of(data, name="t", device=torch.device("cpu"), dtype=torch.float32)
    found = fixed.agreement(Network(model, data[0][:2]), samples, 64)
    assert found.extent.endswith("for the first 256 of 600 samples")


class Tokens(nn.Module):
    """A head on the last token; one softplus serves two layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(60, 8), nn.Linear(8, 8)
        self.act, self.wide, self.last = tp.nn.Softplus(10.0), nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, tokens):
        z = self.act(self.mix(self.embed(tokens).cumsum(1)))
        return self.last(self.act(self.wide(z)))[:, -1]


@pytest.mark.parametrize("cache", ["hidden", "backbone"])
def test_a_softplus_that_runs_twice_in_a_token_model(cache):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens, y, model = torch.randint(1, 50, (11, 6)), torch.arange(11) % 3, Tokens()
    network = Network(model.eval(), tokens[:2])
    with torch.no_grad():
        truth = model.act(model.mix(model.embed(tokens).cumsum(1)))[:, -1]
    assert torch.allclose(network.backbone(tokens), truth, atol=1e-6)
    settings = {"second_phase": "gd", "feature_cache": cache}
    result = quiet(model, **settings).fit((tokens, y))
    assert features_premise(result)[0] == "held" and result.guarantee.curve
