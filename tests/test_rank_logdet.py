"""rank_logdet and preconditioned_sigma_min: against mpmath, numpy and exact ranks."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from soundness_cases import CASES, exact_rank, gaussian, graded, hilbert, kahan, ones_added
from twophase_ext.expressivity import rank_logdet as module
from twophase_ext.expressivity.rank_logdet import rank_logdet
from twophase_ext.linalg import preconditioned
from twophase_ext.linalg.preconditioned import preconditioned_sigma_min
from twophase_ext.ops import gram_logdet

pytestmark = pytest.mark.usefixtures("one_thread")


def true_sigma_min(matrix, digits=60):
    """The n-th singular value of the stored numbers, by mpmath."""
    with mpmath.workdps(digits):
        m = mpmath.matrix(matrix.tolist())
        return mpmath.sqrt(mpmath.eigsy(m * m.T, eigvals_only=True)[0])


SHARP = {
    "gaussian": lambda: ones_added(gaussian(9, 14)),
    "square": lambda: gaussian(8, 8),
    "one row": lambda: gaussian(1, 5),
    "hilbert": lambda: hilbert(9, torch.float64),
    "kahan": lambda: kahan(14),
    "lauchli": lambda: ones_added(1e-11 * torch.eye(9, dtype=torch.float64)),
    "near-duplicate": lambda: (
        torch.cat([gaussian(7, 12), gaussian(7, 12)[2:3] * (1 + 1e-9)]) + 1e-10 * gaussian(8, 12, 3)
    ),
    **{f"graded to 1e-{k}": lambda k=k: graded(12, 15, 10.0**k) for k in range(1, 14, 2)},
    "huge": lambda: gaussian(8, 10) * 1e300,
    "tiny": lambda: gaussian(8, 10) * 1e-290,
    "rows of any size": lambda: (
        gaussian(8, 10) * 2.0 ** torch.arange(-400, 400, 100).double()[:, None]
    ),
}


@pytest.mark.parametrize("name", SHARP)
def test_a_lower_bound_of_sigma_min_and_a_close_one(device, name):
    matrix = SHARP[name]()
    truth = true_sigma_min(matrix, 60 if "size" not in name else 600)
    lower = preconditioned_sigma_min(matrix.to(device))
    assert 0 < lower <= truth
    # B is orthogonal and X = R^-T but for rounding: little is lost while the condition allows
    loss = 0.2 if name in ("kahan", "hilbert", "graded to 1e-13") else 1e-2
    if name != "rows of any size":  # there ||X D||_2 exceeds 1 / sigma_min
        assert lower >= (1 - loss) * truth


def test_never_above_sigma_min_of_the_cases():
    """Every small case, hard and deficient ones among them."""
    checked = 0
    for case in CASES.values():
        matrix = case.matrix.double()
        small = 0 < matrix.shape[0] <= matrix.shape[1] <= 17 and len(matrix) <= 12
        if not small or case.kind == "not finite" or float(matrix.abs().max()) < 1e-300:
            continue
        lower = preconditioned_sigma_min(matrix)
        if lower > 0:
            assert lower <= true_sigma_min(matrix, 60 if "500" not in case.name else 1300), (
                case.name
            )
            assert case.rank == len(matrix)
            checked += 1
    assert checked > 30


def test_where_it_stops():
    """A condition of about 10^15 / n; beyond, it says nothing."""
    for n, proved, not_proved in ((20, 13, 16), (100, 12, 15), (300, 11, 14)):
        matrix = graded(n, n + 10, 10.0**proved)
        # the stored matrix is within u ||matrix||_F of the graded one
        assert (
            0.5 * 10.0**-proved < preconditioned_sigma_min(matrix) <= 10.0**-proved + n * 2.0**-53
        )
        assert preconditioned_sigma_min(graded(n, n + 10, 10.0**not_proved)) == 0.0


def test_nothing_proved_is_zero():
    for matrix in (
        torch.zeros(3, 5).double(),
        torch.ones(4, 6).double(),
        gaussian(6, 5),
        torch.empty(0, 4).double(),
        torch.empty(3, 0).double(),
        torch.tensor([[1.0, torch.nan]]).double(),
        torch.tensor([[1.0, -torch.inf]]).double(),
    ):
        assert preconditioned_sigma_min(matrix) == 0.0


def test_small_panels(monkeypatch):
    matrix = graded(30, 50, 1e9)
    whole = preconditioned_sigma_min(matrix)
    monkeypatch.setattr(preconditioned, "PANEL", 7)
    assert preconditioned_sigma_min(matrix) == pytest.approx(whole, rel=1e-4)


def test_leaves_its_argument_alone():
    matrix = gaussian(6, 9).requires_grad_()
    before = matrix.detach().clone()
    assert preconditioned_sigma_min(matrix) > 0 and torch.equal(matrix, before)
    assert preconditioned_sigma_min(gaussian(9, 6).T) > 0  # a view with other strides


def test_errors_of_preconditioned(monkeypatch):
    with pytest.raises(TypeError, match=r"matrix: expected float64, got torch.float32"):
        preconditioned_sigma_min(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="matrix: expected 2 dimensions, got 3"):
        preconditioned_sigma_min(torch.zeros(2, 3, 4).double())
    monkeypatch.setattr(preconditioned, "available_memory", lambda device: 2**20)
    with pytest.raises(
        MemoryError, match=r"\[300, 400\] needs 0.00603 GiB .* 0.000977 GiB are avail"
    ):
        preconditioned_sigma_min(torch.zeros(300, 400).double())


# ---- rank_logdet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(20, 30), (3, 20, 30), (12, 7), (300, 320), (2, 0, 4), (0, 4, 6)]
)
@pytest.mark.parametrize("append_ones", [True, False])
def test_random_features(device, dtype, shape, append_ones):
    features = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    r = rank_logdet(features.to(device), append_ones=append_ones, method="svd")
    matrix = features.double()
    if append_ones:
        matrix = torch.cat([matrix, matrix.new_ones(*shape[:-1], 1)], -1)
    n, p = matrix.shape[-2:]
    assert (r.n, r.columns, r.method) == (n, p, "svd")
    for field in (r.rank, r.numerical_rank, r.logabsdet, r.sigma_min, r.info):
        assert field.shape == shape[:-2] and field.device.type == device
    assert r.rank.dtype == r.numerical_rank.dtype == r.info.dtype == torch.int64
    assert r.logabsdet.dtype == r.sigma_min.dtype == torch.float64
    assert (r.rank == min(n, p)).all() and (r.numerical_rank == min(n, p)).all()
    if n == 0:
        assert (r.logabsdet == 0).all() and (r.sigma_min == torch.inf).all()
    elif matrix.numel():
        sigma = np.linalg.svd(matrix.numpy(), compute_uv=False)
        np.testing.assert_allclose(r.sigma_min.cpu().numpy(), sigma[..., -1], rtol=1e-10)
        expected = 2 * np.log(sigma).sum(-1) if n <= p else np.full(shape[:-2], -np.inf)
        np.testing.assert_allclose(r.logabsdet.cpu().numpy(), expected, rtol=1e-10)


def test_ranks_of_all_cases():
    """Certified: never above the exact one (test_soundness). Numerical: numpy's own."""
    for case in CASES.values():
        if case.matrix.numel() and len(case.matrix) <= 64 and case.kind != "not finite":
            r = rank_logdet(case.matrix, append_ones=False)
            assert r.rank <= case.rank
            with np.errstate(over="ignore"):
                expected = np.linalg.matrix_rank(case.matrix.double().numpy())
            if case.name == "the largest numbers":  # the largest singular value overflows
                assert expected == 0 and r.numerical_rank == case.rank
                continue
            # both by an SVD of its own: only singular values at the very threshold may differ
            sigma = torch.linalg.svdvals(case.matrix.double())
            threshold = float(sigma[0]) * max(case.matrix.shape) * 2.0**-52
            at_the_edge = int(((sigma / threshold - 1).abs() < 0.5).sum()) if threshold > 0 else 0
            assert abs(int(r.numerical_rank) - expected) <= at_the_edge, case.name


