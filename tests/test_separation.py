"""Distinct rows within error bounds: proved, and never proved where rows may coincide."""

import math
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import cpu_seconds
from twophase_ext.expressivity import separation
from twophase_ext.expressivity.separation import Separation, separate


def _random(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _bounds(n: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((n,), value, dtype=torch.float64)


def _exact(z: torch.Tensor, i: int, j: int) -> Fraction:
    """||z_i - z_j||^2 in rational arithmetic."""
    pairs = zip(z[i].tolist(), z[j].tolist(), strict=True)
    return sum(((Fraction(a) - Fraction(b)) ** 2 for a, b in pairs), Fraction(0))


def _truly_apart(z: torch.Tensor, error: torch.Tensor) -> bool:
    needed = [Fraction(e) for e in error.tolist()]
    n = len(z)
    return all(_exact(z, i, j) > (needed[i] + needed[j]) ** 2 for i in range(n) for j in range(i))


def _assert_consistent(found: Separation, z: torch.Tensor, error: torch.Tensor) -> None:
    for i, j, distance, needed in found.closest:
        assert i < j
        assert Fraction(distance) ** 2 <= _exact(z, i, j)
        assert Fraction(needed) >= Fraction(float(error[i])) + Fraction(float(error[j]))
    if found.proved:
        assert all(distance > needed for _, _, distance, needed in found.closest)


@pytest.mark.parametrize("n, d", [(1, 1), (1, 5), (2, 1), (50, 1), (50, 3), (300, 40)])
def test_distinct_rows_are_proved(n, d):
    z = _random(n, d)
    for error in (_bounds(n), _bounds(n, 1e-9)):
        found = separate(z, error)
        assert found.proved and found.overlapping == 0 and found.margin > 0
        _assert_consistent(found, z, error)
    assert len(found.closest) == min(10, n - 1)


def test_margin_is_that_of_the_pairs_compared():
    z = torch.tensor([[0.0, 0], [3, 4], [30, 40]], dtype=torch.float64)
    found = separate(z, torch.tensor([1.0, 1.5, 0.5], dtype=torch.float64))
    assert found.closest[0][:2] == (0, 1)
    assert found.closest[0][2:] == pytest.approx((5, 2.5), rel=1e-5)
    assert found.margin == pytest.approx(1.0, rel=1e-5)
    assert separate(z, _bounds(3)).margin == math.inf


@pytest.mark.parametrize("relative", [10.0**-k for k in range(3, 18)])
@pytest.mark.parametrize("share", [0.4, 0.4999, 0.5001, 1.0])
def test_near_duplicates(relative, share):
    """Two rows at a distance, with bounds of `share` of it each: apart below a half only."""
    z = _random(200, 16)
    z[150] = z[40] * (1 + relative)
    distance = math.sqrt(_exact(z, 40, 150))
    error = _bounds(200, 1e-20)
    error[[40, 150]] = share * distance
    found = separate(z, error, seed=3)
    _assert_consistent(found, z, error)
    if distance == 0:
        assert not found.proved and found.margin == -1
    else:
        assert found.proved == (share < 0.5)
        assert found.closest[0][:2] == (40, 150)
        assert found.margin == pytest.approx(1 / (2 * share) - 1, abs=1e-3)
        assert found.proved or found.overlapping == 1


def test_identical_rows_are_named_and_cost_nothing():
    z = _random(3000, 8)
    z[1000:2000] = z[5]
    z[2500] = z[7]
    z[2600], z[2700] = 0.0, -0.0
    found = separate(z, _bounds(3000))
    assert not found.proved and found.margin == -1 and found.overlapping == 1002
    assert [pair[:2] for pair in found.closest] == [(5, i) for i in range(1000, 1010)]
    zeros = torch.zeros(20_000, 2, dtype=torch.float64)
    assert cpu_seconds(lambda: separate(zeros, _bounds(20_000)))[1] < 5
    assert not separate(torch.zeros(2, 0, dtype=torch.float64), _bounds(2)).proved
    assert separate(torch.zeros(1, 0, dtype=torch.float64), _bounds(1)).proved


def test_ties_on_a_line_are_resolved_by_the_others():
    z = torch.cartesian_prod(*[torch.arange(2, dtype=torch.float64)] * 8)
    found = separate(z, _bounds(len(z), 0.49))
    assert found.proved and found.margin == pytest.approx(1 / 0.98 - 1, rel=1e-3)
    assert found.overlapping > 0
    assert not separate(z, _bounds(len(z), 0.5)).proved
    huge = separate(z, _bounds(len(z), 1.7e308))
    assert not huge.proved and huge.margin == -1


def test_too_many_overlaps_are_undecided(monkeypatch):
    """Clusters within one another's bounds: nothing quadratic, and what is known is said."""
    z = 1e-9 * _random(20_000, 4)
    error = _bounds(20_000, 1.0)
    found, seconds = cpu_seconds(lambda: separate(z, error))
    assert not found.proved and found.overlapping == 20_000 * 19_999 // 2
    assert len(found.closest) == 10 and seconds < 10
    # pairs that are apart, but more than either limit
    grid = torch.cartesian_prod(*[torch.arange(3, dtype=torch.float64)] * 6)
    found = separate(grid, _bounds(len(grid), 0.4))
    assert found.proved and found.overlapping > 5
    for name in ("MAX_OVERLAPS", "MAX_PAIRS"):
        with monkeypatch.context() as patch:
            patch.setattr(separation, name, 5)
            undecided = separate(grid, _bounds(len(grid), 0.4))
        assert not undecided.proved and undecided.overlapping >= found.overlapping


def test_intervals_hold_the_exact_projections():
    """Rows of large numbers: the computed projections are off by more than their last bits."""
    z = 1e8 + _random(50, 64)
    lines = separation._lines(z, 4)
    for k, (low, high) in enumerate(separation._intervals(z, _bounds(50), 4)):
        line = [Fraction(v) for v in lines[:, k].tolist()]
        for i, row in enumerate(z.tolist()):
            place = sum((Fraction(a) * b for a, b in zip(row, line, strict=True)), Fraction(0))
            assert Fraction(float(low[i])) <= place <= Fraction(float(high[i]))


def test_all_pairs_are_compared_whatever_the_block(monkeypatch):
    z = torch.cartesian_prod(*[torch.arange(3, dtype=torch.float64)] * 4)
    error = _bounds(len(z), 0.4)
    error[[17, 44]] = 1.01 * math.sqrt(_exact(z, 17, 44)) / 2
    for block in (1, 50, 1 << 22):
        monkeypatch.setattr(separation, "BLOCK_NUMBERS", block)
        found = separate(z, error)
        assert not found.proved
        _assert_consistent(found, z, error)
        assert separate(z, _bounds(len(z), 0.49)).proved


@pytest.mark.parametrize("exponent", [-1000, -600, -500, 0, 500, 600, 1010])
def test_extreme_sizes(exponent):
    z = _random(60, 5) * 2.0**exponent
    apart = 2.0**exponent
    assert separate(z, _bounds(60, 1e-6 * apart)).proved
    z[3] = z[8] * (1 + 2.0**-40)
    assert separate(z, _bounds(60, 1e-16 * apart)).proved
    assert not separate(z, _bounds(60, 1e-11 * apart)).proved


def test_huge_numbers_do_not_hide_what_a_line_separates():
    z = _random(1500, 3) * 2.0**1010
    assert separate(z, _bounds(1500)).overlapping == 0


def test_rows_of_very_different_sizes():
    sizes = [2.0**k for k in range(-400, 400, 10)]
    z = _random(80, 4) * torch.tensor(sizes, dtype=torch.float64)[:, None]
    assert separate(z, _bounds(80)).proved
    assert not separate(z, _bounds(80, 1e-100)).proved


def test_common_offset():
    """The projections' own rounding: rows that differ in their last bits only."""
    z = 1e8 + torch.arange(100, dtype=torch.float64)[:, None] * 2.0**-26 * torch.ones(1, 7)
    found = separate(z, _bounds(100))
    assert found.proved
    assert not separate(z, _bounds(100, math.sqrt(7) * 2.0**-27)).proved


@settings(max_examples=60)
@given(st.data())
def test_proved_only_if_true(data):
    """Small integers and bounds near their distances, judged by rational arithmetic."""
    n, d = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    entries = st.lists(st.integers(-2, 2), min_size=n * d, max_size=n * d)
    z = torch.tensor(data.draw(entries), dtype=torch.float64).reshape(n, d)
    z = z * 2.0 ** data.draw(st.integers(-60, 60))
    unit = float(z.abs().max())
    steps = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    error = torch.tensor(steps, dtype=torch.float64) * (unit / 8)
    found = separate(z, error, seed=data.draw(st.integers(0, 5)))
    _assert_consistent(found, z, error)
    truth = _truly_apart(z, error)
    assert truth or not found.proved
    # what is true by more than rounding is proved
    assert found.proved or not _truly_apart(z, error * (1 + 1e-5))


def test_the_seed_decides_the_lines_and_nothing_else():
    z = _random(100, 6)
    state = torch.get_rng_state()
    a, b = separate(z, _bounds(100, 1e-3), seed=1), separate(z, _bounds(100, 1e-3), seed=1)
    assert a.closest == b.closest and torch.equal(state, torch.get_rng_state())
    assert separate(z, _bounds(100, 1e-3), seed=2).proved


def test_time():
    z = _random(20_000, 64)
    found, seconds = cpu_seconds(lambda: separate(z, _bounds(20_000, 1e-6)))
    assert found.proved and seconds < 15


@pytest.mark.parametrize(
    "z, error, kind, text",
    [
        (torch.zeros(2, 3), _bounds(2), TypeError, "float32"),
        ([[0.0]], _bounds(1), TypeError, "list"),
        (_random(3, 2), _bounds(3).float(), TypeError, "error"),
        (_random(3, 2)[0], _bounds(2), ValueError, "shapes"),
        (_random(3, 2), _bounds(2), ValueError, "shapes"),
        (_random(0, 2), _bounds(0), ValueError, "n >= 1"),
        (_random(3, 2) * math.nan, _bounds(3), ValueError, "z: .*NaN"),
        (_random(3, 2) / 0, _bounds(3), ValueError, "z: .*infinity"),
        (_random(3, 2), _bounds(3, math.nan), ValueError, "error: .*NaN"),
        (_random(3, 2), _bounds(3, math.inf), ValueError, "error"),
        (_random(3, 2), _bounds(3, -1.0), ValueError, "error"),
    ],
)
def test_wrong_arguments(z, error, kind, text):
    with pytest.raises(kind, match=text):
        separate(z, error)


def test_a_mapped_file_is_read_in_blocks(tmp_path, monkeypatch):
    """Memory beside the file is what working_bytes says: not a copy of the features."""
    n, d = 40_000, 512
    monkeypatch.setattr(separation, "BLOCK_NUMBERS", 1 << 16)
    rows = np.lib.format.open_memmap(tmp_path / "z.npy", mode="w+", dtype=float, shape=(n, d))
    rows[:, :3] = _random(n, 3).numpy()
    z = torch.from_numpy(np.load(tmp_path / "z.npy", mmap_mode="c"))
    separate(z[:9], _bounds(9))
    before = peak = _anonymous_bytes()
    ended = threading.Event()

    def watch():
        nonlocal peak
        while not ended.wait(1e-3):
            peak = max(peak, _anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert separate(z, _bounds(n, 1e-12)).proved
    finally:
        ended.set()
        thread.join()
    allowed = separation.working_bytes(n, d)
    assert peak - before <= allowed < z.nbytes / 3


def _anonymous_bytes():
    """Resident memory of this process that is not of a file."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])
