"""Separation behind every analytic last hidden layer: GELU, SiLU, tanh and their kind."""

import pytest
import torch
from torch import nn

import twophase_ext as tp
from twophase_ext.model import layers
from twophase_ext.model.activations import ANALYTIC, SLOPE

N = 24
KINDS = {
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "log sigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink,
    "softplus": tp.nn.Softplus,
}
OTHERS = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "hardswish": nn.Hardswish,
    "torch's softplus": nn.Softplus,
    "identity": nn.Identity,
    "softsign": nn.Softsign,
}


def inputs():
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(3))


def model(activation, width=40, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, width), activation, nn.Linear(width, 3))
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"method": "separation"}, {"w": "witness"}, {}])
def test_proved_and_rechecked(kind, settings):
    own, x = model(KINDS[kind]()), inputs()
    verdict = tp.verify_expressivity(own, x, **settings)
    assert verdict.status == "proved", str(verdict)
    assert verdict.recheck(own, x, say=lambda _: None)
    if settings.get("method"):
        assert (verdict.claim, verdict.method) == ("exists", "separation")


@pytest.mark.parametrize("kind", KINDS)
def test_some_weights_do_have_full_rank(kind):
    """What the theorem says, looked for: n - 1 units and the ones column, singular values."""
    own, x = model(KINDS[kind](), N - 1).double(), inputs().double()
    found = tp.verify_expressivity(own, x, method="separation")
    assert found.status == "proved"
    best = 0.0
    with torch.no_grad():
        z = own[1](own[0](x))
        for seed in range(40):
            generator = torch.Generator().manual_seed(seed)
            weight = 6 * torch.randn(N - 1, 16, generator=generator).double()
            bias = 6 * torch.randn(N - 1, generator=generator).double()
            h = own[3](z @ weight.T + bias)
            sigma = torch.linalg.svdvals(torch.cat([h, h.new_ones(N, 1)], 1))
            best = max(best, float(sigma[-1] / sigma[0]))
    assert best > 1e-12


@pytest.mark.parametrize("kind", OTHERS)
def test_other_activations_are_not_claimed(kind):
    verdict = tp.verify_expressivity(model(OTHERS[kind]()), inputs(), method="separation")
    assert verdict.status == "undecided" and "real analytic activation" in verdict.reason


@pytest.mark.parametrize("kind", KINDS)
def test_equal_features_are_not_claimed(kind):
    own, x = model(KINDS[kind]()), inputs()
    with torch.no_grad():
        own[0].weight[:, 0] = 0
    own[0].weight.requires_grad_(False)
    x[1, 1:] = x[0, 1:]  # another first entry, which the frozen layer does not see
    for settings in ({"method": "separation"}, {"w": "witness"}, {}):
        assert tp.verify_expressivity(own, x, **settings).status != "proved"


@pytest.mark.parametrize("kind", ["gelu", "silu", "tanh"])
def test_what_runs_is_the_activation_that_is_named(kind, monkeypatch):
    def claimed(own):
        return tp.verify_expressivity(own, inputs(), method="separation").status == "proved"

    replaced = model(KINDS[kind]())
    replaced[3].forward = torch.zeros_like
    assert not claimed(replaced)
    hooked = model(KINDS[kind]())
    hooked[3].register_forward_hook(lambda *_: None)
    assert not claimed(hooked)
    between = model(nn.Sequential(KINDS[kind](), nn.LayerNorm(40)))
    assert not claimed(between)
    frozen = model(KINDS[kind]())
    frozen[2].weight.requires_grad_(False)
    assert not claimed(frozen)
    subclass = type("Own", (type(KINDS[kind]()),), {"forward": lambda self, x: x * 0})
    assert not claimed(model(subclass()))
    whole = model(KINDS[kind]())
    assert claimed(whole)
    monkeypatch.setattr(type(whole[3]), "forward", lambda self, x: x.clamp(0, 1).round())
    assert not claimed(whole)


def test_the_slopes():
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64, requires_grad=True)
    for kind in KINDS.values():
        activation = kind()
        formula = ANALYTIC[type(activation)]
        assert torch.equal(formula(activation, x.detach()), activation(x.detach().clone()))
        (slope,) = torch.autograd.grad(formula(activation, x).sum(), x)
        assert float(slope.abs().max()) <= SLOPE


def test_the_layer_is_found_once():
    own = model(nn.GELU())
    last = layers.find_last_layer(own, inputs())
    found = layers.find_analytic_layer(own, inputs(), last)
    assert found is not None and found.linear is own[2] and found.activation is own[3]
    assert layers.find_wide_layer(own, inputs(), last) is None
    twice = nn.Sequential(own[2], nn.GELU(), nn.Linear(40, 16), own[2], nn.GELU(), own[4])
    x = torch.randn(4, 16)
    last = layers.find_last_layer(twice, x)
    assert layers.find_analytic_layer(twice, x, last) is None
