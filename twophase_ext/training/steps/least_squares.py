"""Least squares over fixed features by a QR factorization, with one step of refinement."""

import torch
from torch import Tensor

from ...linalg.bounds import UNIT_ROUNDOFF


def least_squares(m: Tensor, wish: Tensor) -> tuple[Tensor, float]:
    """(D [p, k] of least norm that minimises ||m D - wish||_F, ||m (last correction)||_F^2).

    m: float64 [n, p], wish: float64 [n, k]. Householder QR of m, or of m^T where it is wide; where
    the triangle is numerically singular, LAPACK's divide and conquer (gelsd) on the CPU.
    """
    n, p = m.shape
    tall = n >= p
    reflectors, scales = torch.geqrf(m if tall else m.T.contiguous())
    small = min(n, p)
    triangle = reflectors[:small].triu()
    sizes = triangle.diagonal().abs()
    if not float(sizes.min()) > max(n, p) * UNIT_ROUNDOFF * float(sizes.max()):
        return _deficient(m, wish)

    def solve(rest: Tensor) -> Tensor:
        if tall:
            turned = torch.ormqr(reflectors, scales, rest, left=True, transpose=True)[:small]
            return torch.linalg.solve_triangular(triangle, turned, upper=True)
        half = torch.linalg.solve_triangular(triangle.mT, rest, upper=False)
        padded = torch.cat([half, half.new_zeros(p - small, half.shape[1])])
        return torch.ormqr(reflectors, scales, padded, left=True, transpose=False)

    found = solve(wish)
    correction = solve(wish - m @ found)
    return found + correction, float((m @ correction).square().sum())


def _deficient(m: Tensor, wish: Tensor) -> tuple[Tensor, float]:
    cutoff = max(m.shape) * UNIT_ROUNDOFF
    parts = [part.cpu() for part in (m, wish)]
    found = torch.linalg.lstsq(*parts, rcond=cutoff, driver="gelsd").solution.to(m.device)
    correction = torch.linalg.lstsq(
        parts[0], (wish - m @ found).cpu(), rcond=cutoff, driver="gelsd"
    ).solution.to(m.device)
    return found + correction, float((m @ correction).square().sum())
