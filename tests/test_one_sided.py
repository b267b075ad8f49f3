"""Activations that vanish on one side: bounds against mpmath, certificates against SVDs."""

import math

import mpmath
import pytest
import torch
from torch import nn

import twophase_ext as tp
from twophase_ext.expressivity.kinks import local_kinks
from twophase_ext.expressivity.one_sided import SHARPEST, one_sided
from twophase_ext.expressivity.triangular import certify_triangular
from twophase_ext.expressivity.witness import whiten

KINDS = {
    "softplus": lambda: tp.nn.Softplus(100.0),
    "flat softplus": lambda: tp.nn.Softplus(0.5),
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
}


def exact(kind, t):
    """In the precision of mpmath."""
    t = mpmath.mpf(t)
    if "softplus" in kind:
        beta = mpmath.mpf(KINDS[kind]().beta)
        return mpmath.log1p(mpmath.exp(beta * t)) / beta
    if kind == "gelu":
        return t * mpmath.erfc(-t / mpmath.sqrt(2)) / 2
    if kind == "gelu tanh":
        y = mpmath.sqrt(2 / mpmath.pi) * (t + mpmath.mpf("0.044715") * t**3)
        return t / (1 + mpmath.exp(-2 * y))
    if kind == "silu":
        return t / (1 + mpmath.exp(-t))
    return t * mpmath.tanh(mpmath.log1p(mpmath.exp(t)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 24, 60_000, 10**7])
def test_what_lies_behind_the_cut(kind, n):
    activation = one_sided(KINDS[kind]())
    cut, rate, height = activation.cut(n), activation.rate(n), activation.height(n)
    assert math.frexp(height)[0] == 0.5  # a power of two
    assert 1 - 1 / 0.35 < cut / height < 0 and (height == 1 or cut / height <= -0.5)
    with mpmath.workdps(60):
        allowed = mpmath.mpf(SHARPEST) / n * (1 + mpmath.mpf("1e-9"))
        for share in [1.0, 1.001, 1.5, 3.0, 20.0]:
            assert abs(exact(kind, cut * share)) <= allowed
        for at in [cut, cut + 1e-9, cut / 2, -1.0, -0.3, 0.0, 1e-3, 1.0, 30.0]:
            delta = max(at - cut, 0.0)
            bound = allowed * mpmath.exp(mpmath.mpf(rate) * delta)
            for t in (cut + delta, cut + delta / 2, cut):
                assert abs(exact(kind, t)) <= bound, (delta, t)


@pytest.mark.parametrize("kind", KINDS)
def test_slope_and_evaluation(kind):
    activation = one_sided(KINDS[kind]())
    t = torch.cat([torch.linspace(-40, 40, 40_001), torch.linspace(-3, 3, 20_001)]).double()
    leaf = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(KINDS[kind]()(leaf).sum(), leaf)
    assert float(slope.abs().max()) <= activation.slope
    assert float(slope.abs().max()) >= activation.slope / 1.02
    some = t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0))[:800]]
    values = activation.function(some.clone())
    with mpmath.workdps(40):
        for one, value in zip(some.tolist(), values.tolist(), strict=True):
            bound = activation.evaluation_error(abs(value), abs(one), 1)
            assert abs(mpmath.mpf(value) - exact(kind, one)) <= bound + 5e-324


def certified(kind, z, error, dtype=torch.float32):
    activation = one_sided(KINDS[kind]())
    errors = torch.full((len(z),), error, dtype=torch.float64)
    kinks = local_kinks(z, whiten(z, errors, dtype), dtype, activation)
    given = z, errors, kinks.weight, kinks.bias, kinks.order, activation
    return kinks, certify_triangular(*given, near=kinks.near), certify_triangular(*given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d", "error"), [(60, 5, 1e-12), (300, 12, 1e-6), (300, 12, 1e-4)])
def test_the_bound_holds_wherever_the_features_are(kind, n, d, error):
    """At the computed features, and at others within the errors."""
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(n, d, dtype=torch.float64, generator=generator)
    kinks, proof, everywhere = certified(kind, z, error)
    assert proof.proved, proof
    assert proof.sigma_min_lower == pytest.approx(everywhere.sigma_min_lower, rel=1e-6)
    for scale in (0.0, 0.999 * error):
        moved = torch.randn(n, d, dtype=torch.float64, generator=generator)
        at = z + scale * moved / moved.norm(dim=1, keepdim=True)
        h = KINDS[kind]()(at @ kinks.weight.T + kinks.bias)
        sigma = float(torch.linalg.svdvals(h)[-1])
        assert proof.sigma_min_lower <= sigma * (1 + 1e-9)
        if error <= 1e-12:
            assert proof.sigma_min_lower >= 0.9 * sigma
        gram = torch.cat([h, h.new_ones(n, 1)], 1)
        assert proof.logdet_lower <= float(torch.linalg.slogdet(gram @ gram.T)[1]) + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_counts_slope_and_all_neurons(kind):
    """||T - L||_2 of the true T at features moved against the neurons."""
    n, d, error = 80, 6, 1e-3
    z = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kinks, proof, _ = certified(kind, z, error)
    activation = one_sided(KINDS[kind]())
    a = z @ kinks.weight.T + kinks.bias
    held = torch.where(a > activation.cut(n), KINDS[kind]()(a), 0.0)
    worst = 0.0
    for j in range(n):
        moved = z + error * kinks.weight[j] / kinks.weight[j].norm()
        true = KINDS[kind]()(moved @ kinks.weight.T + kinks.bias)
        worst = max(worst, float(torch.linalg.matrix_norm(true - held, 2)))
    assert worst <= proof.distance
    assert worst >= proof.distance / 20


def own(activation, width=40):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, width), activation, nn.Linear(width, 3))
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_witness_for_the_users_model(kind):
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(3))
    model = own(KINDS[kind]())
    verdict = tp.verify_expressivity(model, x, w="witness")
    assert (verdict.status, verdict.method, verdict.factorization) == (
        "proved",
        "certificate",
        "triangular",
    )
    assert verdict.recheck(model, x, say=lambda _: None)
    model.load_state_dict(verdict.witness, strict=False)
    h = model.double()[:4](x.double())
    sigma = float(torch.linalg.svdvals(torch.cat([h, h.new_ones(24, 1)], 1))[-1])
    assert 0 < verdict.sigma_min_lower <= sigma * (1 + 1e-9)
    if "softplus" not in kind:
        assert any("erf and tanh" in line for line in verdict.assumptions)


@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_spread_kinks_and_a_global_minimum(kind):
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(3))
    verdict = tp.verify_expressivity(
        own(KINDS[kind](), 90), x, w="witness", method="certificate", factorization="gram"
    )
    assert verdict.status in ("proved", "full rank"), str(verdict)
    found = tp.global_minimum(own(KINDS[kind]()), x, torch.arange(24) % 3)
    assert found.reached, str(found)


def test_others_have_no_such_certificate():
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(3))
    verdict = tp.verify_expressivity(own(nn.Tanh()), x, w="witness", method="certificate")
    assert verdict.status == "undecided" and "GELU, SiLU or Mish" in verdict.reason
    assert one_sided(nn.Sigmoid()) is None and one_sided(nn.LogSigmoid()) is None
