"""Culprits: the samples that make the rank fall, named and described."""

import pytest
import torch

from twophase_ext.expressivity import culprits
from twophase_ext.expressivity.culprits import Culprit, describe, find_culprits


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kinds(found, kind):
    return [c for c in found if c.kind == kind]


def test_nothing_wrong_nothing_named(device):
    z = draw(40, 6).to(device)
    assert (
        find_culprits(z, torch.full((40,), 1e-12).to(device), draw(40, 50, seed=1).to(device)) == []
    )


def test_identical_samples_are_named_once(device):
    """Not again as near-identical or dependent: the later copies are left out of both."""
    z = draw(20, 6)
    z[7], z[11], z[19] = z[3], z[3], z[0]
    m = draw(20, 30, seed=1)
    m[7], m[11], m[19] = m[3], m[3], m[0]
    found = find_culprits(z.to(device), torch.full((20,), 1e-6), m.to(device))
    assert found == [Culprit("identical", [0, 19], 0.0), Culprit("identical", [3, 7, 11], 0.0)]


def test_near_identical_samples_are_not_named_again_as_dependent():
    z, m = draw(20, 6), draw(20, 30, seed=1)
    z[7] = z[3] + 1e-12
    m[7] = m[3]
    assert [c.kind for c in find_culprits(z, torch.full((20,), 1e-9), m)] == ["near-identical"]


@pytest.mark.parametrize("shape", [(30, 4), (30, 1), (30, 2, 3, 5)])
def test_near_identical_within_the_sum_of_errors(device, shape):
    z = draw(*shape)
    error = torch.full((30,), 1e-9, dtype=torch.float64)
    error[5] = 3e-3
    step = torch.zeros(shape[1:], dtype=torch.float64)
    step.view(-1)[0] = 1
    z[9] = z[5] + 2.9e-3 * step  # within error[5]
    z[12] = z[20] + 1.9e-9 * step  # within 2e-9
    z[13] = z[21] + 2.1e-9 * step  # beyond
    z[2] = z[12] + 1.5e-9 * step  # 3.4e-9 from 20: by way of 12
    found = find_culprits(z.to(device), error.to(device))
    near = {tuple(c.samples): c.distance for c in found}
    assert near.keys() == {(5, 9), (2, 12, 20)} and {c.kind for c in found} == {"near-identical"}
    assert near[5, 9] == pytest.approx(2.9e-3) and near[2, 12, 20] == pytest.approx(
        1.5e-9, rel=1e-5
    )
    assert [c.distance for c in found] == sorted(near.values())


def test_near_identical_agree_with_all_pairs():
    """Errors of very different size, many overlaps along the projection."""
    z = draw(200, 3)
    error = 0.06 * draw(200, 1, seed=2).abs()[:, 0] ** 3
    distance = torch.cdist(z, z)
    near = (distance <= error[:, None] + error).fill_diagonal_(False)
    reached = near | torch.eye(200, dtype=torch.bool)
    for _ in range(8):
        reached = (reached.double() @ reached.double()) > 0
    expected = {tuple(row.nonzero()[:, 0].tolist()) for row in reached if row.sum() > 1}
    found = find_culprits(z, error, limit=1000)
    assert {tuple(c.samples) for c in found} == expected and len(expected) > 3
    for c in found:
        inside = distance[c.samples][:, c.samples][near[c.samples][:, c.samples]]
        assert c.distance == pytest.approx(float(inside.min()), rel=1e-12)


def test_number_of_pairs_is_capped(monkeypatch):
    monkeypatch.setattr(culprits, "MAX_PAIRS", 25)
    computed = []
    norm = torch.Tensor.norm
    monkeypatch.setattr(
        torch.Tensor, "norm", lambda a, **k: (computed.append(len(a)), norm(a, **k))[1]
    )
    found = find_culprits(draw(100, 3), torch.full((100,), 9.0))  # all overlap
    assert len(found) >= 1 and sum(n for n in computed if n != 100 and n != 3) == 25


def test_infinite_errors_name_nobody():
    assert find_culprits(draw(9, 3), torch.full((9,), torch.inf)) == []


def test_dependent_rows_and_what_they_depend_on(device):
    """Row 13 = 2 row 4 - 3 row 8 + row 21: the four are named, in whatever role, and no other."""
    m = draw(30, 40)
    m[13] = 2 * m[4] - 3 * m[8] + m[21]
    (c,) = find_culprits(draw(30, 5, seed=1), None, m.to(device))
    assert c.kind == "dependent" and c.distance < 1e-6
    assert sorted(c.samples) == [4, 8, 13, 21]


