"""gram_logdet: certified rank (never above the exact one), log det and info."""

import functools

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ISAS, on_each_isa
from twophase.reference import gram as twin
from twophase_ext.linalg import gram as large
from twophase_ext.ops import gram_logdet
from twophase_ext.ops.gram_logdet import gram_certificate

PRIME = 2**61 - 1


def exact_rank(features, append_ones=True):
    """Rank of the stored numbers modulo a prime: the rank, or (once in 2^60) less."""
    rows = []
    for row in features.tolist():
        ratios = [x.as_integer_ratio() for x in (float(x) for x in row)]
        ratios += [(1, 1)] if append_ones else []
        scale = max((q for _, q in ratios), default=1)  # powers of two: every row becomes integer
        rows.append([p * (scale // q) % PRIME for p, q in ratios])
    rank = 0
    for column in range(len(rows[0]) if rows else 0):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        inverse = pow(rows[rank][column], -1, PRIME)
        for i in range(rank + 1, len(rows)):
            if factor := rows[i][column] * inverse % PRIME:
                rows[i] = [
                    (a - factor * b) % PRIME for a, b in zip(rows[i], rows[rank], strict=True)
                ]
        rank += 1
    return rank


def with_ones(features):
    return torch.cat([features.double(), features.new_ones(*features.shape[:-1], 1).double()], -1)


def exact_logdet(features, digits=40):
    """log det [h, 1][h, 1]^T of the stored numbers, by mpmath."""
    with mpmath.workdps(digits):
        matrix = mpmath.matrix(with_ones(features).tolist())
        return float(mpmath.log(mpmath.det(matrix * matrix.T)))


def integers(*shape, seed=0, bound=9):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-bound, bound + 1, shape, generator=g).float()


def affine_copy(n, m, seed=0):
    """Integer rows, the last an affine combination of the others: rank [h, 1] is at most n - 1."""
    features = integers(n, m, seed=seed)
    weights = torch.randint(-2, 3, (n - 1,), generator=torch.Generator().manual_seed(seed + 1))
    weights[0] += 1 - weights.sum()
    features[-1] = weights.float() @ features[:-1]
    return features


def kahan(n):
    """Upper triangular, nearly singular although no diagonal element is small."""
    s, c = np.sin(1.2), np.cos(1.2)
    return torch.from_numpy(
        np.diag(s ** np.arange(n)) @ (np.eye(n) - c * np.triu(np.ones((n, n)), 1))
    )


def low_rank_in_float32(n, m, r):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(n, r, generator=g) @ torch.randn(r, m, generator=g)).float()


def scaled_rows(features):
    exponents = torch.arange(len(features), dtype=torch.float64) % 5 * 100 - 200
    return features.double() * torch.exp2(exponents)[:, None]


HARD = {
    "duplicate": lambda: integers(9, 20)[[0, 1, 2, 3, 4, 5, 6, 7, 8, 3]],
    "duplicate not dyadic": lambda: torch.randn(10, 20, dtype=torch.float64)[[*range(10), 4]],
    "negated": lambda: torch.cat([integers(8, 20), -integers(8, 20)]),
    "zeros": lambda: torch.cat([integers(8, 20), torch.zeros(3, 20)]),
    "all zeros": lambda: torch.zeros(7, 7),
    "rank one": lambda: integers(12, 1) @ integers(1, 20, seed=1) / 3,
    "constant": lambda: torch.full((8, 20), 0.1),
    "hilbert": lambda: 1 / (torch.arange(12.0)[:, None] + torch.arange(12.0) + 1),
    "hilbert float64": lambda: 1 / (torch.arange(12)[:, None] + torch.arange(12) + 1).double(),
    "kahan": lambda: kahan(40),
    "lauchli": lambda: torch.cat([torch.ones(12, 1), torch.eye(12) * 2.0**-27], 1).double(),
    "lauchli, lost": lambda: torch.cat([torch.ones(12, 1), torch.eye(12) * 1e-12], 1).double(),
    "low rank stored": lambda: low_rank_in_float32(40, 50, 7),
    "more rows than columns": lambda: integers(30, 12),
    "far from zero": lambda: 1e6 + torch.rand(20, 30, dtype=torch.float64),
    "scaled deficient": lambda: scaled_rows(affine_copy(12, 20)),
}


@pytest.mark.parametrize("append_ones", [True, False])
@pytest.mark.parametrize("name", HARD)
def test_never_above_the_exact_rank(device, name, append_ones):
    torch.manual_seed(0)
    features = HARD[name]()
    exact = exact_rank(features, append_ones)
    small = on_each_isa(lambda: gram_logdet(features.to(device), append_ones)[0])
    by_blas = large.gram_logdet_large(features.to(device), append_ones).rank
    assert all(0 <= rank <= exact for rank in [*small, by_blas])


@pytest.mark.parametrize("n", [*range(2, 12), 16, 31, 32, 33, 47, 64])
def test_one_below_full_rank(device, n):
    for seed in range(3):
        features = affine_copy(n, n + 6, seed)
        for stored in (features, features.double() / 3 + 0.1):
            exact = exact_rank(stored)
            small = on_each_isa(lambda x=stored: gram_logdet(x.to(device))[0])
            by_blas = large.gram_logdet_large(stored.to(device), True)[0]
            assert all(rank <= exact for rank in [*small, by_blas])
        assert exact_rank(features) == n - 1
        small = on_each_isa(lambda x=features: gram_logdet(x.to(device))[0])
        assert all(rank == n - 1 for rank in small)


@settings(max_examples=100)
@given(st.data())
def test_never_above_the_exact_rank_of_small_matrices(data):
    n, m = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 7))
    entries = st.integers(-3, 3).map(lambda i: i / 3) | st.integers(-3, 3) | st.just(1e-9)
    rows = data.draw(st.lists(st.lists(entries, min_size=m, max_size=m), min_size=n, max_size=n))
    copies = data.draw(st.lists(st.integers(0, n - 1), max_size=3))
    features = torch.tensor(rows, dtype=torch.float64).reshape(n, m)
    features = torch.cat([features, features[copies]])
    append_ones = data.draw(st.booleans())
    exact = exact_rank(features, append_ones)
    assert max(on_each_isa(lambda: gram_logdet(features, append_ones)[0])) <= exact
    assert large.gram_logdet_large(features, append_ones)[0] <= exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 17, 64, 129, 256, 257])
