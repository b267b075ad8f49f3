"""Certified rank and log det of [h, 1][h, 1]^T: one kernel for small n, BLAS-3 for larger."""

from typing import Any

import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ..core.arrays import as_tensor
from ..linalg.gram import gram_logdet_large

_ops = torch.ops.twophase
SMALL = 256  # kGramSmall of csrc/gram_logdet.h: rows that the kernel takes


def gram_logdet(features: Any, append_ones: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Certified rank and logabsdet of G = M M^T, M = [features, 1_n], in float64.

    features [n, m] or [B, n, m], a tensor or array (NumPy, CuPy, DLPack: shared, not copied) of
    float32 or float64, the stored numbers taken as exact. Without append_ones, M = features.
    Returns (rank int64, logabsdet float64, info int64), 0-d or [B]:

    - rank: a proved lower bound of the exact rank of M (Rump 2006: a Cholesky factorization of
      G - s I with diagonal pivoting, s above every rounding error; each pivot proves one rank).
      It equals the rank of well-conditioned M; where the smallest singular value is below about
      sqrt(n p eps) of the largest it may fall short, never above.
    - logabsdet: twice the sum of the logarithms of the unshifted Cholesky factor's diagonal, an
      estimate; -inf where that factorization breaks down. Rounding may carry a factorization of a
      singular G through to the end (n > m + 1, for one): rank tells.
    - info: 0; j where pivot j (1-based) is not positive; -1 where the features hold NaN or
      infinity (then rank is 0 and logabsdet NaN). No jitter is ever added.

    Rows are scaled by powers of two, so rows of very different size do no harm. n <= 256: one
    kernel over the batch, 2/3 n^3 + n^2 m flops a matrix. Larger n: matrix by matrix through BLAS
    and LAPACK, about 2 n^2 m + 5/3 n^3 flops and 4 n^2 doubles of memory, and n^3 more where
    the rank is not certified to be n. Raises TypeError for another dtype, ValueError for a wrong
    number of dimensions, MemoryError, before it allocates, where memory would not suffice.
    """
    features = as_tensor(features, name="features")
    if features.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"features: expected float32 or float64, got {features.dtype}")
    if not isinstance(append_ones, bool):
        raise TypeError(f"append_ones: expected a bool, got {type(append_ones).__name__}")
    if features.dim() not in (2, 3):
        raise ValueError(f"features: expected 2 or 3 dimensions, got {features.dim()}")
    features = features.detach()
    if features.dim() == 2:
        rank, logabsdet, info = gram_logdet(features[None], append_ones)
        return rank[0], logabsdet[0], info[0]
    if features.shape[1] <= SMALL:
        return _ops.gram_logdet(features, append_ones)
    return _by_blas(features, append_ones)


@torch.library.custom_op("twophase::gram_logdet_by_blas", mutates_args=())
def _by_blas(features: Tensor, append_ones: bool) -> tuple[Tensor, Tensor, Tensor]:
    # An operator, so that torch.compile does not look into it: its steps depend on the values.
    rank, logabsdet, info = _empty(features, append_ones)
    for i, matrix in enumerate(features):
        rank[i], logabsdet[i], info[i] = gram_logdet_large(matrix, append_ones)
    return rank, logabsdet, info


def _empty(features: Tensor, append_ones: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch = features.shape[0]
    rank = features.new_empty(batch, dtype=torch.int64)
    return rank, features.new_empty(batch, dtype=torch.float64), torch.empty_like(rank)


torch.library.register_fake("twophase::gram_logdet", _empty)
_by_blas.register_fake(_empty)
