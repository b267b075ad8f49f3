"""Screening leaves out no pair that it may not: against rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch

from twophase_ext.expressivity import kinks, screening
from twophase_ext.expressivity.kinks import local_kinks
from twophase_ext.expressivity.one_sided import exact_softplus
from twophase_ext.expressivity.screening import near_everywhere
from twophase_ext.expressivity.triangular import certify_triangular
from twophase_ext.expressivity.witness import whiten
from twophase_ext.ops.screen_products import PANEL, packed_columns, screen_products

SOFTPLUS = exact_softplus(100.0)
pytestmark = pytest.mark.usefixtures("one_thread")


def samples(n: int, d: int, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    """Correlated numbers: the whitening has work to do."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, dtype=torch.float64, generator=g)
    return torch.randn(n, d, dtype=torch.float64, generator=g) @ mix + offset


def swept(z, dtype=torch.float32, error=0.0):
    errors = torch.full((len(z),), error, dtype=torch.float64)
    return errors, local_kinks(z, whiten(z, errors, dtype), dtype, SOFTPLUS)


def exact(z, found, i, j) -> Fraction:
    """The pre-activation of the neuron in place j at the sample in place i."""
    pairs = zip(z[found.order[i]].tolist(), found.weight[j].tolist(), strict=True)
    return sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(float(found.bias[j])))


@pytest.fixture
def screens(monkeypatch):
    """The screens of the sweeps that are made."""
    made = []

    class Kept(screening.Screen):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(kinks, "Screen", Kept)
    return made


def missed(screen, z, found, end) -> int:
    """Pairs i != j < end that count as off, with a cut just below what they are.

    By the products of blocks, and by those within a block.
    """
    count = 0
    q = screen.q * screen.scale
    rows = q.float()
    length = screen.q.norm(dim=1)
    within = (screen.q @ (screen.q / length[:, None]).T) * length * screen.scale**2
    for j in range(end):
        panel, none = packed_columns(rows[j : j + 1]), torch.full((PANEL,), torch.inf)
        for i in range(0, end, 3):
            screen.cut = math.nextafter(float(exact(z, found, i, j)), -math.inf)
            screen.cut = math.nextafter(screen.cut, -math.inf)
            own = screen._thresholds(slice(j, j + 1), end, screen.own_error)[0]
            count += bool(within[i, j] <= own)
            threshold = screen._narrowed(screen._thresholds(slice(j, j + 1), end, screen.error))[0]
            none[0] = threshold
            if not screen.narrow:
                count += bool(q[i] @ q[j] <= threshold)
                continue
            count += len(screen_products(rows[i : i + 1], panel, none, 9)[2]) == 0
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_pair_just_above_the_cut_is_near(screens, dtype, offset):
    z = samples(60, 7, offset=offset)
    _, found = swept(z, dtype)
    assert missed(screens[0], z, found, 60) == 0


@pytest.mark.parametrize(
    ("name", "devices", "dtype", "offset"),
    [
        ("error", ("cpu",), torch.float64, 0.0),  # float32 products of the features
        ("per_length", (), torch.float32, 0.0),  # float32 weights
        ("c_error", (), torch.float64, 1e9),  # the bias against a mean that is far off
    ],
)
def test_each_error_counts(monkeypatch, screens, name, devices, dtype, offset):
    """Without a term of the bound, pairs that are on would be left out."""
    monkeypatch.setattr(screening, "NARROW", devices)
    z = samples(60, 7, offset=offset)
    _, found = swept(z, dtype)
    assert missed(screens[0], z, found, 60) == 0
    setattr(screens[0], name, getattr(screens[0], name) * 0)
    assert missed(screens[0], z, found, 60) > 100