def test_well_conditioned(device, n, dtype, isa):
    """Certified to be n, LAPACK's rank, and log det within LAPACK's tolerance for its condition."""
    torch.manual_seed(n)
    features = torch.randn(2, n, 2 * n + 5, dtype=dtype)
    rank, logabsdet, info = (t.cpu() for t in gram_logdet(features.to(device)))
    matrix = with_ones(features)
    assert rank.tolist() == torch.linalg.matrix_rank(matrix).tolist() == [n, n]
    assert info.tolist() == [0, 0]
    gram = matrix @ matrix.mT
    condition = float(torch.linalg.cond(gram).max())
    # Each of the n factors is off by at most n eps cond, and random signs leave far less.
    # numpy: torch's batched LU is wrong on several threads (pytorch issues 141358, 142815).
    difference = np.abs(logabsdet.numpy() - np.linalg.slogdet(gram.numpy())[1]).max()
    assert difference <= n * condition * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("case", ["random", "close to singular", "far from zero", "scaled"])
def test_logdet_as_good_as_lapack(device, case):
    """The largest error of eight matrices is at most twice LAPACK's, or twice one rounding."""
    errors = dict.fromkeys((*ISAS, "large", "lapack", "rounding"), 0.0)
    for seed in range(8):
        torch.manual_seed(seed)
        features = torch.randn(16, 20, dtype=torch.float64)
        if case == "close to singular":
            features[-1] = features[0] + 1e-4 * features[-1]
        elif case == "far from zero":
            features += 100
        elif case == "scaled":
            features = scaled_rows(features) * 2.0**210
        truth = exact_logdet(features)
        matrix = with_ones(features)
        small = on_each_isa(lambda x=features: gram_logdet(x.to(device))[1])
        results = {
            **dict(zip(ISAS, small, strict=True)),
            "large": large.gram_logdet_large(features.to(device), True)[1],
            "lapack": 2 * torch.linalg.cholesky(matrix @ matrix.T).diagonal().log().sum(),
            "rounding": truth * (1 + torch.finfo(torch.float64).eps),
        }
        for name, value in results.items():
            errors[name] = max(errors[name], abs(float(value) - truth))
    allowed = 2 * max(errors["lapack"], errors["rounding"])
    assert max(errors[name] for name in (*ISAS, "large")) <= allowed


def test_scaling_a_row_by_a_power_of_two_changes_nothing_but_the_scale(device):
    torch.manual_seed(0)
    features = torch.randn(20, 30, dtype=torch.float64)
    rank, _, info = gram_logdet(scaled_rows(features).to(device), append_ones=False)
    assert rank == 20 and info == 0
    plain, shift = gram_logdet(features, False)[1], 2 * np.log(2) * 4 * (-200 - 100 + 100 + 200)
    torch.testing.assert_close(
        gram_logdet(scaled_rows(features).to(device), False)[1].cpu(), plain + shift
    )


