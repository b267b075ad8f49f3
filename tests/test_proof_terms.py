"""Each term of a proved bound is there: a test fails where the one that it names is left out."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn

import twophase_ext as tp
from twophase_ext.expressivity.certify import WideSource, certify_matrix
from twophase_ext.expressivity.one_sided import exact_softplus
from twophase_ext.expressivity.triangular import (
    certify_triangular,
    preactivation_error,
    promoted_log_det,
)
from twophase_ext.linalg.bounds import minus, plus
from twophase_ext.linalg.norms import frobenius_upper, norm_upper
from twophase_ext.linalg.progress import Stages
from twophase_ext.linalg.sparse_triangular import inverse_norm_upper
from twophase_ext.theory.guarantee import smoothness

U = 2.0**-53


def wide(n=30, m=50, beta=10.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, weight, bias = (torch.randn(*s, generator=g).double() for s in ((n, 6), (m, 6), (m,)))
    return WideSource(z, 3 * weight, bias, exact_softplus(beta), True)


def certify(source, spread, factorization="gram"):
    return certify_matrix(
        source,
        spread,
        factorization=factorization,
        folder=None,
        stages=Stages(False, None),
        constants={},
        assumptions=[],
    )


@pytest.mark.parametrize("factorization", ["gram", "preconditioned"])
def test_the_error_of_the_features_is_taken_away(factorization):
    source = wide()
    none = certify(source, 0.0, factorization)
    stored = none.constants["sigma_min_lower_stored"]
    spread = stored / 3
    found = certify(source, spread, factorization)
    assert found.status == "proved" and found.feature_error >= spread
    bound = Fraction(found.sigma_min_lower)
    assert 0 < bound <= Fraction(stored) - Fraction(found.feature_error)
    assert 1 < found.margin <= 3
    assert certify(source, stored, factorization).status == "full rank"
    assert none.margin > 1e6


def test_the_evaluation_of_softplus_is_part_of_the_error():
    source = wide(beta=4.0)
    h = source.panel(0, len(source.weight))
    least = 8 * U * (float(h.norm()) + math.sqrt(h.numel()) / 4.0)
    for factorization in ("gram", "preconditioned"):
        assert certify(source, 0.0, factorization).feature_error >= least


def kinks(n=6):
    """One neuron a sample on a line: z_i = i, weight 1, kink a half before the own sample."""
    z = torch.arange(n).double()[:, None] * 40
    return z, torch.ones(n, 1).double(), 20 - z[:, 0], torch.arange(n)


def test_the_triangular_bound_has_all_three_errors():
    z, weight, bias, order = kinks()
    without = certify_triangular(
        z, torch.zeros(6).double(), weight, bias, order, exact_softplus(3.0)
    )
    error = torch.full((6,), 1e-3, dtype=torch.float64)
    found = certify_triangular(z, error, weight, bias, order, exact_softplus(3.0))
    for proof, least in ((without, 0.0), (found, 4.1e-3)):  # 1e-3 || |L| > 0 ||_2
        assert proof.proved and proof.preactivation >= least
        assert proof.evaluation >= 8 * U * 20 * math.sqrt(6)
        assert proof.distance >= proof.preactivation + proof.evaluation + proof.rest > 0
        bound = 1 / Fraction(proof.inverse_norm) - Fraction(proof.distance)
        assert Fraction(proof.sigma_min_lower) <= bound
    assert found.sigma_min_lower <= without.sigma_min_lower - 4e-3
    assert found.logdet_lower < without.logdet_lower


def test_the_tight_constant_has_its_rounding():
    """One large entry, then many whose squares are lost one by one: 4096 2^-54 = 2^-42 in all."""
    h = torch.cat([torch.ones(1, 1), torch.full((4096, 1), 2.0**-27)]).double()
    rows = lambda: ((row, row) for row in h.split(1))  # noqa: E731
    true = sum(Fraction(x) ** 2 for x in h[:, 0].tolist()) * 2 / len(h)
    for form in ("tight", "paper"):
        assert Fraction(smoothness(rows, loss="squared_error", form=form, ones=False)) >= true


def test_tiny_features_have_a_constant():
    """Squares that vanish are no zero: 1 / L_H stays finite."""
    h = torch.full((3, 2), 1e-200, dtype=torch.float64)
    assert smoothness(lambda: [(h, h)], loss="squared_error", ones=False) > 0


def test_no_log_det_where_the_error_reaches_sigma_min():
    assert promoted_log_det(4.0, 3, 0.0) <= 4.0
    assert promoted_log_det(4.0, 3, 0.5) < 4.0 - 2 * math.sqrt(3)
    for e in (1 - 1e-9, 1.0, 1 + 1e-12, 2.0, math.nan):
        assert promoted_log_det(4.0, 3, e) == -math.inf


def shear(k):
    """h = x exactly through two layers whose error bound grows with k."""
    a, b, last = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 1)
    with torch.no_grad():
        a.weight.copy_(torch.tensor([[1.0, k], [0.0, 1.0]]))
        b.weight.copy_(torch.tensor([[1.0, -k], [0.0, 1.0]]))
    return nn.Sequential(a, b, last).double()


@pytest.mark.parametrize("factorization", ["auto", "gram", "preconditioned"])
def test_bounds_hold_up_to_margin_one(factorization):
    x = torch.tensor([[0.0, 0.0], [3.0, 1.0], [1.0, 4.0]]).double()
    matrix = torch.cat([x, torch.ones(3, 1).double()], 1)
    sigma, log_det = float(torch.linalg.svdvals(matrix)[-1]), 2 * math.log(11)
    low, high, proved = 1.0, 1e9, 0
    for _ in range(45):  # the k of margin one
        k = math.sqrt(low * high)
        verdict = tp.verify_expressivity(
            shear(k), x, method="certificate", factorization=factorization
        )
        low, high = (k, high) if verdict.status == "proved" else (low, k)
        proved += verdict.status == "proved"
        if verdict.status == "proved":
            assert verdict.margin > 1 and 0 < verdict.sigma_min_lower <= sigma
            assert verdict.logabsdet_lower is None or verdict.logabsdet_lower <= log_det
            assert verdict.recheck(shear(k), x, say=lambda _: None)
    assert 5 < proved < 45 and high / low < 1 + 1e-8


def test_sums_and_differences_of_bounds_are_rounded_outwards():
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        a, b, c = (
            torch.randn(3, generator=g).double() * 10.0 ** torch.randint(-30, 30, (3,))
        ).tolist()
        assert Fraction(minus(a, b, c)) < Fraction(a) - Fraction(b) - Fraction(c)
        assert Fraction(plus(a, b, c)) > Fraction(a) + Fraction(b) + Fraction(c)
    assert minus(math.inf, 1.0) < math.inf  # beyond the largest double


@pytest.mark.parametrize("scale", [2.0**-1074, 3 * 2.0**-1074, 1e-310, 1e-160, 1e150, 1e300])
def test_norms_are_upper_bounds_at_any_scale(scale):
    a = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0]]).double() * scale
    squares = sum(Fraction(x) ** 2 for x in a.flatten().tolist())
    assert Fraction(frobenius_upper(a)) ** 2 >= squares
    first = [Fraction(x) for x in a[:, 0].tolist()]
    assert Fraction(norm_upper(a)) ** 2 >= sum(x**2 for x in first)  # ||A e_1||


@pytest.mark.parametrize("scale", [1e-150, 1e-9, 1.0, 1e9, 1e150, 1e290])
def test_the_triangular_bound_at_any_scale(scale):
    """L = scale [[1, 0], [1, 1]]: sigma_min by hand, nothing under- or overflows on the way."""
    lower = csr_matrix(np.array([[scale, 0.0], [scale, scale]]))
    true = (1 + math.sqrt(5)) / 2 / scale  # of <L>^-1 = [[1, 0], [1, 1]] / scale
    for found in inverse_norm_upper(lower):
        assert true * (1 - 1e-12) <= found <= true * (1 + 1e-6)


def test_preactivations_of_subnormal_features():
    z, weight = (
        torch.full((2, 3), 1e-310, dtype=torch.float64),
        torch.full((4, 3), 1e-3, dtype=torch.float64),
    )
    bound = preactivation_error(z, torch.zeros(2).double(), weight, torch.zeros(4).double())
    exact = sum(
        Fraction(a) * Fraction(b) for a, b in zip(z[0].tolist(), weight[0].tolist(), strict=True)
    )
    computed = Fraction(float(z[0] @ weight[0]))
    assert Fraction(bound) ** 2 >= 8 * (exact - computed) ** 2
