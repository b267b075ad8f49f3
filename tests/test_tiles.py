"""Gram and Cholesky by tiles: bounds against exact rationals, soundness, plans."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from twophase_ext.linalg import cholesky_tiles
from twophase_ext.linalg.bounds import UNIT_ROUNDOFF, gamma, shifted_down
from twophase_ext.linalg.certificate import certify_gram
from twophase_ext.linalg.gram_tiles import MatrixSource, accumulate, e_G
from twophase_ext.linalg.journal import RecordedTiles
from twophase_ext.linalg.progress import Stage
from twophase_ext.linalg.residual import residual_bound
from twophase_ext.linalg.shift import extrapolated, shifts_to_try
from twophase_ext.linalg.tiles import DenseTiles, Grid, MemoryTiles

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(n, p, seed=0, low_rank=None):
    g = torch.Generator().manual_seed(seed)
    if low_rank is None:
        return torch.randn(n, p, generator=g, dtype=torch.float64)
    a = torch.randn(n, low_rank, generator=g, dtype=torch.float64)
    return a @ torch.randn(low_rank, p, generator=g, dtype=torch.float64)


def integers(n, p, rank, seed=0):
    """Integer entries, so its rank is exact."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randint(-3, 4, (n, rank), generator=g)
    return (a @ torch.randint(-3, 4, (rank, p), generator=g)).double()


def exact(matrix):
    return [[Fraction(x) for x in row] for row in matrix.tolist()]


def times_transposed(a):
    return [[sum(x * y for x, y in zip(r, s, strict=True)) for s in a] for r in a]


def tiles_of(n, tile):
    return RecordedTiles("T", MemoryTiles(Grid(n, tile), CPU, CPU), None, None)


def dense(tiles):
    grid = tiles.grid
    out = torch.zeros(grid.n, grid.n, dtype=torch.float64)
    for i, j in grid.lower():
        out[grid.rows(i), grid.rows(j)] = tiles.read(i, j)
    return out


def gram_of(matrix, tile, panel, passes=None, source=None):
    tiles = tiles_of(len(matrix), tile)
    source = source or MatrixSource(matrix)
    settings = {"panel": panel, "group_bytes": 1 << 30, "passes": passes, "stage": Stage("")}
    accumulate(source, None, tiles, (), **settings)
    return tiles


def growing(n, p):
    """Each addition loses half a unit: 1 first, then what rounds away."""
    m = torch.full((n, p), 2.0**-27, dtype=torch.float64) * 1.3
    m[:, 0] = 1
    return m


# --- the bounds, against exact rationals


