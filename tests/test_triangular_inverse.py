"""Columns of an inverse: the kernel against its twin, the bound against fractions and SVDs."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch.library import opcheck

from helpers import on_each_isa
from twophase import reference
from twophase_ext.expressivity import inverse_columns
from twophase_ext.expressivity.inverse_columns import inverse_frobenius_upper
from twophase_ext.ops.triangular_inverse import triangular_inverse_squares


def drawn(n: int, share: float, size: float = 1.0, seed: int = 0) -> np.ndarray:
    """Dense [n, n], lower triangular, its diagonal near 1."""
    rng = np.random.default_rng(seed)
    rest = rng.standard_normal((n, n)) * size * (rng.random((n, n)) < share)
    return np.tril(rest, -1) + np.diag(rng.uniform(0.5, 2, n))


def parts(dense: np.ndarray) -> tuple[torch.Tensor, ...]:
    sparse = csr_matrix(dense)
    columns = [torch.from_numpy(x.astype("int64")) for x in (sparse.indptr, sparse.indices)]
    return *columns, torch.from_numpy(sparse.data)


@pytest.mark.parametrize(("n", "share"), [(1, 1.0), (15, 1.0), (16, 0.2), (17, 0.5), (200, 0.02)])
def test_columns_are_those_of_the_twin(n, share):
    dense = drawn(n, share, 0.3)
    wanted = reference.triangular_inverse_squares(torch.from_numpy(dense))
    for found in on_each_isa(lambda: triangular_inverse_squares(*parts(dense))):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_the_bound_lies_above_exact_fractions_and_near_them():
    """Powers of two and small integers: L^-1 in rational arithmetic."""
    rng = np.random.default_rng(3)
    n = 24
    dense = np.tril(rng.integers(-3, 4, (n, n)) * (rng.random((n, n)) < 0.3), -1) + np.eye(n)
    inverse = [[Fraction(0)] * n for _ in range(n)]
    for j in range(n):
        for i in range(j, n):
            total = Fraction(int(i == j))
            total -= sum(Fraction(int(dense[i, k])) * inverse[k][j] for k in range(j, i))
            inverse[i][j] = total
    exact = math.sqrt(sum(x * x for row in inverse for x in row))
    found = inverse_frobenius_upper(csr_matrix(dense.astype(float)))
    assert exact <= found <= exact * (1 + 1e-5)


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
def test_the_bound_lies_above_the_inverse_of_the_smallest_singular_value(size):
    for seed in range(5):
        dense = drawn(60, 0.1, size, seed)
        found = inverse_frobenius_upper(csr_matrix(dense))
        smallest = np.linalg.svd(dense, compute_uv=False)[-1]
        assert found >= (1 - 1e-9) / smallest
        assert found <= (1 + 1e-5) * np.linalg.norm(np.linalg.inv(dense))


def test_no_bound_where_there_is_none(monkeypatch):
    huge = drawn(400, 0.9, 50.0)  # an inverse beyond what rounding lets anybody see
    assert inverse_frobenius_upper(csr_matrix(huge)) == math.inf
    for value in (math.nan, math.inf):
        lost = drawn(20, 0.5)
        lost[9, 3] = value
        assert inverse_frobenius_upper(csr_matrix(lost)) == math.inf
    monkeypatch.setattr(inverse_columns, "MOST", 100)
    assert inverse_frobenius_upper(csr_matrix(drawn(20, 0.5))) == math.inf


def test_opcheck_and_refusals():
    starts, columns, values = parts(drawn(9, 0.5))
    op = torch.ops.twophase.triangular_inverse_squares
    assert set(opcheck(op, (starts, columns, values)).values()) == {"SUCCESS"}
    for arguments, text in [
        ((starts.int(), columns, values), "starts: expected int64"),
        ((starts, columns, values.float()), "values: expected float64"),
        ((starts, columns, values[1:]), "values: expected float64"),
        ((starts[:0], columns, values), "starts: expected n"),
        ((starts[:-1], columns, values), "starts: expected 0 first"),
        ((starts, columns.flip(0), values), "columns: expected"),
        ((starts, columns.clone().fill_(0), values), "columns: expected the diagonal last"),
        ((starts.flip(0), columns, values), "starts: expected 0 first"),
    ]:
        with pytest.raises(ValueError, match=text):
            triangular_inverse_squares(*arguments)
