"""Proved upper bounds of matrix norms, rounded up."""

import math

import torch
from torch import Tensor

from .bounds import SLACK, above, gamma

SQUARINGS = 6  # ||A||_F <= sqrt(d) ||A||_2 shrinks to d^(1 / 2^(SQUARINGS + 2)) times ||A||_2

NUMBERS = 1 << 24  # at a time: no second copy of a large matrix


def frobenius_upper(a: Tensor) -> float:
    """Upper bound of ||a||_F for a float64 tensor; scaled: no square over- or underflows."""
    largest = float(torch.linalg.vector_norm(a, math.inf)) if a.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    scale = 2.0 ** min(max(-math.frexp(largest)[1], -1000), 1000)
    rows = a.split(max(1, NUMBERS * len(a) // a.numel())) if a.dim() else (a,)
    total = sum(float((part * scale).square().sum()) for part in rows)
    total *= 1 + gamma(a.numel() + 4)
    return above(math.sqrt(total + a.numel() * 2.0**-1022) / scale * SLACK)


def norm_upper(a: Tensor) -> float:
    """Upper bound of ||a||_2 for a float64 matrix, close to it; O(rows columns min(rows, columns)).

    ||A||_2^2 = ||G||_2, G = A^T A, and ||B||_2^2 = ||B^2||_2 for symmetric B: squared again and
    again, then the Frobenius norm. A computed product errs by gamma_k |X||Y| entry by entry, hence
    by gamma_k ||X||_F ||Y||_F in norm.
    """
    if a.numel() == 0:
        return 0.0
    if a.shape[0] < a.shape[1]:
        a = a.T
    size = frobenius_upper(a)
    if size == 0 or not math.isfinite(size):
        return size
    scale = 2.0 ** max(min(-math.frexp(size)[1], 1000), -1000)
    scaled = a * scale
    gram = _symmetric(scaled.T @ scaled)
    error = gamma(len(a) + 2) * (size * scale) ** 2 + a.numel() * 2.0**-1022
    squared = (_symmetric_norm(gram, SQUARINGS) + error) * SLACK
    return min(size, above(math.sqrt(squared) / scale * SLACK))


def _symmetric(a: Tensor) -> Tensor:
    """(a + a^T) / 2, exactly symmetric; one more rounding of each entry."""
    return (a + a.T).mul_(0.5)


def _symmetric_norm(b: Tensor, squarings: int) -> float:
    """Upper bound of ||b||_2 for a symmetric matrix."""
    size = frobenius_upper(b)
    if squarings == 0 or size == 0 or not math.isfinite(size):
        return size
    scale = 2.0 ** max(min(-math.frexp(size)[1], 1000), -1000)
    b = b * scale  # exact but for entries that vanish: they are in the underflow term
    square = _symmetric(b @ b)
    error = gamma(len(b) + 2) * (size * scale) ** 2 + b.numel() * 2.0**-1000
    root = math.sqrt((_symmetric_norm(square, squarings - 1) + error) * SLACK)
    return min(size, root / scale * SLACK)
