"""Bounds of ||L^-1|| against LAPACK, and factorizations that lie."""

from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import scipy.sparse.linalg
from scipy.sparse import csc_matrix, csr_matrix, diags, eye

from twophase_ext.linalg import sparse_triangular
from twophase_ext.linalg.sparse_triangular import (
    inverse_norm_upper,
    lambda_min_lower,
    norm_upper_of_magnitudes,
)


def lower(n: int, density: float, seed: int = 0, heavy: int = 0) -> csr_matrix:
    """Non-negative entries below a positive diagonal; `heavy` full columns."""
    rng = np.random.default_rng(seed)
    dense = np.tril(rng.random((n, n)) * (rng.random((n, n)) < density), -1)
    dense[:, :heavy] = np.tril(rng.random((n, n)), -1)[:, :heavy]
    np.fill_diagonal(dense, 0.5 + rng.random(n))
    return csr_matrix(dense)


def chain(n: int, below: float) -> csr_matrix:
    """1 on the diagonal, `below` under it: the smallest singular value shrinks like below^-n."""
    return (eye(n) + diags([below], [-1], shape=(n, n))).tocsr()


def sigma_min(matrix: csr_matrix) -> float:
    return float(np.linalg.svd(matrix.toarray(), compute_uv=False)[-1])


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize(
    "matrix",
    [lower(1, 0), lower(60, 0.05), lower(200, 0.02, 1, 5), lower(150, 0.3, 2), chain(9, 1)],
)
def test_bounds_lie_above_the_truth_and_near_it(matrix, scale):
    truth = 1 / sigma_min(matrix)
    compared, better = inverse_norm_upper((matrix * scale).tocsr())
    assert truth * (1 - 1e-9) <= better * scale <= 1.03 * truth
    assert better <= compared


def test_signs_count():
    """The comparison matrix of a triangle of ones has an inverse that grows, itself it has not."""
    dense = csr_matrix(np.tril(np.ones((200, 200))))  # inverse: 1 and -1, of norm below 2
    compared, better = inverse_norm_upper(dense)
    assert compared > 1e50 and 1.9 < better < 2.1


@pytest.mark.parametrize("below", [1.5, 2.0, 3.0])
def test_no_bound_where_there_is_next_to_nothing(below):
    """sigma_min below what float64 sees of L L^T: the comparison matrix alone still knows."""
    compared, better = inverse_norm_upper(chain(100, below))
    with mpmath.workdps(80):
        least = (1 - mpmath.mpf(below) ** -2) * mpmath.mpf(below) ** -99
        assert better >= 0.99 / least  # ||L^-1|| >= its corner entry below^99
    assert better == compared


@pytest.mark.parametrize("name", ["MOST_NUMBERS", "MOST_PRODUCTS"])
def test_what_takes_too_long_is_left_out(monkeypatch, name):
    matrix = chain(200, 1.0)
    monkeypatch.setattr(sparse_triangular, name, 300)
    compared, better = inverse_norm_upper(matrix)
    assert better == compared > 100


@pytest.mark.parametrize("seed", range(3))
def test_never_above_lambda_min_whatever_the_shift(seed):
    matrix = lower(40, 0.1, seed)
    with mpmath.workdps(60):
        exact = mpmath.matrix(matrix.toarray().tolist())
        values = mpmath.eigsy(exact * exact.T, eigvals_only=True)
        truth, size = min(values), float(max(values))
        for share in (
            0.5,
            0.99,
            1 - 1e-12,
            1 - 1e-14,
            1,
            1 + 1e-14,
            1 + 1e-12,
            1.5,
            1e9,
            -1,
            np.nan,
        ):
            found = lambda_min_lower(matrix, float(truth) * share)
            assert not found > truth
            if 0 < share <= 1 - 1e-12:
                assert found > float(truth) * share - 1e-13 * size


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1.0, 1e150])
def test_the_norm_of_magnitudes(scale):
    """Above the truth and near it, whatever the signs."""
    for matrix in (lower(1, 0), lower(80, 0.05, 3), lower(200, 0.02, 4, 5), chain(50, 2.0)):
        truth = np.linalg.norm(matrix.toarray(), 2)
        found = norm_upper_of_magnitudes((matrix * scale).tocsr()) / scale
        assert truth * (1 - 1e-12) <= found <= 1.1 * truth
        signs = np.sign(np.random.default_rng(0).random(matrix.shape) - 0.5)
        assert np.linalg.norm(matrix.toarray() * signs, 2) <= found
    assert norm_upper_of_magnitudes(0 * chain(5, 1.0)) == 0
    assert not norm_upper_of_magnitudes(chain(5, np.nan)) < np.inf