@pytest.mark.parametrize("panel", [1, 3, 8, 64])
@pytest.mark.parametrize("matrix", [normal(7, 37), growing(6, 37), normal(5, 37) ** 9])
def test_gram_error_is_within_its_bound_entry_by_entry(matrix, panel):
    n, p = matrix.shape
    gram = dense(gram_of(matrix, 3, panel))
    m = exact(matrix)
    truth = times_transposed(m)
    size = times_transposed([[abs(x) for x in row] for row in m])
    k = gamma(min(panel, p) + -(-p // min(panel, p)))
    errors = [
        (abs(Fraction(float(gram[i, j])) - truth[i][j]), Fraction(k) * size[i][j])
        for i in range(n)
        for j in range(i + 1)
    ]
    assert all(error <= bound for error, bound in errors)
    total = np.array([[float(Fraction(float(gram[max(i, j), min(i, j)])) - truth[i][j])
                       for j in range(n)] for i in range(n)])  # fmt: skip
    bound = e_G(float(gram.trace()), p, panel)
    assert np.linalg.norm(total, 2) <= bound
    if panel == 1:  # adversarial data come within a factor of the bound
        assert bound <= 1000 * np.linalg.norm(total, 2)


def factored(a, shift, tile, done=None):
    """Tiles of L and the Factorization for a symmetric matrix."""
    lower = tiles_of(len(a), tile)
    return lower, cholesky_tiles.factor(DenseTiles(a, tile), lower, shift, done or {}, Stage(""))


def backward_error(a, shift, lower):
    """|| L L^T - A ||_2 from exact rationals."""
    shifted = a.clone()
    shifted.diagonal().copy_(shifted_down(a.diagonal(), shift))
    product, wanted = times_transposed(exact(lower)), exact(shifted)
    n = len(a)
    error = [[float(product[i][j] - wanted[max(i, j)][min(i, j)]) for j in range(n)]
             for i in range(n)]  # fmt: skip
    return np.linalg.norm(np.array(error), 2)


@pytest.mark.parametrize("tile", [3, 5, 8, 23, 40])
@pytest.mark.parametrize("leaf", [1, 2, 100])
def test_cholesky_error_is_within_its_bound(monkeypatch, tile, leaf):
    monkeypatch.setattr(cholesky_tiles, "LEAF", leaf)
    for m in (normal(23, 30), normal(23, 30) ** 5, normal(23, 200).abs() + 50):
        a = m @ m.T
        shift = float(torch.linalg.eigvalsh(a)[0]) / 2
        lower, result = factored(a, shift, min(tile, 23))
        assert result.failed_pivot is None
        error = backward_error(a, shift, dense(lower))
        assert error <= result.e_C(lower.grid) <= 1e4 * error
        assert result.e_C(lower.grid) <= 2 * cholesky_tiles.expected_e_C(
            float(a.trace()), lower.grid
        )
        assert residual_bound(DenseTiles(a, tile), lower, shift) >= error if tile <= 23 else True


def test_bound_holds_for_a_library_that_solves_badly(monkeypatch):
    solve, factor = torch.linalg.solve_triangular, torch.linalg.cholesky_ex
    monkeypatch.setattr(cholesky_tiles, "LEAF", 3)
    m = normal(20, 30)
    a = m @ m.T
    for name, bad in (
        ("solve_triangular", lambda *x, **k: solve(*x, **k) * (1 + 1e-9)),
        ("cholesky_ex", lambda x: (factor(x)[0] * (1 + 1e-9), factor(x)[1])),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, name, bad)
            lower, result = factored(a, 0.1, 7)
        error = backward_error(a, 0.1, dense(lower))
        assert error > 1e-10
        assert error <= result.e_C(lower.grid) <= 100 * error


def test_residual_bound_of_any_factor():
    m = normal(30, 40)
    a = m @ m.T
    shift = 0.5
    shifted = a - shift * torch.eye(30, dtype=torch.float64)
    factor = torch.linalg.cholesky(shifted)
    for L, expected in ((factor, 0.0), (factor.float().double(), 1e-6), (factor * 1.1, 1.0)):
        garbage = L + torch.ones(30, 30, dtype=torch.float64).triu(1)  # above the diagonal
        bound = residual_bound(DenseTiles(a, 11), DenseTiles(garbage, 11), shift)
        error = backward_error(a, shift, L)
        assert error <= bound <= 30 * error + 3e-12 and bound >= expected
    factor[3, 1] = torch.nan
    assert not residual_bound(DenseTiles(a, 11), DenseTiles(factor, 11), shift) >= 0


# --- the certificate


def smallest(matrix):
    return float(torch.linalg.eigvalsh(matrix @ matrix.T)[0])


@pytest.mark.parametrize(
    "n, p, tile, panel",
    [(1, 1, None, 2048), (1, 5, 3, 2), (5, 5, 2, 2), (64, 90, 16, 7), (65, 90, 16, 100),
     (300, 330, None, 2048), (400, 500, 128, 128)],
)  # fmt: skip
def test_a_well_conditioned_matrix_is_proved(n, p, tile, panel, device):
    m = normal(n, p).abs() + torch.eye(n, p, dtype=torch.float64)
    c = certify_gram(MatrixSource(m.to(device)), tile=tile, panel=panel)
    truth = smallest(m)
    assert c.proved and c.attempts == 1
    assert truth / 3 <= c.ell <= truth
    assert c.sigma_min_lower == pytest.approx(math.sqrt(c.ell), rel=1e-12)
    logdet = float(torch.linalg.slogdet(m @ m.T)[1])
    assert c.logdet_lower <= logdet
    assert abs(c.logdet_estimate - logdet) <= 0.5 * (logdet - c.logdet_lower) + 1e-9
    assert c.e_G + c.e_C < 1e-8 * c.trace


def deficient():
    normal_60 = normal(60, 80)
    twice = normal_60.clone()
    twice[41] = twice[3]
    negated = normal_60.clone()
    negated[59] = -negated[0]
    hilbert = 1 / (torch.arange(30.0, dtype=torch.float64)[:, None] + torch.arange(1.0, 41))
    lauchli = torch.cat([torch.ones(20, 1), 1e-9 * torch.eye(20)], 1).double()
    zero_row = normal_60.clone()
    zero_row[17] = 0
    return {
        "equal rows": twice,
        "opposite rows": negated,
        "row of zeros": zero_row,
        "integers of rank n - 1": integers(40, 60, 39),
        "large integers of rank n - 1": integers(40, 60, 39) * 2.0**40,
        "low rank in float32": normal(60, 80, low_rank=12).float().double(),
        "product of rank n - 1": normal(60, 80, low_rank=59),
        "Hilbert": hilbert,
        "Lauchli below rounding": lauchli,
        "constant": torch.ones(30, 50, dtype=torch.float64),
        "zeros": torch.zeros(9, 12, dtype=torch.float64),
        "tiny": normal(9, 12) * 2.0**-520,
        "more rows than columns": normal(9, 8),
        "no columns": torch.zeros(3, 0, dtype=torch.float64),
    }.items()


@pytest.mark.parametrize("tile", [None, 7, 32])
@pytest.mark.parametrize("name, matrix", list(deficient()))
def test_what_is_deficient_or_beyond_rounding_is_never_proved(name, matrix, tile):
    for shift in (None, 1e-300, 1e-18, 1e-15, 1e-12, 1e-8):
        c = certify_gram(MatrixSource(matrix), tile=tile, panel=16, shift=shift)
        if name == "tiny":  # full rank: rows are scaled
            assert c.proved == (shift is None or shift > 1e-13)
        else:
            assert not c.proved and c.status == "not proved" and c.reason
            assert c.sigma_min_lower == 0 and c.logdet_lower is None
            assert not c.ell > 0


def true_lambda(matrix):
    with mpmath.workdps(60):
        m = mpmath.matrix(matrix.tolist())
        return mpmath.eigsy(m * m.T, eigvals_only=True)[0]


@pytest.mark.parametrize("exponent", [0, 6, 12, 18, 22, 24, 26, 30, 40, 52])
def test_ell_is_below_the_true_eigenvalue_for_any_shift(exponent):
    """Two rows that differ by 2^-exponent; shifts around the eigenvalue and around rounding."""
    m = normal(6, 9, seed=exponent).abs()
    m[5] = m[2]
    m[5, 4] += 2.0**-exponent
    truth = true_lambda(m)
    proofs = 0
    trace = float(m.square().sum())
    shifts = [float(truth) * f for f in (0.5, 0.9, 1 - 1e-6, 1 - 1e-12, 1, 1 + 1e-12, 1.1)]
    shifts += [trace * UNIT_ROUNDOFF * f for f in (1e-3, 0.1, 0.5, 1, 2, 4, 8, 16, 64, 256)]
    for shift in shifts:
        for tile, panel in ((6, 16), (2, 2), (3, 1)):
            c = certify_gram(MatrixSource(m), tile=tile, panel=panel, shift=shift)
            assert not c.proved or 0 < c.ell <= truth
            proofs += c.proved
    assert proofs > 0 or exponent > 18


def test_a_bound_that_drops_an_error_would_lie(monkeypatch):
    """Singular matrices whose factorization runs through by rounding alone: e_G + e_C decide."""

    def tried():
        for seed in range(20):
            g = torch.Generator().manual_seed(seed)
            m = torch.randint(-(2**27), 2**27, (6, 300), generator=g).double() * 2.0**-27
            m[5] = m[3] + m[4]  # exact, and G is not
            yield certify_gram(MatrixSource(m), tile=4, panel=512, shift=1e-15)

    honest = list(tried())
    assert not any(c.proved for c in honest)
    assert sum(c.failed_pivot is None for c in honest) >= 3
    monkeypatch.setattr(cholesky_tiles.Factorization, "e_C", lambda self, grid: 0.0)
    monkeypatch.setattr("twophase_ext.linalg.gram_run.e_G", lambda *x: 0.0)
    assert any(c.proved for c in tried())


def test_the_error_of_the_gram_matrix_decides_too(monkeypatch):
    """Rows in proportion 1 : 3, added up so that each panel rounds: G is positive definite."""

    def tried():
        for seed in range(6):
            c = 2.0**-27 * (1 + torch.randint(0, 2**20, (), generator=_seeded(seed)) / 2**20)
            row = torch.full((500,), float(c), dtype=torch.float64)
            row[0] = 1
            m = torch.stack([row, 3 * row])
            yield certify_gram(MatrixSource(m), panel=1, shift=2.0**-47)

    honest = list(tried())
    assert not any(c.proved for c in honest)
    assert sum(c.failed_pivot is None for c in honest) >= 2
    monkeypatch.setattr("twophase_ext.linalg.gram_run.e_G", lambda *x: 0.0)
    assert any(c.proved for c in tried())


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_rows_of_wildly_different_size():
    m = normal(40, 60).abs() + 3 * torch.eye(40, 60, dtype=torch.float64)
    exponents = torch.arange(40) * 50 - 980
    scaled = m * torch.tensor([2.0**e for e in exponents.tolist()], dtype=torch.float64)[:, None]
    c = certify_gram(MatrixSource(scaled), tile=16)
    assert c.proved
    plain = certify_gram(MatrixSource(m), tile=16, scale_rows=True)
    assert c.ell == plain.ell  # scaling by powers of two is exact
    low, high = c.row_exponents
    assert high - low > 1900
    assert 0 < c.sigma_min_lower <= 2.0**-980 * float(m[0].norm())
    shift = 2 * math.log(2) * float(exponents.sum())
    logdet = float(torch.linalg.slogdet(m @ m.T)[1]) + shift
    assert logdet - 40 <= c.logdet_lower <= logdet + 1e-6
    assert not certify_gram(MatrixSource(scaled), tile=16, scale_rows=False).proved


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale_rows", [None, False, True])
def test_what_is_not_finite_is_said(value, scale_rows):
    m = normal(20, 30)
    m[13, 29] = value
    c = certify_gram(MatrixSource(m), tile=8, panel=7, scale_rows=scale_rows)
    assert c.status == "not finite" and not c.proved and c.logdet_lower is None


def test_moderate_rows_stay_as_they_are():
    c = certify_gram(MatrixSource(normal(20, 30) * 3), tile=8)
    assert c.row_exponents == (0, 0)
    c = certify_gram(MatrixSource(normal(20, 30) * 2.0**300), tile=8)
    assert c.proved and c.row_exponents[0] > 290
    assert c.sigma_min_lower <= 2.0**300 * smallest(normal(20, 30)) ** 0.5


def test_a_shift_too_high_is_lowered():
    m = normal(100, 130)
    m[:, :] += 1
    truth = smallest(m)
    failing = certify_gram(MatrixSource(m), tile=32, shift=1.01 * truth)
    assert not failing.proved and failing.failed_pivot is not None and failing.attempts == 1
    assert "pivot" in failing.reason
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twophase_ext.linalg.gram_run.extrapolated", lambda *x: 20 * truth)
        c = certify_gram(MatrixSource(m), tile=32)
    assert c.proved and c.attempts == 3 and c.failed_pivot is None


def test_ladder_and_extrapolation():
    assert shifts_to_try(0.0, 1e-3) == [2e-3]
    assert shifts_to_try(0.01, 2e-3) == [8e-3, 4e-3]  # 4 errors where the estimate allows
    shifts = shifts_to_try(8.0, 1e-9)
    assert shifts[0] == 4.0 and len(shifts) == 4 and shifts[-1] == 2e-9
    assert extrapolated([(10, 3.0)], 10, 20) == 3.0
    # independent entries: the two submatrices tell the whole within a factor of two
    m = normal(640, 800, seed=2)
    estimates = [(k, smallest(m[:k])) for k in (40, 80)]
    assert 0.4 <= extrapolated(estimates, 640, 800) / smallest(m) <= 2.5


# --- panels, passes, progress


class Counted(MatrixSource):
    calls = 0

    def panel(self, start, end):
        self.calls += 1
        return super().panel(start, end)


@pytest.mark.parametrize("passes", [1, 2, 5, 15])
def test_passes_change_no_bit(passes):
    m = normal(50, 70)
    once, source = dense(gram_of(m, 11, 16)), Counted(m)
    assert torch.equal(dense(gram_of(m, 11, 16, passes, source)), once)
    assert source.calls == 5 * passes
    source = Counted(m)
    certify_gram(source, tile=11, panel=16, scale_rows=False)
    assert source.calls == 5  # no folder: every panel once
