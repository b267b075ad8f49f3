"""screen_products: exact integers against the twin, rounding against its bound."""

import numpy as np
import pytest
import torch
from torch.library import opcheck

from helpers import on_each_isa
from twophase import reference
from twophase_ext.ops.screen_products import PANEL, packed_columns, screen_products

ALL = 1 << 40


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small enough that every product is exact in float32."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=g).float()


def ordered(pairs: torch.Tensor) -> list[list[int]]:
    return sorted(pairs.tolist())


@pytest.mark.parametrize(
    ("m", "c", "d"),
    [(1, 32, 1), (13, 64, 3), (84, 96, 256), (85, 32, 257), (200, 320, 40), (300, 1024, 600)],
)
def test_exact_products_are_the_twins(m, c, d):
    rows, columns = integers(m, d), integers(c, d, seed=1)
    threshold = (rows @ columns.T).quantile(0.97, dim=0).round()
    wanted = reference.screen_products(rows, columns, threshold)
    panels = packed_columns(columns)
    for found in on_each_isa(lambda: screen_products(rows, panels, threshold, ALL)):
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        assert ordered(found[2]) == wanted[2].tolist()
    assert 0 < len(wanted[2]) < m * c / 10 or m * c < 1000


def test_rounding_is_within_its_bound():
    """Against float64, with sums that cancel; torch's own product has the same bound."""
    g = torch.Generator().manual_seed(2)
    rows, columns = torch.randn(90, 300, generator=g), torch.randn(64, 300, generator=g)
    exact = rows.double() @ columns.double().T
    bound = 300 * 2.0**-24 * (rows.double().abs() @ columns.double().abs().T)
    for found in on_each_isa(
        lambda: screen_products(rows, packed_columns(columns), exact.amax(0).float(), ALL)
    ):
        largest, where, pairs = found
        at = exact.gather(1, where[:, None])[:, 0]
        allowed = bound.gather(1, where[:, None])[:, 0]
        assert ((largest.double() - at).abs() <= allowed).all()
        assert (largest.double() >= (exact - bound).amax(1)).all()
        i, j = pairs.unbind(1)
        assert (exact[i, j] + bound[i, j] >= exact.amax(0)[j]).all() and len(pairs) <= 64


def test_thresholds_are_strict_and_nan_is_never_below():
    rows, columns = integers(20, 5), integers(64, 5, seed=3)
    products = rows @ columns.T
    panels = packed_columns(columns)
    assert len(screen_products(rows, panels, products.amax(0), ALL)[2]) == 0
    low = torch.nextafter(products.amax(0), torch.tensor(-torch.inf))
    assert len(screen_products(rows, panels, low, ALL)[2]) == (products == products.amax(0)).sum()
    low[7] = torch.nan
    assert (screen_products(rows, panels, low, ALL)[2][:, 1] == 7).sum() == 20
    rows[3, 2] = torch.nan
    pairs = screen_products(rows, panels, products.amax(0), ALL)[2]
    assert ordered(pairs) == [[3, j] for j in range(64)]


def test_nothing_to_multiply_and_columns_left_out():
    rows, columns = integers(5, 4), integers(64, 4, seed=4)
    panels = packed_columns(columns)
    largest, where, pairs = screen_products(rows, panels, torch.empty(0), ALL)
    assert (largest == -torch.inf).all() and (where == 0).all() and pairs.shape == (0, 2)
    assert [len(x) for x in screen_products(rows[:0], panels, torch.zeros(32), ALL)] == [0, 0, 0]
    first = screen_products(rows, panels, torch.zeros(32), ALL)
    wanted = reference.screen_products(rows, columns[:32], torch.zeros(32))
    assert torch.equal(first[0], wanted[0]) and ordered(first[2]) == wanted[2].tolist()
    padded = packed_columns(columns[:40])
    assert padded.shape == (2, 4, PANEL) and not padded[1, :, 8:].any()


def test_the_same_bits_for_any_threads_and_a_limit_of_pairs():
    g = torch.Generator().manual_seed(5)
    rows, columns = torch.randn(400, 70, generator=g), torch.randn(640, 70, generator=g)
    panels, threshold = packed_columns(columns), torch.full((640,), 12.0)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(screen_products(rows, panels, threshold, ALL))
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )
    count = len(found[0][2])
    assert len(screen_products(rows, panels, threshold, count)[2]) == count > 100
    assert count > len(screen_products(rows, panels, threshold, 10)[2]) > 10


def test_opcheck_and_refusals():
    op = torch.ops.twophase.screen_products
    rows, panels, threshold = integers(7, 3), packed_columns(integers(64, 3)), torch.zeros(64)
    assert set(opcheck(op, (rows, panels, threshold, 5)).values()) == {"SUCCESS"}
    strided = integers(3, 7).T, panels.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = screen_products(*(x.contiguous() for x in strided), threshold, ALL)
    found = screen_products(*strided, threshold, ALL)
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    for arguments, text in [
        ((rows.double(), panels, threshold, 5), "rows: expected float32"),
        ((rows[0], panels, threshold, 5), "rows: expected 2 dimensions"),
        ((rows, panels[:, :2], threshold, 5), r"panels: expected shape \[p, 3, 32\]"),
        ((rows, panels, threshold[:40], 5), "threshold: expected a multiple of 32"),
        ((rows, panels, torch.zeros(96), 5), "threshold: .* at most 64"),
        ((rows, panels, threshold, -1), "most: expected a number >= 0"),
    ]:
        with pytest.raises(ValueError, match=text):
            screen_products(*arguments)
