"""log det from the factor of G - s I."""

import math

import torch
from torch import Tensor

from .bounds import UNIT_ROUNDOFF, below
from .tiles import Tiles

PROBES, STEPS = 4, 8


def log_det_lower(diagonal: Tensor) -> float:
    """A lower bound of 2 sum log |l_ii|; a log is taken to be within 4 ulp. -inf where one is 0.

    diagonal: float64 [n], of a triangular factor.
    """
    logarithms = diagonal.abs().log()
    total = math.fsum(logarithms.tolist())
    error = 16 * UNIT_ROUNDOFF * float(logarithms.abs().sum())
    return below(2 * (total - error)) if math.isfinite(total) else -math.inf


def log_det_shift(factor: Tiles, shift: float) -> float:
    """An estimate of log det(I + s (L L^T)^-1): stochastic Lanczos quadrature, fixed signs."""
    grid = factor.grid
    n, steps = grid.n, min(STEPS, grid.n)
    device = factor.read(0, 0).device
    generator = torch.Generator("cpu").manual_seed(0)
    signs = torch.randint(0, 2, (n, PROBES), generator=generator, device="cpu")
    v = (2.0 * signs.double() - 1).to(device) / math.sqrt(n)
    before, beta = torch.zeros_like(v), v.new_zeros(PROBES)
    T = v.new_zeros(PROBES, steps, steps)
    for k in range(steps):
        w = shift * _solve(factor, v) - beta * before
        alpha = (w * v).sum(0)
        T[:, k, k] = alpha
        w -= alpha * v
        beta = w.square().sum(0).sqrt()
        beta = torch.where(beta > 1e-14 * alpha.abs(), beta, 0)  # an invariant subspace: the end
        if k + 1 < steps:
            T[:, k, k + 1] = T[:, k + 1, k] = beta
        before, v = v, torch.where(beta > 0, w / beta.clamp_min(1e-300), 0)
    values, vectors = torch.linalg.eigh(T)
    return float((vectors[:, 0, :].square() * values.clamp_min(0).log1p()).sum(1).mean()) * n


def _solve(factor: Tiles, x: Tensor) -> Tensor:
    """(L L^T)^-1 x, x [n, k]."""
    grid, x = factor.grid, x.clone()
    for i in range(grid.count):
        rows = x[grid.rows(i)]
        for j in range(i):
            rows -= factor.read(i, j) @ x[grid.rows(j)]
        rows.copy_(torch.linalg.solve_triangular(factor.read(i, i), rows, upper=False))
    for i in reversed(range(grid.count)):
        rows = x[grid.rows(i)]
        rows.copy_(torch.linalg.solve_triangular(factor.read(i, i).T, rows, upper=True))
        for j in range(i):
            x[grid.rows(j)] -= factor.read(i, j).T @ rows
    return x