def test_ill_conditioned_is_proved_by_the_preconditioned_bound():
    """One matrix of a batch needs it, one is deficient, one is plain; and the transpose."""
    wide = torch.stack([graded(20, 24, 1e10), gaussian(20, 24), gaussian(20, 24, 5)])
    wide[1, 7] = wide[1, 3]
    by_gram = gram_logdet(wide, append_ones=False)
    assert by_gram[0][0] < 20 and by_gram[2][0] > 0
    for features in (wide, wide.mT):
        r = rank_logdet(features, append_ones=False)
        assert r.rank.tolist() == [20, 19, 20] and r.numerical_rank.tolist() == [20, 19, 20]
        assert rank_logdet(features, append_ones=False, method="gram").rank.tolist()[0] < 20
    r = rank_logdet(wide, append_ones=False, method="svd")
    expected = -2 * math.log(10) * 10 * np.linspace(0, 1, 20).sum()
    assert float(r.logabsdet[0]) == pytest.approx(expected, rel=1e-6)  # where Cholesky broke down
    assert float(r.sigma_min[0]) == pytest.approx(1e-10, rel=1e-4)


def test_methods(monkeypatch):
    features = gaussian(12, 15)
    auto, svd, gram = (rank_logdet(features, method=m) for m in ("auto", "svd", "gram"))
    assert (auto.method, svd.method, gram.method) == ("gram", "svd", "gram")
    for r in (auto, svd, gram):
        assert r.rank == r.numerical_rank == 12
        assert float(r.logabsdet) == pytest.approx(float(svd.logabsdet), rel=1e-13)
    assert auto.sigma_min is None and gram.sigma_min is None and svd.sigma_min > 0
    hard = graded(12, 15, 1e10)  # the Gram matrix does not tell its rank
    r = rank_logdet(hard, append_ones=False, method="gram")
    assert r.rank < 12 and r.numerical_rank is None and r.method == "gram"
    monkeypatch.setattr(module, "AUTO_SVD", 12 * 15 * 12)
    r = rank_logdet(hard, append_ones=False)
    assert (r.method, r.rank, r.numerical_rank) == ("svd", 12, 12) and r.sigma_min > 0
    r = rank_logdet(torch.stack([hard] * 2), append_ones=False)
    assert r.method == "gram" and r.numerical_rank is None
    r = rank_logdet(torch.stack([hard, gaussian(12, 15), gaussian(12, 15)]), append_ones=False)
    assert r.method == "svd" and r.numerical_rank.tolist() == [12] * 3 and r.sigma_min is None