def test_dependent_rows_come_closest_first_and_within_the_tolerance():
    m = torch.eye(12, dtype=torch.float64).repeat(1, 4)  # rows of length 2
    m[3] = m[0] + 1e-3 * m[3]
    m[7] = m[1] + 1e-5 * m[7]
    z = draw(12, 5)
    assert find_culprits(z, None, m) == []
    (c,) = find_culprits(z, None, m, tolerance=1e-4)
    assert sorted(c.samples) == [1, 7] and c.distance == pytest.approx(1e-5, rel=1e-3)
    close, far = find_culprits(z, None, m, tolerance=1e-2)
    assert sorted(close.samples) == [1, 7] and sorted(far.samples) == [0, 3]
    assert far.distance == pytest.approx(1e-3, rel=1e-3)
    assert len(find_culprits(z, None, m, tolerance=1e-2, limit=1)) == 1


def test_more_samples_than_columns():
    found = find_culprits(draw(30, 5), None, draw(30, 12, seed=1))
    assert len(found) == 18 and all(2 <= len(c.samples) <= 1 + culprits.PARTNERS for c in found)
    first = [c.samples[0] for c in found]
    assert first == sorted(set(first))


@pytest.mark.parametrize("size", [1e300, 1e-300])
def test_rows_of_any_size(size):
    m = draw(10, 20) * size
    m[6] = m[2] * 2.0**-8
    (c,) = find_culprits(draw(10, 3), None, m)
    assert sorted(c.samples) == [2, 6]


def test_zero_rows_and_no_columns():
    m = draw(6, 9)
    m[4] = 0
    assert find_culprits(draw(6, 3), None, m) == [Culprit("dependent", [4], 0.0)]
    for nothing in (torch.zeros(3, 5), torch.zeros(3, 0)):
        found = find_culprits(draw(3, 3), None, nothing)
        assert [c.samples for c in found] == [[0], [1], [2]]
    assert "sample 0 has a row of zeros" in describe(found)[0]
    assert find_culprits(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, 3)) == []


def test_matrix_is_made_only_where_it_is_used(monkeypatch):
    monkeypatch.setattr(culprits, "LARGEST", 9)
    z, m = draw(10, 3), draw(10, 12)
    m[9] = m[0]
    calls = []
    make = lambda: (calls.append(1), m)[1]  # noqa: E731
    assert find_culprits(z, None, make) == [] and calls == []
    z[1] = z[0]  # nine different ones are left
    found = find_culprits(z, None, make)
    assert calls == [1] and [c.kind for c in found] == ["identical", "dependent"]


def test_text():
    found = [
        *(Culprit("identical", [i, i + 50], 0.0) for i in range(7)),
        Culprit("identical", list(range(20)), 0.0),
        Culprit("near-identical", [3, 4], 1.5e-9),
        Culprit("dependent", [8, 1, 2], 3e-9),
    ]
    lines = describe(found, limit=2)
    assert lines == [
        "samples 0, 50 have identical features",
        "samples 1, 51 have identical features",
        "... and 6 more groups of samples with identical features",
        "samples 3, 4 are closer than the error of their features allows to tell apart "
        "(distance 1.5e-09)",
        "sample 8 depends on others, above all on 1, 2 (relative distance 3.0e-09 from their span)",
    ]
    (line,) = describe([found[7]])
    assert line == "samples 0, 1, 2, 3, 4, 5, 6, 7 and 12 more have identical features"
    assert describe([]) == []


def test_errors():
    z = draw(5, 3)
    with pytest.raises(ValueError, match="error: expected 5 rows, one for each of z, got 4"):
        find_culprits(z, torch.zeros(4))
    with pytest.raises(ValueError, match="matrix: expected 5 rows, one for each of z, got 6"):
        find_culprits(z, None, draw(6, 8))
    m = draw(5, 8)
    m[2, 1] = torch.nan
    with pytest.raises(ValueError, match="matrix: NaN or infinity in the row of sample 2"):
        find_culprits(z, None, m)
    z[3] = torch.inf
    with pytest.raises(ValueError, match="z: NaN or infinity in the input of sample 3"):
        find_culprits(z)