class Lie:
    """What SciPy's SuperLU returns, with something replaced."""

    def __init__(self, true, **replaced):
        self.L, self.U, self.perm_r = true.L, true.U, true.perm_r
        vars(self).update(replaced)


def unit(n: int) -> csc_matrix:
    return eye(n, format="csc")


LIES = {
    "the unit matrix": lambda true, n: Lie(true, L=unit(n), U=unit(n)),
    "a large factor": lambda true, n: Lie(true, U=1e6 * true.U),
    "a small factor": lambda true, n: Lie(true, U=1e-6 * true.U),
    "nothing": lambda true, n: Lie(true, L=0 * true.L),
    "NaN in L": lambda true, n: Lie(true, L=csc_matrix(true.L * np.nan)),
    "NaN in one pivot": lambda true, n: Lie(
        true, U=diags(np.where(np.arange(n) == n // 2, np.nan, true.U.diagonal())).tocsc()
    ),
    "infinite pivots": lambda true, n: Lie(true, U=unit(n) * np.inf),
    "magnitudes of the pivots": lambda true, n: Lie(true, U=abs(true.U)),
    "another order": lambda true, n: Lie(true, perm_r=true.perm_r[::-1]),
    "no order": lambda true, n: Lie(true, perm_r=np.zeros(n, dtype=np.int32)),
    "an order out of range": lambda true, n: Lie(true, perm_r=true.perm_r * 10**6),
    "a smaller matrix": lambda true, n: Lie(
        true, L=true.L[:-1, :-1].tocsc(), U=true.U[:-1, :-1].tocsc(), perm_r=np.arange(n - 1)
    ),
    "a part of the factor": lambda true, n: Lie(true, L=diags(true.L.diagonal()).tocsc()),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize(
    "matrix", [chain(30, 2.0), lower(40, 0.2), csr_matrix(np.ones((5, 5))), 0 * chain(3, 1.0)]
)
def test_a_factorization_that_lies_gives_no_false_bound(monkeypatch, name, matrix):
    n = matrix.shape[0]
    true_splu = scipy.sparse.linalg.splu

    def splu(given, **options):
        try:
            return LIES[name](true_splu(given, **options), n)
        except RuntimeError:  # of a singular matrix: the lie is about another one
            return LIES[name](true_splu(given + 3 * unit(n), **options), n)

    monkeypatch.setattr(scipy.sparse.linalg, "splu", splu)
    truth = sigma_min(matrix) ** 2
    with np.errstate(all="ignore"):
        for shift in (1e-12, 1e-3, 0.9 * truth, 1.1 * truth, 2.0):
            assert not lambda_min_lower(matrix, shift) > truth * (1 + 1e-9) + 1e-14


def test_success_of_the_factorization_proves_nothing(monkeypatch):
    """Without the residual the lies above are believed."""
    monkeypatch.setattr(sparse_triangular, "norm_upper_of_magnitudes", lambda _: 0.0)
    monkeypatch.setattr(
        scipy.sparse.linalg,
        "splu",
        lambda given, **_: SimpleNamespace(L=unit(30), U=unit(30), perm_r=np.arange(30)),
    )
    assert lambda_min_lower(chain(30, 2.0), 0.5) > 0.4 > sigma_min(chain(30, 2.0)) ** 2


def test_a_factorization_that_fails_is_no_error(monkeypatch):
    def splu(*_, **__):
        raise RuntimeError("Factor is exactly singular")

    monkeypatch.setattr(scipy.sparse.linalg, "splu", splu)
    compared, better = inverse_norm_upper(chain(50, 1.0))
    assert compared == better < np.inf
