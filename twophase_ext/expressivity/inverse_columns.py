"""An upper bound of ||L^-1||_2 from all columns of the inverse of a sparse triangular L.

||L^-1||_2 <= ||L^-1||_F, which is near where a few singular values are far below the others: as the
certificate's L fills up a factorization, when neurons are on at many samples, its smallest singular
values fall away from the rest. The inverse itself is never kept.

Forward substitution gives columns x_j with (L + E_j) x_j = e_j, |E_j| <= gamma_k |L| (Higham 2002,
Theorem 8.5; k the most entries of a row). So L^-1 = X + L^-1 F, F's columns E_j x_j, and

    ||L^-1||_F <= ||X||_F + ||L^-1||_F gamma_k || |L| ||_2 ||X||_F
               <= ||X||_F / (1 - q),   q = gamma_k || |L| ||_2 ||X||_F < 1.
"""

import math
from typing import Any

import torch

from ..linalg.bounds import SLACK, above, gamma
from ..linalg.sparse_triangular import TINY, norm_upper_of_magnitudes
from ..ops.triangular_inverse import triangular_inverse_squares

MOST = 1 << 41  # multiply-adds: some minutes of two cores


def inverse_frobenius_upper(lower: Any) -> float:
    """Upper bound of ||L^-1||_F; inf where there is none, or where it would take too long.

    lower: csr matrix, float64 [n, n], canonical, lower triangular with positive diagonal.
    """
    n, largest = lower.shape[0], float(lower.diagonal().max())
    if n * lower.nnz > 2 * MOST:
        return math.inf
    # scaled to a largest diagonal entry near 1: what vanishes, in a row or a square, is below TINY
    scale = 2.0 ** max(min(-math.frexp(largest)[1], 1000), -1000)
    scaled = (lower * scale).sorted_indices()
    starts, columns = (torch.from_numpy(x.astype("int64")) for x in (scaled.indptr, scaled.indices))
    squares = triangular_inverse_squares(starts, columns, torch.from_numpy(scaled.data))
    terms = int((starts[1:] - starts[:-1]).max())
    size = math.sqrt(float(squares.sum()) * (1 + gamma(n + terms + 8)) + n * n * TINY) * SLACK
    q = gamma(terms + 2) * norm_upper_of_magnitudes(abs(scaled)) * size * SLACK
    return above(size / (1 - q) * scale * SLACK) if q < 0.5 and size < 2.0**400 else math.inf
