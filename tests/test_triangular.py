"""The triangular certificate against singular values of the matrix that it speaks of."""

import math

import mpmath
import numpy as np
import pytest
import torch

from twophase_ext.expressivity import triangular
from twophase_ext.expressivity.kinks import local_kinks
from twophase_ext.expressivity.one_sided import exact_softplus
from twophase_ext.expressivity.triangular import certify_triangular, preactivation_error
from twophase_ext.expressivity.witness import spread_kinks, whiten
from twophase_ext.ops import softplus

BETA = 100.0
SOFTPLUS = exact_softplus(BETA)


def samples(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def certified(z, error=0.0, dtype=torch.float64):
    errors = torch.full((len(z),), error, dtype=torch.float64)
    kinks = local_kinks(z, whiten(z, errors, dtype), dtype, SOFTPLUS)
    proof = certify_triangular(
        z, errors, kinks.weight, kinks.bias, kinks.order, SOFTPLUS, near=kinks.near
    )
    return kinks, proof


def matrix(z, kinks) -> np.ndarray:
    h = softplus(z @ kinks.weight.T + kinks.bias, BETA)
    return torch.cat([h, torch.ones(len(z), 1, dtype=torch.float64)], 1).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (40, 5), (300, 30), (700, 12)])
def test_bounds_lie_below_the_truth_and_near_it(n, d, dtype):
    z = samples(n, d)
    kinks, proof = certified(z, 1e-14, dtype)
    m = matrix(z, kinks)
    sigma = np.linalg.svd(m[:, :-1], compute_uv=False)[-1]
    assert proof.proved, proof
    assert proof.sigma_min_lower <= sigma
    if n <= 300:
        assert proof.sigma_min_lower >= 0.95 * sigma
    sign, logdet = np.linalg.slogdet(m @ m.T)
    assert sign == 1 and proof.logdet_lower <= logdet
    assert torch.equal(kinks.weight, kinks.weight.to(dtype).double())
    assert sorted(kinks.order.tolist()) == list(range(n))


def test_real_singular_value_of_a_hand_made_case():
    # Neuron j is on at sample j and at the next one: an exactly known bidiagonal L.
    n, slope = 6, 2.0
    z = torch.arange(1, n + 1, dtype=torch.float64)[:, None]
    weight = torch.full((n, 1), slope, dtype=torch.float64)
    bias = -slope * (z[:, 0] - 0.5)
    zero = torch.zeros(n, dtype=torch.float64)
    proof = certify_triangular(z, zero, weight, bias, torch.arange(n), SOFTPLUS)
    exact = np.tril(np.array([[slope * (i - j + 0.5) for j in range(n)] for i in range(n)]))
    comparison = 2 * np.diag(np.diag(exact)) - exact
    truth = np.linalg.norm(np.linalg.inv(comparison), 2)
    assert truth <= proof.comparison_norm <= truth * 1.05
    truth = np.linalg.norm(np.linalg.inv(exact), 2)
    assert truth <= proof.inverse_norm <= truth * 1.05
    assert proof.entries == n * (n - 1) // 2


def test_the_order_matters():
    z = samples(50, 4)
    kinks, _ = certified(z)
    zero = torch.zeros(50, dtype=torch.float64)
    flipped = certify_triangular(
        z, zero, kinks.weight.flip(0), kinks.bias.flip(0), kinks.order.flip(0), SOFTPLUS
    )
    assert not flipped.proved and flipped.offending is not None
    earlier, own = flipped.offending
    position = {int(s): k for k, s in enumerate(kinks.order.flip(0))}
    assert position[earlier] < position[own]
    row = int((kinks.order == own).nonzero())
    assert float(z[earlier] @ kinks.weight[row] + kinks.bias[row]) > -1


@pytest.mark.parametrize("gap", [0.0, 1e-300, 1e-17, 1e-14, 1e-11, 1e-8, 1e-5, 1e-3])
def test_samples_that_errors_may_join_are_never_proved(gap):
    z = samples(60, 30)
    z[41] = z[17]
    z[41, 2] += gap
    distance = float((z[41] - z[17]).norm())
    # Half the distance and the rounding of computing it: exact features may agree.
    _, proof = certified(z, distance / 2 * (1 + 1e-12))
    assert not proof.proved and proof.sigma_min_lower == 0
    if gap >= 1e-5:
        assert certified(z, gap * 1e-8)[1].proved


