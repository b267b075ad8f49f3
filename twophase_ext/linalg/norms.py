"""Proved upper bounds of matrix norms, rounded up."""

import math

import torch
from torch import Tensor

from .bounds import SLACK, above, gamma

# ||A||_F <= sqrt(d) ||A||_2 shrinks to d^(1 / 2^(SQUARINGS + 2)) times ||A||_2; a squaring of more
# than LARGE columns takes seconds
SQUARINGS, LARGE, SQUARINGS_OF_LARGE = 6, 1024, 2

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
    size = frobenius_upper(a)
    if size == 0 or not math.isfinite(size):
        return size
    return float(_norms(a[None], torch.tensor([size], dtype=torch.float64, device=a.device))[0])


def norms_upper(a: Tensor) -> Tensor:
    """As `norm_upper`, for each of the matrices a [k, rows, columns] (float64): [k] float64."""
    return a.new_zeros(len(a)) if a.numel() == 0 else _norms(a, _sizes(a))


def _norms(a: Tensor, sizes: Tensor) -> Tensor:
    """Of a [k, rows, columns], whose Frobenius norms are at most `sizes` [k]."""
    if a.shape[1] < a.shape[2]:
        a = a.mT
    terms, d = a.shape[1:]
    if d == 1:
        return sizes
    scales = _powers(sizes)
    scaled = a * scales[:, None, None]
    gram = _symmetric(scaled.mT @ scaled)
    error = gamma(terms + 2) * (sizes * scales) ** 2 + terms * d * 2.0**-1022
    squarings = SQUARINGS if d <= LARGE else SQUARINGS_OF_LARGE
    squared = (_symmetric_norms(gram, squarings) + error) * SLACK
    return _smaller(sizes, squared.sqrt() / scales * SLACK)


def _symmetric(a: Tensor) -> Tensor:
    """(a + a^T) / 2, exactly symmetric; one more rounding of each entry."""
    return (a + a.mT).mul_(0.5)


def _symmetric_norms(b: Tensor, squarings: int) -> Tensor:
    """Upper bounds of ||b||_2 for symmetric matrices b [k, d, d]."""
    sizes = _sizes(b)
    if squarings == 0:
        return sizes
    scales = _powers(sizes)
    # exact but for entries that vanish: they are in the underflow term
    b = b * scales[:, None, None]
    square = _symmetric(b @ b)
    d = b.shape[1]
    error = gamma(d + 2) * (sizes * scales) ** 2 + d * d * 2.0**-1000
    roots = ((_symmetric_norms(square, squarings - 1) + error) * SLACK).sqrt()
    return _smaller(sizes, roots / scales * SLACK)


def _sizes(a: Tensor) -> Tensor:
    """Upper bounds of the Frobenius norms of a [k, rows, columns]; inf where it is not finite."""
    largest = torch.linalg.vector_norm(a, math.inf, dim=(1, 2))
    scales = _powers(largest)
    numbers = a.shape[1] * a.shape[2]
    total = (a * scales[:, None, None]).square_().sum((1, 2)) * (1 + gamma(numbers + 4))
    found = (total + numbers * 2.0**-1022).sqrt() / scales * SLACK
    return found.where(largest != 0, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)


def _powers(sizes: Tensor) -> Tensor:
    """Powers of two near 1 / sizes; 1 where a size is 0 or not finite."""
    usable = sizes.isfinite() & (sizes > 0)
    exponents = torch.frexp(sizes.where(usable, 0.5)).exponent.clamp(-1000, 1000).tolist()
    # Python's powers of two are exact
    return torch.tensor([2.0**-k for k in exponents], dtype=torch.float64, device=sizes.device)


def _smaller(sizes: Tensor, found: Tensor) -> Tensor:
    return torch.minimum(sizes, found.nan_to_num(nan=math.inf, posinf=math.inf))