@pytest.mark.parametrize("extreme", [1e300, 1e-300, 5e-324])
def test_no_overflow_and_no_underflow(device, extreme, isa):
    features = torch.eye(5, dtype=torch.float64, device=device) * extreme
    for rank, logabsdet, info in (
        gram_logdet(features, append_ones=False),
        large.gram_logdet_large(features, False)[:3],
    ):
        assert rank == 5 and info == 0
        assert float(logabsdet) == pytest.approx(10 * np.log(extreme), rel=1e-14)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [6, 300])
def test_not_finite_features(device, bad, n, isa):
    features = torch.randn(2, n, n + 3, device=device)
    features[1, n // 2, n - 1] = bad
    rank, logabsdet, info = gram_logdet(features)
    assert rank.tolist() == [n, 0] and info.tolist() == [0, -1]
    assert logabsdet[0].isfinite() and logabsdet[1].isnan()


@pytest.mark.parametrize("n", [6, 300])
def test_info_names_the_first_failing_pivot(device, n, isa):
    features = torch.eye(n)
    features[4] = features[1]  # exact arithmetic: the fifth pivot is 0
    rank, logabsdet, info = gram_logdet(features.to(device), append_ones=False)
    assert info == 5 and logabsdet == -torch.inf and rank == n - 1


def test_more_rows_than_columns(device):
    torch.manual_seed(0)
    for n, m in ((10, 3), (300, 100)):
        rank, _, _ = gram_logdet(torch.randn(n, m, device=device))
        assert rank == m + 1
        rank, _, _ = gram_logdet(torch.randn(n, m, device=device), append_ones=False)
        assert rank == m


@pytest.mark.parametrize("n", [0, 1, 5, 300])
def test_no_columns(device, n):
    rank, logabsdet, info = gram_logdet(torch.empty(n, 0, device=device))
    assert rank == min(n, 1) and (logabsdet == 0 if n < 2 else info == 2)
    rank, logabsdet, info = gram_logdet(torch.empty(n, 0, device=device), append_ones=False)
    assert rank == 0 and (info, float(logabsdet)) == ((0, 0.0) if n == 0 else (1, -torch.inf))


def test_empty_batch(device):
    for n in (0, 4, 300):
        results = gram_logdet(torch.empty(0, n, 7, device=device))
        assert [t.shape for t in results] == [(0,)] * 3
        assert [t.dtype for t in results] == [torch.int64, torch.float64, torch.int64]


def test_twin(device):
    torch.manual_seed(0)
    features = torch.randn(4, 12, 15)
    features[2, 3] = features[2, 7]
    rank, logabsdet, _ = (t.cpu() for t in gram_logdet(features.to(device)))
    expected_rank, expected = twin.gram_logdet(features)
    assert torch.equal(rank, expected_rank)
    torch.testing.assert_close(logabsdet[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.parametrize("n", [65, 128, 129, 192, 257, 300])
def test_a_dependent_row_in_any_block(device, n, isa):
    """Integers, the products of which are exact: rank n - 1, wherever the last row is moved."""
    features = affine_copy(n, n + 70)
    for row in (0, 63, n // 2, n - 1):
        moved = features.clone()
        moved[[row, n - 1]] = moved[[n - 1, row]]
        found = gram_certificate(moved.to(device))
        assert found.rank == n - 1 and found.logabsdet_error == torch.inf
    moved[n - 1] += torch.arange(n + 70) ** 2 % 7
    assert gram_logdet(moved.to(device))[0] == n


CONDITIONED = {
    "random": lambda: torch.randn(14, 20, dtype=torch.float64),
    "close to singular": lambda: low_rank_in_float32(14, 20, 13) + 1e-5 * torch.randn(14, 20),
    "far from zero": lambda: 1e4 + torch.rand(14, 20, dtype=torch.float64),
    "rows of any size": lambda: torch.randn(14, 20).double() * torch.logspace(-9, 9, 14)[:, None],
    "square": lambda: torch.randn(15, 15),
}


@functools.cache
def conditioned(case, seed):
    """M, sigma_min / sigma_1, and log det M M^T by mpmath."""
    torch.manual_seed(seed)
    matrix = CONDITIONED[case]()
    with mpmath.workdps(60):
        m = mpmath.matrix(matrix.tolist())
        squares = mpmath.eigsy(m * m.T, eigvals_only=True)
        smallest, largest = squares[0], squares[len(squares) - 1]
        return matrix, float(mpmath.sqrt(smallest / largest)), sum(map(mpmath.log, squares))


@pytest.mark.parametrize("case", CONDITIONED)
def test_rcond_and_error_are_bounds(device, case, isa):
    for seed in range(2):
        matrix, ratio, logarithm = conditioned(case, seed)
        for found in (
            gram_certificate(matrix.to(device), append_ones=False),
            large.gram_logdet_large(matrix.to(device), False),
        ):
            assert found.rank == len(matrix)
            assert (1e-28 if case == "rows of any size" else 1e-10) < found.rcond <= ratio
            error = abs(float(mpmath.mpf(float(found.logabsdet)) - logarithm))
            assert error <= found.logabsdet_error + 1e-15 * abs(float(logarithm)) < 1


def test_rcond_of_a_rank_below_n(device, isa):
    """sigma_rank / sigma_1, sigma_rank the last one that is not 0."""
    features = torch.cat([integers(6, 9), integers(6, 9)[2:4]]).double()
    sigma = torch.linalg.svdvals(features)
    for found in (
        gram_certificate(features.to(device), append_ones=False),
        large.gram_logdet_large(features.to(device), False),
    ):
        assert found.rank == 6 and 1e-10 < found.rcond <= sigma[5] / sigma[0]
        assert found.logabsdet_error == torch.inf
    assert gram_certificate(torch.zeros(3, 4, device=device), False).rcond == 0


def test_layouts_and_batches(device, isa):
    torch.manual_seed(0)
    features = torch.randn(3, 9, 14, device=device)
    whole = gram_logdet(features)
    for i in range(3):
        for a, b in zip(gram_logdet(features[i]), whole, strict=True):
            assert a.shape == () and a == b[i]
    strided = torch.randn(14, 9, 6, device=device).permute(2, 1, 0)[::2].copy_(features)
    assert all(torch.equal(a, b) for a, b in zip(gram_logdet(strided), whole, strict=True))


@pytest.mark.parametrize("shape", [(40, 30, 33), (2, 333, 700)])
def test_same_bits_for_any_number_of_threads(shape, isa):
    features, results = torch.randn(shape), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(gram_certificate(features))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_small_panels_of_the_large_path(device, monkeypatch):
    """Many panels, blocks of pivots and row blocks at a size where the exact rank is known."""
    monkeypatch.setattr(large, "PANEL", 7)
    monkeypatch.setattr(large, "PIVOTS", 5)
    torch.manual_seed(0)
    features = torch.randn(33, 50, device=device)
    rank, logabsdet, info = large.gram_logdet_large(features, True)[:3]
    assert (rank, info) == (33, 0)
    assert logabsdet == pytest.approx(float(gram_logdet(features)[1]), rel=1e-12)
    assert large.gram_logdet_large(affine_copy(33, 50).to(device), True)[0] == 32
    deficient = torch.cat([integers(16, 50), integers(16, 50) * 2, integers(4, 50)])
    exact = exact_rank(deficient)
    assert large.gram_logdet_large(deficient.to(device), True)[0] == exact < 36


def test_memory_is_checked_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(large, "available_memory", lambda device: 10 * 2**20)
    with pytest.raises(MemoryError, match=r"1000 rows need 0.0299 GiB .* 0.00977 GiB are avail"):
        gram_logdet(torch.zeros(1000, 3))


def test_errors(device):
    with pytest.raises(ValueError, match="features: expected 2 or 3 dimensions, got 1"):
        gram_logdet(torch.zeros(3, device=device))
    with pytest.raises(TypeError, match="features: expected float32 or float64, got"):
        gram_logdet(torch.zeros(3, 3, device=device).half())
    if device == "cuda":  # the CPU's kernel takes any number of rows
        with pytest.raises(ValueError, match="features: expected at most 256 rows, got 257"):
            torch.ops.twophase.gram_logdet(torch.zeros(1, 257, 2, device=device), True)


def test_not_differentiable_but_accepts_parameters(device):
    features = torch.randn(3, 5, device=device, requires_grad=True)
    assert not any(t.requires_grad for t in gram_logdet(features))


def test_opcheck(device):
    for dtype in (torch.float32, torch.float64):
        features = torch.randn(2, 4, 6, dtype=dtype, device=device)
        torch.library.opcheck(torch.ops.twophase.gram_logdet, (features, True))


def test_arrays_of_other_libraries():
    features = np.random.default_rng(0).standard_normal((3, 5, 9))
    for ours, tensor in zip(
        gram_logdet(features), gram_logdet(torch.from_numpy(features)), strict=True
    ):
        assert torch.equal(ours, tensor)
    with pytest.raises(TypeError, match="features: expected a tensor"):
        gram_logdet("features")
