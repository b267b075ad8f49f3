"""Matrices that tempt a certificate to lie, with the exact rank of their stored numbers."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PRIME = 2**31 - 1
EXACT = 24  # elimination over the integers up to this many rows or columns, else modulo PRIME


@dataclass(frozen=True)
class Case:
    """kind: "deficient" (rank < n by construction), "well" (rank n, and any prover must say so),
    "hard" (truth is decided exactly, "undecided" is allowed), "not finite" (no rank at all)."""

    name: str
    kind: str
    build: Callable[[], Tensor]  # M itself [n, p], float32 or float64: ones are in it or not

    @functools.cached_property
    def matrix(self) -> Tensor:
        return self.build()

    @functools.cached_property
    def rank(self) -> int:
        return 0 if self.kind == "not finite" else exact_rank(self.matrix)


def exact_rank(matrix: Tensor) -> int:
    """Rank of the stored numbers, which are dyadic rationals.

    Modulo a prime it is the rank or less: a certificate above it is reported, if ever once too
    often, and never missed.
    """
    rows = integer_rows(matrix)
    if not rows or not rows[0]:
        return 0
    return bareiss_rank(rows) if min(matrix.shape) <= EXACT else modular_rank(rows)


def integer_rows(matrix: Tensor) -> list[list[int]]:
    """Rows times a power of two each, as integers."""
    rows = []
    for row in matrix.double().tolist():
        ratios = [x.as_integer_ratio() for x in row]
        scale = max((q for _, q in ratios), default=1)
        rows.append([p * (scale // q) for p, q in ratios])
    return rows


def bareiss_rank(rows: list[list[int]]) -> int:
    """Fraction-free elimination: every quotient is exact."""
    rows = [list(row) for row in (rows if len(rows) <= len(rows[0]) else zip(*rows, strict=True))]
    rank, previous = 0, 1
    for column in range(len(rows[0])):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        top = rows[rank]
        for i in range(rank + 1, len(rows)):
            below, factor = rows[i], rows[i][column]
            rows[i] = [
                (top[column] * a - factor * b) // previous for a, b in zip(below, top, strict=True)
            ]
        previous = top[column]
        rank += 1
        if rank == len(rows):
            break
    return rank


def modular_rank(rows: list[list[int]]) -> int:
    a = np.array([[x % PRIME for x in row] for row in rows], dtype=np.int64)
    rank = 0
    for column in range(a.shape[1]):
        nonzero = np.flatnonzero(a[rank:, column])
        if not len(nonzero):
            continue
        a[[rank, rank + nonzero[0]]] = a[[rank + nonzero[0], rank]]
        top = a[rank, column:] * pow(int(a[rank, column]), -1, PRIME) % PRIME
        a[rank + 1 :, column:] -= a[rank + 1 :, column, None] * top % PRIME
        a[rank + 1 :, column:] %= PRIME
        rank += 1
        if rank == len(a):
            break
    return rank


def gaussian(n: int, p: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, p, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def integers(n: int, p: int, seed: int = 0, bound: int = 9) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-bound, bound + 1, (n, p), generator=g).double()


def ones_added(h: Tensor) -> Tensor:
    return torch.cat([h, h.new_ones(len(h), 1)], 1)


def softplus_features(n: int, m: int, spread: float, seed: int = 0) -> Tensor:
    """[h, 1] of a random wide softplus layer (beta = 100) on n random inputs."""
    z = gaussian(n, 40, seed) @ gaussian(40, m, seed + 1) * (spread / math.sqrt(40))
    return ones_added(torch.logaddexp(100 * z, z.new_zeros(())) / 100)


def with_row(matrix: Tensor, row: Tensor, at: int = -1) -> Tensor:
    matrix = matrix.clone()
    matrix[at] = row
    return matrix


def combination(n: int, p: int, seed: int = 0, bound: int = 9) -> Tensor:
    """Integers, one row an affine combination of the others, all exact in float32."""
    h = integers(n, p - 1, seed, bound)
    w = torch.randint(-2, 3, (n - 1,), generator=torch.Generator().manual_seed(seed + 1)).double()
    w[0] += 1 - w.sum()
    return ones_added(with_row(h, w @ h[:-1]))


def near_duplicate(eps: float, n: int = 12) -> Tensor:
    h = gaussian(n, n + 4)
    return ones_added(with_row(h, h[3] + eps * gaussian(1, n + 4, 1)[0]))


def hilbert(n: int, dtype: torch.dtype) -> Tensor:
    return (1 / (torch.arange(n)[:, None] + torch.arange(n) + 1).double()).to(dtype)


def kahan(n: int) -> Tensor:
    s, c = math.sin(1.2), math.cos(1.2)
    upper = torch.eye(n).double() - c * torch.ones(n, n).double().triu(1)
    return s ** torch.arange(n).double()[:, None] * upper


def lauchli(n: int, eps: float) -> Tensor:
    return ones_added(eps * torch.eye(n, dtype=torch.float64))


def pascal(n: int, corner: int) -> Tensor:
    """det = 1 with corner 0; singular with corner -1."""
    rows = torch.tensor([[math.comb(i + j, i) for j in range(n)] for i in range(n)]).double()
    rows[-1, -1] += corner
    return rows


def magic(n: int) -> Tensor:
    """The magic square of order n = 4 k has rank 3."""
    i = torch.arange(1, n * n + 1).reshape(n, n)
    edge = (torch.arange(n) % 4 == 0) | (torch.arange(n) % 4 == 3)
    return torch.where(edge[:, None] == edge, n * n + 1 - i, i).double()


def power_rows(matrix: Tensor, size: int) -> Tensor:
    """Rows times 2^size, 1, 2^-size, ..."""
    return matrix * 2.0 ** (size * (1 - torch.arange(len(matrix)) % 3)).double()[:, None]


def with_bad(value: float, n: int) -> Tensor:
    matrix = ones_added(gaussian(n, 2 * n))
    matrix[n // 2, 3] = value
    return matrix


def graded(n: int, p: int, condition: float, seed: int = 0) -> Tensor:
    """Singular values from 1 to 1 / condition, before the entries are rounded."""
    u = torch.linalg.qr(gaussian(n, n, seed)).Q
    v = torch.linalg.qr(gaussian(p, n, seed + 1)).Q
    return u * condition ** -torch.linspace(0, 1, n, dtype=torch.float64) @ v.T


def sum_of_two(p: int, seed: int, bits: int = 30) -> Tensor:
    """Third row = first + second exactly, products inexact: the Gram's rounding alone decides."""
    h = integers(3, p, seed, 2**bits)
    return with_row(h, h[0] + h[1])