def test_errors_of_the_features_are_covered():
    z = samples(80, 30)
    error = 1e-4
    kinks, proof = certified(z, error)
    assert proof.proved
    everywhere = preactivation_error(
        z, torch.full((80,), error, dtype=torch.float64), kinks.weight, kinks.bias
    )
    entries = softplus(z @ kinks.weight.T + kinks.bias, BETA).numpy()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        move = torch.randn(z.shape, dtype=torch.float64, generator=generator)
        moved = z + error * move / move.norm(dim=1, keepdim=True)
        h = softplus(moved @ kinks.weight.T + kinks.bias, BETA)
        assert np.linalg.svd(h.numpy(), compute_uv=False)[-1] >= proof.sigma_min_lower
        change = (moved - z) @ kinks.weight.T
        assert float(change.norm()) <= everywhere
        assert np.linalg.norm(h.numpy() - entries, 2) <= proof.distance
    # along the right singular vector the bound of ||dZ W^T|| is attained
    v = torch.linalg.svd(kinks.weight)[2][0]
    assert float((error * math.sqrt(80) * kinks.weight @ v).norm()) >= 0.9 * everywhere
    # where neurons are on: every sample may move along the weight of one of them
    assert error * float(kinks.weight.norm(dim=1).max()) <= proof.preactivation
    assert proof.preactivation < everywhere / 2


def test_preactivation_error_against_exact_arithmetic():
    # alternating signs: the sums cancel, rounding is all that is left
    z = samples(12, 40) * 1e8
    weight = samples(9, 40, 1)
    weight[:, 20:], z[:, 20:] = -weight[:, :20], z[:, :20] * (1 + 1e-9)
    bias = samples(9, 1, 2)[:, 0] * 1e6
    computed = torch.addmm(bias, z, weight.T)
    total = mpmath.mpf(0)
    with mpmath.workprec(400):
        for i in range(12):
            for j in range(9):
                terms = (
                    mpmath.mpf(a) * mpmath.mpf(b)
                    for a, b in zip(z[i].tolist(), weight[j].tolist(), strict=True)
                )
                exact = sum(terms, mpmath.mpf(float(bias[j])))
                total += (mpmath.mpf(float(computed[i, j])) - exact) ** 2
    truth = float(mpmath.sqrt(total))
    bound = preactivation_error(z, torch.zeros(12, dtype=torch.float64), weight, bias)
    assert 0 < truth <= bound <= 1e3 * truth


def test_leaving_out_a_term_is_seen(monkeypatch):
    z = samples(60, 30)
    z[41] = z[17]
    z[41, 2] += 1e-5
    monkeypatch.setattr(triangular, "preactivation_error", lambda *_: 0.0)
    assert certified(z, 1e-5)[1].proved  # the lie that the tests above forbid


def test_nan_and_dead_neurons():
    z = samples(20, 3)
    kinks, _ = certified(z)
    zero = torch.zeros(20, dtype=torch.float64)
    weight = kinks.weight.clone()
    weight[5, 1] = float("nan")
    assert not certify_triangular(z, zero, weight, kinks.bias, kinks.order, SOFTPLUS).proved
    dead = certify_triangular(z, zero, kinks.weight, kinks.bias - 9, kinks.order, SOFTPLUS)
    assert not dead.proved and "off at its own sample" in dead.reason


def test_few_samples_in_many_directions_are_whitened():
    z = samples(10, 40) * torch.logspace(0, -3, 40, dtype=torch.float64) + 3
    whitening = whiten(z, torch.zeros(10, dtype=torch.float64), torch.float64)
    q = whitening(z)
    assert q.shape == (10, 9)  # the mean takes one
    assert torch.allclose(q.T @ q / 10, torch.eye(9, dtype=torch.float64), atol=1e-9)
    more = whiten(torch.cat([z] * 5), torch.zeros(50, dtype=torch.float64), torch.float64)
    assert torch.allclose(whitening.spreads, more.spreads[:9], rtol=1e-9)


def test_spread_kinks_are_centred_and_in_the_dtype():
    z = samples(200, 8) + 5
    error = torch.zeros(200, dtype=torch.float64)
    whitening = whiten(z, error, torch.float32)
    weight, bias = spread_kinks(whitening, 64, torch.float32, torch.Generator().manual_seed(3))
    assert torch.equal(weight, weight.float().double()) and torch.equal(bias, bias.float().double())
    a = z @ weight.T + bias
    assert float(a.mean(0).abs().max()) < 1e-5
    assert float((a.std(0) - 1).abs().max()) < 0.05
