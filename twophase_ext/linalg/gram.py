"""Certified rank and log det of a Gram matrix through BLAS-3, any n that fits into memory.

The bounds are those of csrc/math/cholesky.h, with two differences. Panels of b columns are added
up here, so gamma_K needs only K = b + (number of panels). And the factor of LAPACK, MKL or cuSOLVER
is taken as any L whatever, judged by its residual (a posteriori), as libraries multiply by
reciprocals and inverted blocks. What is assumed of the arithmetic: bounds.py.
"""

import math

import torch
from torch import Tensor

from ..core.memory import available_memory
from .bounds import SLACK, UNDERFLOW, UNIT_ROUNDOFF, exponents_of, gamma, power_of_two, shifted_down
from .residual import residual_bound
from .tiles import DenseTiles

PANEL = 2048  # columns of a panel of M, rows of a panel of the residual
PIVOTS = 64  # between two updates of the rest in the pivoted factorization


def gram_logdet_large(features: Tensor, append_ones: bool) -> tuple[int, float, int]:
    """(certified rank, logabsdet, info) as `twophase_ext.ops.gram_logdet`, features [n, m].

    float64 throughout; waits for the device. Raises MemoryError before it allocates.
    """
    n, m = features.shape
    _require_memory(n, m, features.device)
    exponents = _row_exponents(features, append_ones)
    if exponents is None:
        return 0, math.nan, -1
    gram, products = _scaled_gram(features, append_ones, power_of_two(-exponents))
    diagonal = gram.diagonal().clone()
    trace = float(diagonal.sum())
    e_G = gamma(min(m, PANEL) + products) * trace

    logabsdet = -math.inf
    factor, info_tensor = torch.linalg.cholesky_ex(gram)
    info = int(info_tensor)
    if info == 0:
        logarithms = float(factor.diagonal().log().sum())
        logabsdet = 2 * (logarithms + math.log(2) * int(exponents.sum()))
    del factor
    if info == 0 and n <= m + append_ones and _positive_definite(gram, diagonal, trace, e_G):
        return n, logabsdet, info
    # + 1 in k_j = j + 3 for a division that a library may do by a reciprocal
    shift = (e_G + (n + 3) * UNIT_ROUNDOFF * trace) * SLACK + UNDERFLOW
    return _pivoted_rank(gram, shifted_down(diagonal, shift)), logabsdet, info


def _require_memory(n: int, m: int, device: torch.device) -> None:
    needed = 8 * (4 * n * n + 2 * n * min(m + 1, PANEL))
    available = available_memory(device)
    if needed > available:
        raise MemoryError(
            f"gram_logdet: {n} rows need {needed / 2**30:.3g} GiB (4 n^2 float64 numbers), "
            f"{available / 2**30:.3g} GiB are available on {device}"
        )


def _row_exponents(features: Tensor, append_ones: bool) -> Tensor | None:
    """row_exponent of csrc/math/cholesky.h; None where a feature is not finite."""
    n, m = features.shape
    largest = features.new_full((n,), float(append_ones), dtype=torch.float64)
    for c in range(0, m, PANEL):
        panel = features[:, c : c + PANEL].abs().amax(1)  # a NaN is the largest
        largest = torch.maximum(largest, panel.double())
    if not bool(largest.isfinite().all()):
        return None
    return exponents_of(largest)


def _scaled_gram(features: Tensor, append_ones: bool, scale: Tensor) -> tuple[Tensor, int]:
    """G = M M^T of the scaled rows, and how many products of panels were added up."""
    n, m = features.shape
    gram = features.new_zeros(n, n, dtype=torch.float64)
    products = 0
    for c in range(0, m, PANEL):
        panel = features[:, c : c + PANEL].double() * scale[:, None]
        gram += panel @ panel.T  # formed apart, then added: the bound counts on it
        products += 1
    if append_ones:
        for i in range(0, n, PANEL):
            gram[i : i + PANEL] += scale[i : i + PANEL, None] * scale
        products += 1
    return gram, products


def _positive_definite(gram: Tensor, diagonal: Tensor, trace: float, e_G: float) -> bool:
    """Whether lambda_min(M M^T) > 0 is proved by a factor L of A = G - s I and its residual.

    lambda_min(M M^T) >= s - e_G - ||L L^T - A||_2. Puts A's diagonal into gram, and takes it out
    again.
    """
    n = len(gram)
    # What a backward stable factorization leaves as residual, with its evaluation: 3 (n + 2) u T.
    shift = (e_G + 4 * (n + 2) * UNIT_ROUNDOFF * trace) * SLACK + 2 * UNDERFLOW
    gram.diagonal().copy_(shifted_down(diagonal, shift))
    factor, info = torch.linalg.cholesky_ex(gram)
    proved = False
    if int(info) == 0:
        error = residual_bound(DenseTiles(gram, PANEL), DenseTiles(factor, PANEL), 0.0)
        proved = shift - (e_G + error) * SLACK - UNDERFLOW > 0
    gram.diagonal().copy_(diagonal)
    return proved


def _pivoted_rank(rest: Tensor, diagonal: Tensor) -> int:
    """Positive pivots of a Cholesky factorization with diagonal pivoting before it breaks down.

    rest: symmetric matrix; `diagonal` stands for its diagonal. PIVOTS columns at a time, without
    waiting for the device in between; the rows that are left are then packed and updated.
    """
    rank = 0
    while len(rest):
        count = min(PIVOTS, len(rest))
        columns = rest.new_zeros(len(rest), count)
        pivots = rest.new_empty(count)
        for j in range(count):
            pivot, q = diagonal.max(0, keepdim=True)
            pivots[j] = pivot[0]
            known = columns[:, :j] @ columns.index_select(0, q)[0, :j]
            column = (rest.index_select(0, q)[0] - known) / pivot.sqrt()
            columns[:, j] = column
            diagonal = (diagonal - column * column).index_fill_(0, q, -torch.inf)
        good = int((pivots > 0).cumprod(0).sum())  # what follows a failed pivot means nothing
        rank += good
        if good < count:
            break
        left = (diagonal > -torch.inf).nonzero()[:, 0]
        rest = rest.index_select(0, left).index_select(1, left)
        columns = columns.index_select(0, left)
        rest.addmm_(columns, columns.T, alpha=-1)
        diagonal = diagonal.index_select(0, left)
    return rank