def biased_sums(seed: int) -> Tensor:
    """Rank one, every row constant: rounding goes the same way in every step of a long sum."""
    return (gaussian(2, 1, seed).abs() + 0.5).expand(2, 2048).contiguous()


def _families() -> list[Case]:
    cases: list[Case] = []

    def add(kind: str, name: str, build: Callable[[], Tensor]) -> None:
        cases.append(Case(name, kind, build))

    for n in (8, 40):
        add("deficient", f"negated row {n}", lambda n=n: with_row(
            gaussian(n, n + 9), -gaussian(n, n + 9)[2]))  # fmt: skip
        add("deficient", f"all rows negated {n}", lambda n=n: ones_added(
            torch.cat([gaussian(n // 2, n + 9), -gaussian(n // 2, n + 9)])))  # fmt: skip
        add("deficient", f"duplicate row times 2^+-500 {n}", lambda n=n: power_rows(
            with_row(gaussian(n, n + 9), gaussian(n, n + 9)[2]), 500))  # fmt: skip
        add("deficient", f"constant features {n}", lambda n=n: torch.full((n, n + 1), 0.1))
        add("deficient", f"all neurons dead {n}", lambda n=n: ones_added(
            torch.full((n, n + 1), 2.0**-1022, dtype=torch.float64)))  # fmt: skip
        add("deficient", f"more rows than columns {n}", lambda n=n: ones_added(gaussian(n, n - 2)))
        add("deficient", f"zero row {n}", lambda n=n: with_row(
            gaussian(n, n + 9), torch.zeros(n + 9).double()))  # fmt: skip
        add("deficient", f"no columns but ones {n}", lambda n=n: torch.ones(n, 1).double())
        add("deficient", f"no columns {n}", lambda n=n: torch.empty(n, 0).double())
        add("hard", f"all neurons faint {n}", lambda n=n: ones_added(
            torch.exp(-100 * gaussian(n, n + 3).abs()) / 100 * 1e-30))  # fmt: skip
        add("hard", f"columns times 2^+-500 {n}", lambda n=n: power_rows(
            gaussian(n, 2 * n).T, 500).T)  # fmt: skip
        add("well", f"negative identity {n}", lambda n=n: -torch.eye(n, n + 1).double())
        add("well", f"gaussian in float32 {n}", lambda n=n: ones_added(
            gaussian(n, 2 * n, dtype=torch.float32)))  # fmt: skip
        add("well", f"rows times 2^+-500 {n}", lambda n=n: power_rows(gaussian(n, 2 * n), 500))
        for bad in (math.nan, math.inf, -math.inf):
            add("not finite", f"one {bad} {n}", lambda n=n, bad=bad: with_bad(bad, n))
    for n in (8, 40, 270):
        add("deficient", f"duplicate row {n}", lambda n=n: ones_added(
            with_row(gaussian(n, n + 9), gaussian(n, n + 9)[2])))  # fmt: skip
        add("deficient", f"duplicate row in float32 {n}", lambda n=n: ones_added(
            with_row(gaussian(n, n + 9, dtype=torch.float32),
                     gaussian(n, n + 9, dtype=torch.float32)[2])))  # fmt: skip
        add("deficient", f"rank 5 of integers {n}", lambda n=n: integers(n, 5) @ integers(5, n + 9))
        add("hard", f"rank 5 stored in float32 {n}", lambda n=n: ones_added(
            (gaussian(n, 5) @ gaussian(5, n + 9)).float()))  # fmt: skip
        add("hard", f"last row summed in floating point {n}", lambda n=n: with_row(
            gaussian(n, n + 9), gaussian(n, n + 9)[:-1].sum(0) / 3))  # fmt: skip
        add("hard", f"narrow softplus features {n}", lambda n=n: softplus_features(
            n, n + 20, 1e-3))  # fmt: skip
        add("well", f"gaussian {n}", lambda n=n: ones_added(gaussian(n, 2 * n)))
        add("well", f"wide softplus features {n}", lambda n=n: softplus_features(n, 2 * n, 1.0))
    for n in (8, 9, 16, 31, 32, 33, 64, 128, 256, 257, 500):
        add("deficient", f"affine combination {n}", lambda n=n: combination(n, n + 7))
    for n in (8, 16, 33, 64):
        add(
            "hard", f"affine combination / 3 + 0.1 {n}", lambda n=n: combination(n, n + 7) / 3 + 0.1
        )
    add("deficient", "affine combination, square 260", lambda: combination(260, 260))
    add("deficient", "affine combination, large integers", lambda: combination(30, 50, bound=2**40))
    for seed in range(24):
        add("deficient", f"sum of two, seed {seed}", lambda s=seed: sum_of_two(6, s))
        add("deficient", f"sum of two, long {seed}", lambda s=seed: sum_of_two(900 + 300 * s, s))
        add("deficient", f"biased sums, seed {seed}", lambda s=seed: biased_sums(s))
    for k in range(3, 18):
        kind = "well" if k == 3 else "hard"
        add(kind, f"near-duplicate 1e-{k}", lambda k=k: near_duplicate(10.0**-k))
        add("hard", f"graded to 1e-{k}", lambda k=k: graded(20, 25, 10.0**k))
    for k in (6, 10, 12, 14):
        add("hard", f"graded to 1e-{k}, 100 rows", lambda k=k: graded(100, 110, 10.0**k))
    for n in (5, 8, 12, 20, 40):
        add("hard", f"hilbert {n}", lambda n=n: hilbert(n, torch.float64))
        add("hard", f"hilbert in float32 {n}", lambda n=n: hilbert(n, torch.float32))
    for n in (5, 8, 12, 20):
        add("hard", f"pascal {n}", lambda n=n: pascal(n, 0))
        add("deficient", f"pascal, corner - 1 {n}", lambda n=n: pascal(n, -1))
    for n in (20, 40, 90):
        add("hard", f"kahan {n}", lambda n=n: kahan(n))
    for eps in (2.0**-10, 2.0**-27, 1e-8, 1e-12, 1e-160, 5e-324):
        add("hard", f"lauchli {eps:.0e}", lambda e=eps: lauchli(12, e))
        add("deficient", f"lauchli {eps:.0e}, two equal rows", lambda e=eps: with_row(
            lauchli(12, e), lauchli(12, e)[0]))  # fmt: skip
    add("deficient", "lauchli, mean of two rows", lambda: with_row(
        lauchli(12, 2.0**-26)[:, 1:], lauchli(12, 2.0**-26)[:2, 1:].mean(0)))  # fmt: skip
    for n in (4, 8, 24, 260):
        add("deficient", f"magic square {n}", lambda n=n: magic(n))
    add("well", "one row", lambda: torch.tensor([[0.0, 3.0]]))
    add("well", "one number", lambda: torch.tensor([[-1e-300]], dtype=torch.float64))
    add("well", "one sample, no features", lambda: torch.ones(1, 1))
    add("deficient", "one row of zeros", lambda: torch.zeros(1, 4))
    add("hard", "one subnormal number", lambda: torch.tensor([[5e-324]], dtype=torch.float64))
    add("hard", "the largest numbers", lambda: -1.7e308 * (1 - 0.1 * gaussian(6, 9).abs()))
    add("hard", "subnormal numbers", lambda: integers(6, 9) * 5e-324)
    add("deficient", "subnormal numbers, duplicate", lambda: with_row(
        integers(6, 9), integers(6, 9)[0]) * 5e-324)  # fmt: skip
    return cases


CASES = {case.name: case for case in _families()}
