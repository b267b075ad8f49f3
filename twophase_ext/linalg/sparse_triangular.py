"""Proved lower bounds of sigma_min of a sparse triangular matrix with positive diagonal.

Comparison matrix. <L> has the diagonal of L and minus the magnitudes of its other entries, and is a
triangular M-matrix: |L^-1| <= <L>^-1 entry by entry, hence ||L^-1||_2 <= ||<L>^-1||_2. No solver
is believed: for y > 0 and any x > 0 with <L> x >= a y, x >= a <L>^-1 y, as <L>^-1 is non-negative;
likewise z for <L>^T and x. So N y <= z / (a b) for the non-negative N = <L>^-T <L>^-1, and
||<L>^-1||_2^2 = rho(N) <= max z_i / (a b y_i) (Collatz). x and z come from any solver; a and b from
one sparse product each, whose rounding is bounded.

Factorization. It takes signs into account, which the comparison matrix throws away, and believes no
factor either: with A = B B^T for B = L or L^T (both have the squares of L's singular values as
eigenvalues), any permutation q and any real matrix R,

    sigma_min(L)^2 = lambda_min(A) >= s - ||(A - s I)_qq - R R^T||_2,

as R R^T is positive semidefinite (Weyl). What is computed of the right side is bounded with its
rounding: products of k terms err by gamma_k |B||B|^T, entry by entry, and 2-norms are at most those
of the magnitudes (Collatz once more). s is somewhat less than what inverse iteration finds.
"""

import math
from typing import Any

import numpy as np

from .bounds import SLACK, UNIT_ROUNDOFF, above, below, gamma, minus

Matrix = Any  # scipy.sparse.csr_matrix: SciPy is imported where it is needed

ROUNDS = 8  # of the power iteration that chooses y
SHIFT = 0.95  # of lambda_min, as inverse iteration finds it
SHIFT_ROUNDS = 20
MOST_NUMBERS = 1 << 22  # multiply-adds of B B^T: with many more its factor fills up
MOST_PRODUCTS = 1 << 32  # multiply-adds of R R^T
TINY = 2.0**-450  # more than all that underflows where the largest numbers are near 1


def inverse_norm_upper(lower: Matrix) -> tuple[float, float]:
    """(by the comparison matrix, the better one): upper bounds of ||L^-1||_2, inf where none.

    lower: float64 [n, n], canonical, lower triangular with positive diagonal. Time: some triangular
    solves; the factorization is left out where it could gain nothing and where it would take more
    than MOST_NUMBERS or MOST_PRODUCTS.
    """
    largest = float(lower.diagonal().max())
    # scaled to a largest diagonal entry near 1: nothing below over- or underflows
    scale = 2.0 ** max(min(-math.frexp(largest)[1], 1000), -1000)
    scaled = (lower * scale).tocsr()
    with np.errstate(all="ignore"):
        compared = _comparison(scaled)
        floor = 1 / compared if compared > 0 else math.inf
        sigma = _factored(scaled, floor)
        better = min(compared, above(1 / sigma)) if sigma > 0 else compared
    # beyond, entries that vanished in the scaling might count
    compared, better = (above(x * scale) if x < 2.0**500 else math.inf for x in (compared, better))
    return compared, better


def norm_upper_of_magnitudes(magnitudes: Matrix) -> float:
    """Upper bound of ||E||_2 for every E with |E| <= magnitudes (float64 [n, n], csr, >= 0).

    ||E||_2 <= || |E| ||_2, whose square is at most max_i (|E|^T |E| x)_i / x_i for every x > 0
    (Collatz). NaN or inf where numbers are.
    """
    largest = float(magnitudes.data.max(initial=0.0))
    if not 0 < largest < math.inf:
        return largest
    scale = 2.0 ** max(min(-math.frexp(largest)[1], 1000), -1000)
    scaled = (magnitudes * scale).tocsr()
    transposed = scaled.T.tocsr()
    terms = int(max(np.diff(scaled.indptr).max(), np.diff(transposed.indptr).max()))
    x, bound = np.ones(scaled.shape[1]), math.inf  # sums of non-negative terms: relative errors
    for _ in range(ROUNDS):
        y = transposed @ (scaled @ x)
        bound = min(bound, float((y / x).max()))
        x = np.maximum(y / y.max(), 1e-6)  # keeps the quotients tame
    return above(math.sqrt(bound * (SLACK + gamma(2 * terms + 8)) + TINY) / scale * SLACK)