def test_singular_values_only_of_what_is_not_proved(device, monkeypatch):
    taken = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda a: taken.append(a.shape[0]) or svdvals(a))
    features = torch.randn(9, 20, 30, generator=torch.Generator().manual_seed(0))
    expected = rank_logdet(features, method="svd")
    assert taken == [9]
    r = rank_logdet(features.to(device))
    assert taken == [9] and r.method == "gram"
    assert torch.equal(r.rank.cpu(), expected.rank)
    assert torch.equal(r.numerical_rank.cpu(), expected.numerical_rank)
    torch.testing.assert_close(r.logabsdet.cpu(), expected.logabsdet, rtol=1e-13, atol=0)
    features[1, 3], features[4, 2] = features[1, 5], features[4, 0]
    features[7, 0, 0] = torch.nan
    del taken[:]
    r = rank_logdet(features.to(device))
    assert taken[0] == 2 and r.sigma_min is None
    assert r.rank.tolist() == r.numerical_rank.tolist() == [20, 19, 20, 20, 19, 20, 20, 0, 20]
    finite = [i for i in range(9) if i not in (1, 4, 7)]
    assert torch.equal(r.logabsdet.cpu()[finite], rank_logdet(features[finite]).logabsdet)
    del taken[:]
    tall = rank_logdet(features.mT.to(device), append_ones=False)
    assert taken == [2] and tall.numerical_rank.tolist() == r.numerical_rank.tolist()


@pytest.mark.parametrize("shape", [(12, 15), (15, 12), (9, 9), (300, 310)])
@pytest.mark.parametrize("far", [0, 12, 20, 30, 45, 60])
def test_a_settled_numerical_rank_is_that_of_singular_values(shape, far):
    """Rows of very different size: rank n as it stands, and numerically much less."""
    rows = torch.logspace(0, -far, shape[0], 2.0, dtype=torch.float64)[:, None]
    hard = graded(*sorted(shape), 1e5)
    for matrix in (gaussian(*shape), gaussian(*shape, 1), hard if shape[0] < shape[1] else hard.mT):
        r = rank_logdet(matrix * rows, append_ones=False)
        assert r.numerical_rank == np.linalg.matrix_rank((matrix * rows).numpy())


@pytest.mark.parametrize("n", [6, 300])
def test_not_finite(device, n):
    features = torch.randn(3, n, n + 3)
    features[0, 2, 1], features[2, 0, 0] = torch.inf, torch.nan
    r = rank_logdet(features.to(device), method="svd")
    assert r.rank.tolist() == r.numerical_rank.tolist() == [0, n, 0]
    assert r.info.tolist() == [-1, 0, -1]
    assert r.logabsdet.isnan().tolist() == r.sigma_min.isnan().tolist() == [True, False, True]
    proved = rank_logdet(features.to(device))
    assert proved.rank.tolist() == proved.numerical_rank.tolist() == [0, n, 0]
    assert proved.method == "gram" and proved.logabsdet.isnan().tolist() == [True, False, True]
    tall = rank_logdet(features.mT.contiguous(), append_ones=False)
    assert tall.logabsdet.isnan().tolist() == [True, False, True]