@pytest.mark.parametrize("devices", [("cpu",), ()], ids=["float32", "float64"])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (223, 3), (225, 5), (700, 12)])
def test_what_is_on_is_near(monkeypatch, devices, n, d):
    monkeypatch.setattr(screening, "NARROW", devices)
    z = samples(n, d)
    _, found = swept(z)
    near, cut = found.near, SOFTPLUS.cut(n)
    listed = set(zip(near.rows.tolist(), near.columns.tolist(), strict=True))
    assert len(listed) == len(near.rows) and (near.rows > near.columns).all()
    wanted = near_everywhere(z[found.order], found.weight, found.bias, cut, lambda _: None)
    assert wanted.offending is near.offending is None
    on = set(zip(wanted.rows.tolist(), wanted.columns.tolist(), strict=True))
    assert on <= listed and len(listed) <= 1.1 * len(on) + 2


def test_the_sweep_and_all_pairs_give_one_certificate():
    z = samples(500, 6)
    errors, found = swept(z, error=1e-9)
    given = z, errors, found.weight, found.bias, found.order, SOFTPLUS
    one, other = certify_triangular(*given, near=found.near), certify_triangular(*given)
    assert one.proved and one.entries == other.entries > 500
    assert one.sigma_min_lower == pytest.approx(other.sigma_min_lower, rel=1e-9)


def test_blocks_do_not_matter(monkeypatch):
    z = samples(300, 4)
    _, whole = swept(z)
    monkeypatch.setattr(kinks, "SMALL_BLOCK", 32)
    _, parts = swept(z)
    assert torch.equal(whole.weight, parts.weight) and torch.equal(whole.bias, parts.bias)
    assert len(whole.near.rows) == len(parts.near.rows)


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9])
def test_near_duplicates_get_a_second_look(gap):
    """Gaps that float32 does not resolve are those of float64."""
    z = samples(400, 6, seed=2)
    z[300:] = z[:100] + gap * samples(100, 6, seed=3)
    _, found = swept(z, torch.float64)
    q = whiten(z, torch.zeros(400).double(), torch.float64)(z)[found.order]
    along = (q @ (q / q.norm(dim=1, keepdim=True)).T).masked_fill(
        torch.ones(400, 400, dtype=torch.bool).tril(), -torch.inf
    )
    true = (q.norm(dim=1) - along.amax(0))[1:]
    assert float(true.min()) < gap
    assert torch.allclose(found.gaps[1:], true, rtol=1e-3, atol=1e-14)


def test_a_neuron_that_is_on_too_early_is_found():
    """Equal samples: the second's neuron is on at the first; small ones in the first block."""
    for twin, size in ((5, 1.0), (390, 1.0), (5, 0.05)):
        z = samples(400, 6)
        z[7] *= size
        z[twin] = z[7]
        errors, found = swept(z)
        places = [int((found.order == k).nonzero()) for k in (7, twin)]
        assert found.near.offending[1] == max(places) > found.near.offending[0]
        proof = certify_triangular(
            z, errors, found.weight, found.bias, found.order, SOFTPLUS, near=found.near
        )
        assert not proof.proved and proof.offending[1] == int(found.order[max(places)])


@pytest.mark.parametrize("scale", [1e-150, 1e-50, 1e50, 1e150])
def test_extreme_features_are_not_screened(scale):
    z = samples(250, 5) * scale
    errors, found = swept(z, torch.float64)
    assert (found.near is None) == (max(scale, 1 / scale) > 1e100)
    proof = certify_triangular(
        z, errors, found.weight, found.bias, found.order, SOFTPLUS, near=found.near
    )
    assert proof.proved


def test_too_many_near_pairs_are_given_up(monkeypatch):
    z = samples(500, 3)
    _, found = swept(z)
    monkeypatch.setattr(screening, "MANY", len(found.near.rows) - 1)
    assert swept(z)[1].near is None
    monkeypatch.setattr(screening, "MANY", len(found.near.rows))
    assert swept(z)[1].near is not None


def test_not_finite_features_prove_nothing():
    z = samples(250, 5)
    errors, found = swept(z)
    z[17, 2] = math.nan
    proof = certify_triangular(
        z, errors, found.weight, found.bias, found.order, SOFTPLUS, near=found.near
    )
    assert not proof.proved