def _comparison(lower: Matrix) -> float:
    """Upper bound of ||<L>^-1||_2, inf where none is found."""
    from scipy.sparse import diags
    from scipy.sparse.linalg import spsolve_triangular

    n = lower.shape[0]
    center = lower.diagonal()
    rest = abs(lower - diags(center)).tocsr()
    comparison = (diags(center) - rest).tocsr()
    transposed = comparison.T.tocsr()

    def guaranteed(negated: Matrix, x: np.ndarray, y: np.ndarray) -> float:
        """The largest a that is proved to have <L> x >= a y; `negated` = minus the rest of <L>."""
        terms = np.diff(negated.indptr).max(initial=0) + 2
        own, others = center * x, negated @ x
        proved = own - others - gamma(int(terms) + 3) * SLACK * (own + others)
        proved -= terms * 2.0**-1000  # products that vanish
        return float((proved / y).min()) * (1 - 2.0**-40)

    y = np.ones(n)
    for _ in range(ROUNDS):
        x = spsolve_triangular(comparison, y, lower=True)
        z = spsolve_triangular(transposed, x, lower=False)
        if not (np.isfinite(z).all() and (z > 0).all()):
            return math.inf
        best = y
        y = z / z.max()
        y = np.maximum(y, 1e-6)  # keeps the quotients of Collatz's bound tame
    y = best
    x = spsolve_triangular(comparison, y, lower=True)
    z = spsolve_triangular(transposed, x, lower=False)
    if not (np.isfinite(z).all() and (x > 0).all() and (z > 0).all()):
        return math.inf
    a, b = guaranteed(rest, x, y), guaranteed(rest.T.tocsr(), z, x)
    if not (a > 0 and b > 0):
        return math.inf
    rho = float((z / y).max()) / (a * b) * (1 + 2.0**-40)
    return math.sqrt(rho) * (1 + 2.0**-40)


def _factored(lower: Matrix, floor: float) -> float:
    """Lower bound of sigma_min(L) by a factorization; 0 where there is none above `floor`."""
    # L^T as a rule: samples behind many kinks are rarer than neurons that are on at many samples
    factor = min(lower.T.tocsr(), lower, key=_products)
    if _products(factor) > MOST_NUMBERS:
        return 0.0
    shift = SHIFT * _lambda_min(lower)
    if not floor**2 < shift < math.inf:
        return 0.0
    return max(below(math.sqrt(max(lambda_min_lower(factor, shift), 0.0))), 0.0)


def _lambda_min(lower: Matrix) -> float:
    """An estimate of lambda_min(L L^T), nothing proved; NaN or inf where it fails.

    A fixed number of rounds: other processors come to the same number but for rounding.
    """
    from scipy.sparse.linalg import spsolve_triangular

    transposed = lower.T.tocsr()
    y = np.ones(lower.shape[0])
    size = math.nan
    for _ in range(SHIFT_ROUNDS):
        x = spsolve_triangular(lower, y / np.linalg.norm(y), lower=True)
        y = spsolve_triangular(transposed, x, lower=False)
        size = float(np.linalg.norm(y))
    return 1 / size if size > 0 else math.inf


def _products(factor: Matrix) -> int:
    """Multiply-adds of B B^T: the sum of the squares of the columns' numbers of entries."""
    counts = np.bincount(factor.indices, minlength=1).astype(np.float64)
    return int((counts * counts).sum())


def lambda_min_lower(factor: Matrix, shift: float) -> float:
    """Lower bound of lambda_min(B B^T) near `shift`; -inf where there is none.

    factor: B, float64 [n, n], canonical; every product of two of its entries is far from the ends
    of float64's range. Sound for any shift and whatever the factorization returns.
    """
    from scipy.sparse import csr_matrix, diags, eye
    from scipy.sparse.linalg import splu

    n = factor.shape[0]
    gram = (factor @ factor.T).tocsc()
    matrix = (gram - shift * eye(n, format="csc")).tocsc()
    matrix.sort_indices()
    diagonal = float(np.abs(gram.diagonal()).max(initial=0.0)) + abs(shift)
    try:
        lu = splu(
            matrix.copy(),  # SuperLU sorts the arrays that it is given
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0.0,
            options={"SymmetricMode": True},
        )
    except (RuntimeError, MemoryError):  # a pivot is zero; no room
        return -math.inf
    order = np.argsort(lu.perm_r)  # a permutation, whatever perm_r holds
    pivots = lu.U.diagonal()
    if len(order) != n or not (pivots > 0).all():
        return -math.inf
    root = csr_matrix(lu.L @ diags(np.sqrt(pivots)))
    root.sum_duplicates()
    if root.shape[0] != n or _products(root) > MOST_PRODUCTS:
        return -math.inf
    found = norm_upper_of_magnitudes(abs(matrix[order][:, order] - root @ root.T).tocsr())
    rounding = _of_products(factor) + _of_products(root)
    rounding += 2 * UNIT_ROUNDOFF * (diagonal + found) + TINY
    return minus(shift, (found + rounding) * SLACK)


def _of_products(factor: Matrix) -> float:
    """Upper bound of ||fl(B B^T) - B B^T||_2.

    Entry (i, j) is a sum of at most k = min(k_i, k_j) <= sqrt(k_i k_j) products, k_i the entries of
    row i: with D = diag(k_i), the errors lie below u D^1/2 |B||B|^T D^1/2 but for SLACK.
    """
    from scipy.sparse import diags

    terms = np.diff(factor.indptr) + 2.0
    norm = norm_upper_of_magnitudes((diags(np.sqrt(terms)) @ abs(factor)).tocsr())
    return UNIT_ROUNDOFF * norm * norm * SLACK