def test_more_rows_than_columns_have_no_determinant():
    """Rounding may carry a Cholesky factorization of the singular Gram matrix to its end."""
    for seed in range(20):
        features = gaussian(5, 3, seed)
        assert rank_logdet(features).logabsdet == -torch.inf
        assert rank_logdet(features).rank == 4


def test_no_columns():
    r = rank_logdet(torch.empty(4, 0), append_ones=False, method="svd")
    assert (r.rank, r.numerical_rank, r.logabsdet) == (
        0,
        0,
        -torch.inf,
    ) and r.sigma_min == torch.inf
    r = rank_logdet(torch.empty(1, 0), method="svd")
    assert (r.rank, r.numerical_rank, r.logabsdet, r.sigma_min) == (1, 1, 0, 1)


def test_arrays_and_gradients():
    array = np.random.default_rng(0).standard_normal((2, 5, 9))
    for a, b in zip(rank_logdet(array), rank_logdet(torch.from_numpy(array)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    r = rank_logdet(torch.randn(3, 5, requires_grad=True), method="svd")
    assert not r.logabsdet.requires_grad and not r.sigma_min.requires_grad


def test_low_rank_stored_in_float32_is_taken_as_stored():
    """The stored numbers are of full rank although the function that made them is not."""
    features = (gaussian(40, 5) @ gaussian(5, 60)).float()
    assert exact_rank(features) == 40
    assert rank_logdet(features, append_ones=False).rank == 40


def test_errors(monkeypatch):
    with pytest.raises(
        ValueError, match=r"method: expected one of \('auto', 'gram', 'svd'\), got 'qr'"
    ):
        rank_logdet(torch.zeros(3, 3), method="qr")
    with pytest.raises(ValueError, match="features: expected 2 or 3 dimensions, got 1"):
        rank_logdet(torch.zeros(3))
    with pytest.raises(TypeError, match=r"features: expected float32 or float64, got torch\.f"):
        rank_logdet(torch.zeros(3, 3).half())
    with pytest.raises(TypeError, match="features: expected a tensor"):
        rank_logdet("features")
    monkeypatch.setattr(module, "available_memory", lambda device: 2**10)
    with pytest.raises(MemoryError, match=r"singular values need .* method='gram' needs none"):
        rank_logdet(torch.zeros(30, 30), method="svd")
    assert rank_logdet(torch.zeros(30, 30), method="gram").rank == 1


def exact_log_det(m: torch.Tensor) -> float:
    """log det M M^T by elimination in rational arithmetic."""
    rows = [[Fraction(v) for v in row] for row in m.tolist()]
    gram = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    total = mpmath.mpf(0)
    for k in range(len(gram)):
        pivot = gram[k][k]
        total += mpmath.log(pivot.numerator) - mpmath.log(pivot.denominator)
        for i in range(k + 1, len(gram)):
            factor = gram[i][k] / pivot
            gram[i] = [a - factor * b for a, b in zip(gram[i], gram[k], strict=True)]
    return float(total)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("gap", [1e-5, 1e-7, 1e-8, 3e-9, 1e-9, 1e-10])
def test_log_det_of_nearly_equal_rows_against_exact_elimination(gap, scaled):
    # from 1e-8 on the Gram matrix is singular in float64; its factorization ends by luck or not
    g = torch.Generator().manual_seed(3)
    for _ in range(4):
        m = torch.randn(7, 15, dtype=torch.float64, generator=g)
        m[6] = m[0] + gap * torch.randn(15, dtype=torch.float64, generator=g)
        if scaled:
            m *= torch.logspace(-12, 0, 7, dtype=torch.float64)[
                torch.randperm(7, generator=g), None
            ]
        found = rank_logdet(m, append_ones=False)
        assert math.isclose(found.logabsdet, exact_log_det(m), rel_tol=1e-5)


def test_a_factorization_of_a_singular_matrix_that_ends_by_luck_is_not_believed():
    g = torch.Generator().manual_seed(1)
    ended = 0
    for _ in range(40):
        m = torch.randn(9, 12, dtype=torch.float64, generator=g)
        m[8] = m[:4].sum(0) / 4
        m = torch.stack([m, m + 1e-3])
        found = rank_logdet(m, append_ones=False)
        ended += int((found.info == 0).sum())
        assert (found.rank < 9).all() and (found.logabsdet == -torch.inf).all()
    assert ended  # the case is met
