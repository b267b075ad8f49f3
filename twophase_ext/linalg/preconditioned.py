"""A proved lower bound of sigma_min for ill-conditioned matrices: the condition is not squared.

Let M [n, p], n <= p; D = diag(2^-e_i), 2^e_i near the largest entry of row i; A = fl(D M); X any
n x n matrix; B = fl(X A); S = fl(B B^T). If rho < 1 and sqrt(1 - rho) > E, then

    sigma_min(M) >= (sqrt(1 - rho) - E) / ||X D||_2, where
    rho = ||I - S||_F + gamma_K ||B||_F^2 + UNDERFLOW,
    E   = gamma_n || |X| r ||_2 + UNDERFLOW,  r_k = ||row k of A||_2.

Proof.
1. sigma_min(B)^2 = lambda_min(B B^T) >= 1 - ||I - B B^T||_2 >= 1 - rho: an entry of S errs by
   gamma_K (|B||B|^T)_ij and || |B||B|^T ||_F <= ||B||_F^2. Products of panels of b columns are
   formed apart and then added: K = b + (number of panels). Every entry of S is compared, so it
   need not be symmetric to the last bit.
2. An entry of B errs by gamma_n (|X||A|)_ij, whatever the order of the n terms. Row i of |X||A| is
   sum_k |X_ik| |row k of A|, of norm at most (|X| r)_i; so || |X||A| ||_F <= || |X| r ||_2.
3. A = D M but for entries that become subnormal: each errs by at most 2^-1075, and so does each
   product that underflows. r_k >= 2^-74 (or the row is zero, and its products are exact), so
   E < 1 keeps |X_ik| below 2^127, and all underflow together below n^2 p 2^127 2^-1074, which is
   less than UNDERFLOW.
4. ||B - X D M||_2 <= E, and singular values are 1-Lipschitz: sigma_min(X D M) >= sqrt(1 - rho) - E
   > 0. So X D is regular, and sigma_min(X D M) <= ||X D||_2 sigma_min(M): take a unit v with
   ||M^T v|| = sigma_min(M) and w = (X D)^-T v; ||(X D M)^T w|| = sigma_min(M) and
   1 <= ||X D||_2 ||w||.
5. X D = 2^-f X diag(2^-(e_k - f)) with f = min e_k: nothing overflows, cutting e_k - f at 1022
   only enlarges the norm, and `norm_upper` and UNDERFLOW bound it from above. QED

X = R^-T, A^T = Q R, makes B = Q^T up to rounding, and the bound nearly sigma_min itself while
gamma_n || |X| r ||_2 << 1: up to a condition of about 10^15 / n once the rows are scaled. All
bounds carry SLACK for their own rounding, and the result is rounded down.
"""

import math

import torch
from torch import Tensor

from ..core.memory import available_memory
from .bounds import SLACK, UNDERFLOW, below, exponents_of, gamma, power_of_two
from .norms import frobenius_upper, norm_upper

PANEL = 2048  # columns of B at a time


def preconditioned_sigma_min(matrix: Tensor) -> float:
    """Proved lower bound of the n-th singular value of the stored matrix; 0.0 where none is proved.

    matrix: float64 [n, p], on any device; its stored numbers are taken as exact. A result above 0
    proves rank n, by the theorem of this module. 0.0 too for n > p (where it is the truth), for
    n = 0 and where an entry is not finite. About 6 n^2 p + 15 n^3 operations; memory for
    3 n p + 5 n^2 numbers. Raises TypeError for another dtype, ValueError for another number of
    dimensions, MemoryError, before it allocates, where memory would not suffice.
    """
    if matrix.dtype != torch.float64:
        raise TypeError(f"matrix: expected float64, got {matrix.dtype}")
    if matrix.dim() != 2:
        raise ValueError(f"matrix: expected 2 dimensions, got {matrix.dim()}")
    n, p = matrix.shape
    if n == 0 or n > p:
        return 0.0
    _require_memory(n, p, matrix.device)
    largest = matrix.detach().abs().amax(1)
    if not bool(largest.isfinite().all()):
        return 0.0
    exponents = exponents_of(largest)
    a = matrix.detach() * power_of_two(-exponents)[:, None]
    x = _preconditioner(a)
    if not bool(x.isfinite().all()):
        return 0.0
    product = x.new_zeros(n, n)
    panels = 0
    for start in range(0, p, PANEL):
        b = x @ a[:, start : start + PANEL]
        product += b @ b.T  # formed apart, then added: K counts on it
        panels += 1
    size = float(product.diagonal().sum())
    defect = frobenius_upper(product.diagonal_scatter(product.diagonal() - 1))
    rho = (defect + gamma(min(p, PANEL) + panels) * size) * SLACK + UNDERFLOW
    rows = torch.linalg.vector_norm(a, dim=1)
    error = gamma(n) * frobenius_upper(x.abs() @ rows) * SLACK + UNDERFLOW
    if not rho < 1:  # NaN too
        return 0.0
    floor = below(math.sqrt(below(1 - rho)) / SLACK) - error
    if not floor > 0:
        return 0.0
    lowest = int(exponents.min())
    x *= power_of_two(-(exponents - lowest).clamp(max=1022))
    norm = norm_upper(x) + UNDERFLOW
    return max(below(floor / SLACK / norm * 2.0**lowest), 0.0)


def _preconditioner(a: Tensor) -> Tensor:
    """R^-T, a^T = Q R: nothing is assumed of it."""
    r = torch.linalg.qr(a.T, mode="r").R
    identity = torch.eye(len(r), dtype=r.dtype, device=r.device)
    return torch.linalg.solve_triangular(r.T, identity, upper=False)


def _require_memory(n: int, p: int, device: torch.device) -> None:
    needed = 8 * (3 * n * p + 5 * n * n)
    available = available_memory(device)
    if needed > available:
        raise MemoryError(
            f"preconditioned_sigma_min: [{n}, {p}] needs {needed / 2**30:.3g} GiB "
            f"(3 n p + 5 n^2 float64 numbers), {available / 2**30:.3g} GiB are available "
            f"on {device}"
        )
