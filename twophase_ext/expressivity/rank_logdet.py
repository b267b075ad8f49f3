"""Certified and numerical rank, log det and sigma_min of explicit features."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.arrays import as_tensor
from ..core.memory import available_memory
from ..linalg.preconditioned import preconditioned_sigma_min
from ..ops.gram_logdet import GramLogdet, gram_certificate

METHODS = ("auto", "gram", "svd")
AUTO_SVD = 1 << 30  # batch * rows * columns * min(rows, columns): about a second on two cores
EPS = torch.finfo(torch.float64).eps
SHARP = 2.0**-20  # error of log det, a row, up to which the Cholesky factorization's is taken


class RankLogdet(NamedTuple):
    """What `rank_logdet` found; tensors are 0-d, or [B] for a batch, on the features' device.

    rank (int64): a proved lower bound of the exact rank of M. numerical_rank (int64): by the rule
    of numpy.linalg.matrix_rank in float64; no proof of anything. logabsdet (float64): of M M^T, an
    estimate. sigma_min (float64): the smallest of the min(n, columns) singular values, an estimate.
    info (int64): 0; j where pivot j (1-based) of the Cholesky factorization of M M^T is not
    positive; -1 where the features hold NaN or infinity. n, columns: the shape of M. method: "svd"
    where singular values were taken of any matrix, else "gram". numerical_rank is None where it
    would have needed singular values that were not taken, sigma_min where not all were.
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

    method: "auto" proves first: where `twophase_ext.ops.gram_logdet` certifies rank
    min(n, columns) and bounds sigma_min / sigma_1 from below by more than twice numpy's tolerance
    max(n, columns) eps, the numerical rank is settled too, and log det is the factorization's if
    that is known to 1e-6 a row. Singular values are taken of the matrices that are left, b of them,
    if b n columns min(n, columns) <= 2^30 (n = 1,024 square). "gram" takes none, "svd" those of
    every matrix: sigma_min is asked for by it. Where singular values say full rank and the Gram
    matrix, of squared condition, proves less, `preconditioned_sigma_min` proves it up to a
    condition of about 10^15 / n.

    logabsdet is -inf where n > columns (exact). Where singular values are taken: twice the sum of
    their logarithms if they (or those of M with rows of norm 1) say full rank; else the Cholesky
    factorization's where rank = n, and -inf: one that ends although the matrix is singular in
    float64 does so by luck. Else: the factorization's, -inf where it breaks down, and no better
    than a guess where rank < n. NaN or infinity among the features: rank 0, numerical_rank 0,
    logabsdet and sigma_min NaN, info -1. n = 0: rank 0, log det 0 and sigma_min infinite. Raises
    TypeError for another dtype, ValueError for another number of dimensions or an unknown method,
    MemoryError, before it allocates, where memory would not suffice.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    features = as_tensor(features, name="features")
    gram = gram_certificate(features, append_ones)  # checks dtype and dimensions
    features = features.detach()
    if features.dim() == 3:
        return _of_batch(features, append_ones, gram, method)
    gram = GramLogdet(*(t[None] for t in gram))
    found = _of_batch(features[None], append_ones, gram, method)
    return RankLogdet._make(t[0] if isinstance(t, Tensor) else t for t in found)


def _of_batch(features: Tensor, append_ones: bool, gram: GramLogdet, method: str) -> RankLogdet:
    """`rank_logdet` of features [B, n, m], of which gram_certificate has found `gram`."""
    n, columns = features.shape[1], features.shape[2] + append_ones
    full = min(n, columns)
    rank, logabsdet, info = gram.rank, gram.logabsdet, gram.info
    if n > columns:
        logabsdet = torch.where(info < 0, logabsdet, -torch.inf)
    settled = _settled(gram, max(n, columns), full)
    if method == "svd":
        left = torch.ones_like(settled)
    else:
        sharp = (gram.logabsdet_error <= SHARP * n) | (info < 0) | (n > columns)
        left = ~(settled & sharp)
    count = int(left.sum())
    if method == "auto":
        method = "svd" if 0 < count * n * columns * full <= AUTO_SVD else "gram"
    numerical = torch.where(info < 0, 0, full)
    if method == "gram":
        known = count == 0 or bool(settled.all())
        return RankLogdet(
            rank, numerical if known else None, logabsdet, None, info, n, columns, method
        )

    _require_memory(count * n * columns, features.device)
    matrix = features[left].double()
    if append_ones:
        matrix = torch.cat([matrix, matrix.new_ones(*matrix.shape[:-1], 1)], -1)
    found = _by_singular_values(matrix, rank[left], logabsdet[left], info[left])
    rank, logabsdet = rank.clone(), logabsdet.clone()
    rank[left], numerical[left], logabsdet[left], smallest = found
    sigma_min = smallest if count == len(features) else None
    return RankLogdet(rank, numerical, logabsdet, sigma_min, info, n, columns, method)


def _settled(gram: GramLogdet, longer: int, full: int) -> Tensor:
    """Where the numerical rank is known without singular values: 0 if not finite, else full.

    longer, full: max and min(n, columns). Twice the tolerance: an SVD that errs by less agrees.
    """
    proved = (gram.rank == full) & (gram.rcond > 2 * longer * EPS)
    return proved | (gram.info < 0) | (full == 0)


def _require_memory(entries: int, device: torch.device) -> None:
    needed, available = 8 * 4 * entries, available_memory(device)
    if needed > available:
        raise MemoryError(
            f"rank_logdet: the singular values need {needed / 2**30:.3g} GiB (4 times M in "
            f"float64), {available / 2**30:.3g} GiB are available on {device}; method='gram' needs "
            "none of them"
        )


def _by_singular_values(
    matrix: Tensor, rank: Tensor, logabsdet: Tensor, info: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rank, numerical rank, log det and sigma_min of M [b, n, columns].

    rank, logabsdet, info: by the Gram matrix.
    """
    n, columns = matrix.shape[1:]
    full = min(n, columns)
    if full == 0:
        return rank, torch.zeros_like(rank), logabsdet, torch.full_like(logabsdet, torch.inf)
    sigma = _singular_values(matrix, info)
    numerical = _numerical_rank(sigma, matrix)
    short = (numerical == full) & (rank < full)
    if bool(short.any()):
        rank = _preconditioned_rank(matrix, rank, short)
    if n <= columns:
        logabsdet = _log_det(matrix, sigma, numerical == full, rank == full, logabsdet)
    return rank, numerical, logabsdet, sigma[:, -1]


def _singular_values(matrix: Tensor, info: Tensor) -> Tensor:
    """[b, min(n, columns)], NaN for matrices that are not finite (LAPACK refuses those)."""
    bad = (info < 0)[..., None, None]
    sigma = torch.linalg.svdvals(torch.where(bad, 0.0, matrix))
    return torch.where(bad[..., 0], torch.nan, sigma)


def _numerical_rank(sigma: Tensor, matrix: Tensor) -> Tensor:
    """numpy.linalg.matrix_rank's rule."""
    tolerance = sigma[..., :1] * (max(matrix.shape[-2:]) * EPS)
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
    n, columns = matrix.shape[1:]
    wide = matrix if n <= columns else matrix.mT  # the columns are independent then
    raised = rank.clone()
    for i in short.nonzero()[:, 0].tolist():
        if preconditioned_sigma_min(wide[i]) > 0:
            raised[i] = min(n, columns)
    return raised
