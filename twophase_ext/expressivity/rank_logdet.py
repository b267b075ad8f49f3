"""Certified and numerical rank, log det and sigma_min of explicit features."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.arrays import as_tensor
from ..core.memory import available_memory
from ..linalg.preconditioned import preconditioned_sigma_min
from ..ops.gram_logdet import gram_logdet

METHODS = ("auto", "gram", "svd")
AUTO_SVD = 1 << 30  # batch * rows * columns * min(rows, columns): about a second on two cores


class RankLogdet(NamedTuple):
    """What `rank_logdet` found; tensors are 0-d, or [B] for a batch, on the features' device.

    rank (int64): a proved lower bound of the exact rank of M. numerical_rank (int64): by the rule
    of numpy.linalg.matrix_rank in float64; no proof of anything. logabsdet (float64): of M M^T, an
    estimate. sigma_min (float64): the smallest of the min(n, columns) singular values, an estimate.
    info (int64): 0; j where pivot j (1-based) of the Cholesky factorization of M M^T is not
    positive; -1 where the features hold NaN or infinity. n, columns: the shape of M. method: "gram"
    (numerical_rank and sigma_min are None) or "svd".
    """

    rank: Tensor
    numerical_rank: Tensor | None
    logabsdet: Tensor
    sigma_min: Tensor | None
    info: Tensor
    n: int
    columns: int
    method: str


def rank_logdet(features: Any, *, append_ones: bool = True, method: str = "auto") -> RankLogdet:
    """Rank and log det of M = [features, 1_n]; M = features without append_ones.

    features [n, m] or [B, n, m], a tensor or array (NumPy, CuPy, DLPack: shared, not copied) of
    float32 or float64. The stored numbers are taken as exact and computed with in float64: float32
    features of a rank-deficient function may well have full rank as stored.

    method: "gram" takes `twophase_ext.ops.gram_logdet`'s rank and log det, about 2 n^2 m flops.
    "svd" adds the singular values; where they say full rank min(n, columns) and the Gram matrix, of
    squared condition, proves less, `preconditioned_sigma_min` proves it up to a condition of about
    10^15 / n. "auto" is "svd" where B n columns min(n, columns) <= 2^30 (n = 1,024 square),
    else "gram".

    logabsdet is -inf where n > columns (exact). "svd": twice the sum of the singular values'
    logarithms where they (or those of M with rows of norm 1) say full rank; else the Cholesky
    factorization's where rank = n, and -inf: one that ends although the matrix is singular in
    float64 does so by luck. "gram": the factorization's, -inf where it breaks down, and no better
    than a guess where rank < n. NaN or
    infinity among the features: rank 0, numerical_rank 0, logabsdet and sigma_min NaN, info -1.
    n = 0: rank 0, log det 0 and sigma_min infinite. Raises TypeError for another dtype, ValueError
    for another number of dimensions or an unknown method, MemoryError, before it allocates,
    where memory would not suffice.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    features = as_tensor(features, name="features")
    gram = gram_logdet(features, append_ones)  # checks dtype and dimensions
    features = features.detach()
    n, columns = features.shape[-2], features.shape[-1] + append_ones
    work = math.prod(features.shape[:-2]) * n * columns * min(n, columns)
    if method == "auto":
        method = "svd" if work <= AUTO_SVD else "gram"
    rank, logabsdet, info = gram
    if n > columns:
        logabsdet = torch.where(info < 0, logabsdet, -torch.inf)
    if method == "gram":
        return RankLogdet(rank, None, logabsdet, None, info, n, columns, method)

    _require_memory(math.prod(features.shape[:-1]) * columns, features.device)
    matrix = features.double()
    if append_ones:
        matrix = torch.cat([matrix, matrix.new_ones(*matrix.shape[:-1], 1)], -1)
    sigma = _singular_values(matrix, info)
    full = min(n, columns)
    if full == 0:
        numerical, smallest = torch.zeros_like(rank), torch.full_like(logabsdet, torch.inf)
    else:
        numerical, smallest = _numerical_rank(sigma, matrix), sigma[..., -1]
    short = (numerical == full) & (rank < full)
    if bool(short.any()):
        rank = _preconditioned_rank(matrix, rank, short)
    if n <= columns:
        logabsdet = _log_det(matrix, sigma, numerical == full, rank == full, logabsdet)
    return RankLogdet(rank, numerical, logabsdet, smallest, info, n, columns, method)


def _require_memory(entries: int, device: torch.device) -> None:
    needed, available = 8 * 4 * entries, available_memory(device)
    if needed > available:
        raise MemoryError(
            f"rank_logdet: the singular values need {needed / 2**30:.3g} GiB (4 times M in "
            f"float64), {available / 2**30:.3g} GiB are available on {device}; method='gram' needs "
            "none of them"
        )


def _singular_values(matrix: Tensor, info: Tensor) -> Tensor:
    """[..., min(n, columns)], NaN for matrices that are not finite (LAPACK refuses those)."""
    bad = (info < 0)[..., None, None]
    sigma = torch.linalg.svdvals(torch.where(bad, 0.0, matrix))
    return torch.where(bad[..., 0], torch.nan, sigma)


def _numerical_rank(sigma: Tensor, matrix: Tensor) -> Tensor:
    """numpy.linalg.matrix_rank's rule."""
    tolerance = sigma[..., :1] * (max(matrix.shape[-2:]) * torch.finfo(torch.float64).eps)
    return (sigma > tolerance).sum(-1)


def _log_det(
    matrix: Tensor, sigma: Tensor, full: Tensor, proved: Tensor, factorized: Tensor
) -> Tensor:
    """log det M M^T, n <= columns: by the singular values where they say full rank.

    full, proved: whether the rank is n, by the singular values and by a proof. factorized: log det
    by the Cholesky factorization, whose error is that of the squared condition.
    """
    finite = ~factorized.isnan()
    value = torch.where(full, 2 * sigma.log().sum(-1), -torch.inf)
    unsure = finite & ~full
    if bool(unsure.any()):  # rows of very different norms, maybe
        norms = matrix.norm(dim=-1, keepdim=True)
        scaled = torch.where(unsure[..., None, None], matrix / norms, 0.0)
        scaled = torch.where(scaled.isfinite(), scaled, 0.0)
        sigma = torch.linalg.svdvals(scaled)
        by_rows = 2 * (sigma.log().sum(-1) + norms[..., 0].log().sum(-1))
        sure = _numerical_rank(sigma, scaled) == matrix.shape[-2]
        value = torch.where(unsure & sure, by_rows, value)
        weak = torch.where(factorized.isfinite(), factorized, by_rows)
        value = torch.where(unsure & ~sure & proved, weak, value)
    return torch.where(finite, value, factorized)


def _preconditioned_rank(matrix: Tensor, rank: Tensor, short: Tensor) -> Tensor:
    """rank, raised to min(n, columns) for the matrices in `short` where that is proved."""
    n, columns = matrix.shape[-2:]
    wide = matrix.reshape(-1, n, columns)
    if n > columns:  # the columns are independent then
        wide = wide.mT
    raised = rank.clone().reshape(-1)
    for i in short.reshape(-1).nonzero()[:, 0].tolist():
        if preconditioned_sigma_min(wide[i]) > 0:
            raised[i] = min(n, columns)
    return raised.reshape(rank.shape)
