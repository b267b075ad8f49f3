"""Certified rank and log det of [h, 1][h, 1]^T: kernels, and BLAS-3 for what they leave."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _load  # noqa: F401  registers torch.ops.twophase
from ..core.arrays import as_tensor
from ..linalg.gram import gram_logdet_large, pivoted_rank, require_memory

_ops = torch.ops.twophase
SMALL = 256  # kGramSmall of csrc/gram_logdet.h: rows of which the kernels tell every rank


class GramLogdet(NamedTuple):
    """`gram_logdet`'s rank, logabsdet and info, and how well conditioned M is; 0-d or [B].

    rcond (float64): sigma_rank / sigma_1 of M is at least that, proved; 0 where rank = 0.
    logabsdet_error (float64): log det of G less that of G - s I, s above every rounding error of
    G and its factor: to first order a bound of logabsdet's error, and mostly far above it. Infinity
    where either factorization broke down.
    """

    rank: Tensor
    logabsdet: Tensor
    info: Tensor
    rcond: Tensor
    logabsdet_error: Tensor


def gram_logdet(features: Any, append_ones: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Certified rank and logabsdet of G = M M^T, M = [features, 1_n], in float64.

    features [n, m] or [B, n, m], a tensor or array (NumPy, CuPy, DLPack: shared, not copied) of
    float32 or float64, the stored numbers taken as exact. Without append_ones, M = features.
    Returns (rank int64, logabsdet float64, info int64), 0-d or [B]:

    - rank: a proved lower bound of the exact rank of M (Rump 2006: a Cholesky factorization of
      G - s I, with diagonal pivoting where it breaks down without, s above every rounding error;
      each pivot proves one rank).
      It equals the rank of well-conditioned M; where the smallest singular value is below about
      sqrt(n p eps) of the largest it may fall short, never above.
    - logabsdet: twice the sum of the logarithms of the unshifted Cholesky factor's diagonal, an
      estimate; -inf where that factorization breaks down. Rounding may carry a factorization of a
      singular G through to the end (n > m + 1, for one): rank tells.
    - info: 0; j where pivot j (1-based) is not positive; -1 where the features hold NaN or
      infinity (then rank is 0 and logabsdet NaN). No jitter is ever added.

    Rows are scaled by powers of two, so rows of very different size do no harm. n^2 m + 2/3 n^3
    flops a matrix; n^3 or more in addition where the rank is not certified to be n. n <= 256: a
    thread (CUDA: a block) for each matrix. Larger n: matrix by matrix, all threads together; on
    CUDA, and for what is not certified to be n, through BLAS and LAPACK, and memory for
    4 n^2 doubles. Raises TypeError for another dtype, ValueError for a wrong number of dimensions,
    MemoryError, before it allocates, where memory would not suffice.
    """
    found = gram_certificate(features, append_ones)
    return found.rank, found.logabsdet, found.info


def gram_certificate(features: Any, append_ones: bool = True) -> GramLogdet:
    """As `gram_logdet`, with the condition and the error that were found on the way."""
    features = as_tensor(features, name="features")
    if features.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"features: expected float32 or float64, got {features.dtype}")
    if not isinstance(append_ones, bool):
        raise TypeError(f"append_ones: expected a bool, got {type(append_ones).__name__}")
    if features.dim() not in (2, 3):
        raise ValueError(f"features: expected 2 or 3 dimensions, got {features.dim()}")
    features = features.detach()
    batch = features if features.dim() == 3 else features[None]
    by = _ops.gram_logdet if batch.shape[1] <= SMALL else _large
    found = by(batch, append_ones)
    return GramLogdet(*(found if features.dim() == 3 else (t[0] for t in found)))


@torch.library.custom_op("twophase::gram_logdet_large", mutates_args=())
def _large(features: Tensor, append_ones: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # An operator, so that torch.compile does not look into it: its steps depend on the values.
    n, m = features.shape[1:]
    require_memory(n, m, features.device)
    if features.device.type == "cpu":
        found = _ops.gram_logdet(features, append_ones)
        rank, _, info, rcond, _ = found
        for i in ((rank < n) & (info >= 0)).nonzero()[:, 0].tolist():
            rank[i], rcond[i] = pivoted_rank(features[i], append_ones)
        return found
    found = _empty(features, append_ones)
    for i, matrix in enumerate(features):
        for results, result in zip(found, gram_logdet_large(matrix, append_ones), strict=True):
            results[i] = result
    return found


def _empty(features: Tensor, append_ones: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = features.shape[0]
    whole = features.new_empty(batch, dtype=torch.int64)
    real = features.new_empty(batch, dtype=torch.float64)
    return whole, real, torch.empty_like(whole), torch.empty_like(real), torch.empty_like(real)


torch.library.register_fake("twophase::gram_logdet", _empty)
_large.register_fake(_empty)
