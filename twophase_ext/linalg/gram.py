"""Certified rank and log det of a Gram matrix through BLAS-3, any n that fits into memory.

The bounds are those of csrc/math/cholesky.h, with two differences. Panels of b columns are added
up here, so gamma_K needs only K = b + (number of panels). And the factor of LAPACK, MKL or cuSOLVER
is taken as any L whatever, judged by its residual (a posteriori), as libraries multiply by
reciprocals and inverted blocks. What is assumed of the arithmetic: bounds.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.memory import available_memory
from .bounds import (
    SLACK,
    UNDERFLOW,
    UNIT_ROUNDOFF,
    exponents_of,
    gamma,
    minus,
    power_of_two,
    shifted_down,
)
from .residual import residual_bound
from .tiles import DenseTiles

PANEL = 2048  # columns of a panel of M, rows of a panel of the residual
RESERVE = 2.0**-10  # of the errors, left of the shift where it has covered them (kReserve)
PIVOTS = 64  # between two updates of the rest in the pivoted factorization


class Found(NamedTuple):
    """What `twophase_ext.ops.gram_logdet.GramLogdet` holds, of one matrix."""

    rank: int
    logabsdet: float
    info: int
    rcond: float
    logabsdet_error: float


def gram_logdet_large(features: Tensor, append_ones: bool) -> Found:
    """As `twophase_ext.ops.gram_logdet.gram_certificate`, features [n, m].

    float64 throughout; waits for the device. Raises MemoryError before it allocates.
    """
    scaled = _Scaled.of(features, append_ones)
    if scaled is None:
        return Found(0, math.nan, -1, 0.0, math.inf)
    logarithms = -math.inf
    factor, info_tensor = torch.linalg.cholesky_ex(scaled.gram)
    info = int(info_tensor)
    if info == 0:
        logarithms = 2 * float(factor.diagonal().log().sum())
    del factor
    logabsdet = logarithms + 2 * math.log(2) * int(scaled.exponents.sum())
    n, m = features.shape
    if info == 0 and n <= m + append_ones:
        floor, shifted = _positive_definite(scaled)
        if floor > 0:
            return Found(n, logabsdet, info, scaled.rcond(floor), logarithms - shifted)
    rank, rcond = _pivoted(scaled)
    return Found(rank, logabsdet, info, rcond, math.inf)


def pivoted_rank(features: Tensor, append_ones: bool) -> tuple[int, float]:
    """rank and rcond of `gram_logdet_large` where rank n is not to be proved; finite features."""
    scaled = _Scaled.of(features, append_ones)
    return (0, 0.0) if scaled is None else _pivoted(scaled)


@dataclass(frozen=True)
class _Scaled:
    """G = M M^T of the rows of M times 2^-exponents, n > 0."""

    gram: Tensor
    diagonal: Tensor  # a copy
    trace: float
    e_G: float
    exponents: Tensor

    @classmethod
    def of(cls, features: Tensor, append_ones: bool) -> "_Scaled | None":
        """None where a feature is not finite. Raises MemoryError before it allocates."""
        n, m = features.shape
        require_memory(n, m, features.device)
        exponents = _row_exponents(features, append_ones)
        if exponents is None:
            return None
        gram, products = _scaled_gram(features, append_ones, power_of_two(-exponents))
        diagonal = gram.diagonal().clone()
        trace = float(diagonal.sum())
        return cls(gram, diagonal, trace, gamma(min(m, PANEL) + products) * trace, exponents)

    def rcond(self, floor: float) -> float:
        """Lower bound of sigma_r / sigma_1 of M, as in csrc/math/cholesky.h.

        floor: positive lower bound of the smallest eigenvalue of r rows of the scaled M M^T.
        """
        spread = int(self.exponents.max() - self.exponents.min())
        largest = max(self.trace, floor) * (1 + 2.0**-19)
        return math.ldexp(math.sqrt(floor / largest), -spread)


def require_memory(n: int, m: int, device: torch.device) -> None:
    """Raise MemoryError where n rows of m features would not fit."""
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


def _positive_definite(scaled: _Scaled) -> tuple[float, float]:
    """A lower bound of lambda_min(M M^T) and log det of A = G - s I; -inf where nothing is proved.

    By a factor L of A and its residual: lambda_min(M M^T) >= s - e_G - ||L L^T - A||_2. Puts A's
    diagonal into the Gram matrix, and takes it out again.
    """
    gram, n = scaled.gram, len(scaled.gram)
    # What a backward stable factorization leaves as residual, with its evaluation: 3 (n + 2) u T.
    shift = (scaled.e_G + 4 * (n + 2) * UNIT_ROUNDOFF * scaled.trace) * SLACK + 2 * UNDERFLOW
    gram.diagonal().copy_(shifted_down(scaled.diagonal, shift))
    factor, info = torch.linalg.cholesky_ex(gram)
    floor = logarithms = -math.inf
    if int(info) == 0:
        error = residual_bound(DenseTiles(gram, PANEL), DenseTiles(factor, PANEL), 0.0)
        floor = minus(shift, (scaled.e_G + error) * SLACK, UNDERFLOW)
        logarithms = 2 * float(factor.diagonal().log().sum())
    gram.diagonal().copy_(scaled.diagonal)
    return floor, logarithms


def _pivoted(scaled: _Scaled) -> tuple[int, float]:
    """Certified rank and rcond by a shifted factorization with pivoting; overwrites the matrix."""
    # + 1 in k_j = j + 3 for a division that a library may do by a reciprocal
    cholesky = (len(scaled.gram) + 3) * UNIT_ROUNDOFF * scaled.trace
    errors = (scaled.e_G + cholesky) * SLACK
    floor = RESERVE * errors
    diagonal = shifted_down(scaled.diagonal, errors + floor + UNDERFLOW)
    rank = _positive_pivots(scaled.gram, diagonal)
    return rank, scaled.rcond(floor / 2) if rank else 0.0


def _positive_pivots(rest: Tensor, diagonal: Tensor) -> int:
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
