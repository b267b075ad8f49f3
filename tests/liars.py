"""Matrices of known rank, and libraries that lie about their Cholesky factor."""

import math

import torch


def normal(n, p, seed=0):
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def duplicated(n, p):
    """Rank n - 1: the first row again as the last one."""
    m = normal(n, p)
    m[-1] = m[0]
    return m


def smallest(m):
    return float(torch.linalg.svdvals(m)[-1] ** 2)


def lower_part(matrix, new):
    matrix.copy_(matrix.triu(1) + new.tril())
    return 0


def off_by(relative):
    """A library that repairs what is singular and is off by so much."""

    def potrf(matrix):
        a = matrix.triu(1) + matrix.triu(1).T + matrix.diagonal().diag()
        values, vectors = torch.linalg.eigh(a)
        root = vectors * values.clamp_min(1e-30).sqrt()
        factor = torch.linalg.qr(root.T)[1].T
        factor = factor * (1 + relative * normal(*a.shape, seed=1))
        return lower_part(matrix, factor)

    return potrf


LIARS = {
    "untouched": lambda matrix: 0,
    "zeros": lambda matrix: lower_part(matrix, torch.zeros_like(matrix)),
    "identity": lambda matrix: lower_part(matrix, torch.eye(len(matrix)).double()),
    "garbage": lambda matrix: lower_part(matrix, normal(*matrix.shape, seed=5)),
    "huge": lambda matrix: lower_part(matrix, 1e200 * normal(*matrix.shape, seed=5)),
    "NaN": lambda matrix: lower_part(matrix, torch.full_like(matrix, math.nan)),
    "inf": lambda matrix: lower_part(matrix, torch.full_like(matrix, math.inf)),
    "repaired": off_by(0.0),
    "1e-15": off_by(1e-15),
    "1e-12": off_by(1e-12),
    "1e-3": off_by(1e-3),
}
CASES = {
    "duplicate": duplicated(40, 60),
    "nearly": duplicated(40, 60) + 1e-9 * normal(40, 60, seed=2),
    "low rank": normal(40, 5) @ normal(5, 60, seed=3),
    "identity": torch.eye(20).double(),
    "regular": normal(40, 60),
    "zero": torch.zeros(6, 9).double(),
}
