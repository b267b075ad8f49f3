"""The shift s, chosen before factoring: too high costs a factorization, too low only slack."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .bounds import UNIT_ROUNDOFF
from .tiles import Tiles

SMALLEST, LARGEST = 512, 4096  # rows of a subsample
ATTEMPTS = 4
LOWER = 8.0  # by this factor after each failed attempt
VECTORS, STEPS = 4, 20  # of inverse iteration
Submatrix = Callable[[int], Tensor]


def lambda_estimates(n: int, submatrix: Submatrix) -> list[tuple[int, float]]:
    """(rows, about lambda_min) of principal submatrices of G [n, n]: n/16 and n/8 rows.

    submatrix(k): k rows of G taken evenly, and the same columns.
    SMALLEST to LARGEST rows for the greater one; G itself where it is no larger than SMALLEST. An
    estimate: it proves nothing.
    """
    if n <= SMALLEST:
        return [(n, _smallest(submatrix(n)))]
    k = subsample(n)
    return [(rows, _smallest(submatrix(rows))) for rows in (k // 2, k)]


def subsample(n: int) -> int:
    """Rows of the greater one."""
    return n if n <= SMALLEST else min(max(n // 8, SMALLEST), LARGEST)


def submatrix(gram: Tiles, count: int) -> Tensor:
    """float64 [count, count]: `count` rows of G taken evenly, and the same columns."""
    grid = gram.grid
    chosen = torch.arange(count, device="cpu") * grid.n // count
    edges = torch.tensor([grid.rows(i).start for i in range(grid.count)] + [grid.n], device="cpu")
    bounds = torch.searchsorted(chosen, edges).tolist()
    result = gram.read(0, 0).new_zeros(count, count)
    for i, j in grid.lower():
        r, c = slice(*bounds[i : i + 2]), slice(*bounds[j : j + 2])
        if r.start < r.stop and c.start < c.stop:
            tile = gram.read(i, j)
            rows = (chosen[r] - grid.rows(i).start).to(tile.device)
            columns = (chosen[c] - grid.rows(j).start).to(tile.device)
            result[r, c] = tile[rows][:, columns]
    return result.tril() + result.tril(-1).T


def _smallest(matrix: Tensor) -> float:
    """About lambda_min by inverse iteration, slightly above it; 0 where Cholesky breaks down."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    width = min(VECTORS, len(matrix))
    block = torch.randn(len(matrix), width, generator=generator, dtype=torch.float64, device="cpu")
    block = block.to(matrix.device)
    for _ in range(STEPS):
        block = torch.linalg.qr(torch.cholesky_solve(block, factor))[0]
    smallest = float(torch.linalg.eigvalsh(block.T @ (matrix @ block))[0])
    # what is as small as rounding says nothing
    return smallest if smallest > len(matrix) * UNIT_ROUNDOFF * float(matrix.trace()) else 0.0


def extrapolated(estimates: list[tuple[int, float]], n: int, columns: int) -> float:
    """About lambda_min of G from those of submatrices with the same columns.

    Rows of independent entries give lambda_min = v p (1 - sqrt(k/p))^2 (Marchenko-Pastur); what
    the two submatrices show beyond that goes on as a power of k, downwards only.
    """

    def shape(k: int) -> float:
        return max(1 - math.sqrt(k / columns), 0.5 / columns) ** 2

    k, value = estimates[-1]
    if k == n or value <= 0:
        return value
    fewer, before = estimates[0]
    power = 0.0
    if before > 0:
        power = math.log((value / shape(k)) / (before / shape(fewer))) / math.log(k / fewer)
    return value * shape(n) / shape(k) * (n / k) ** min(power, 0.0)


def shifts_to_try(estimate: float, errors: float) -> list[float]:
    """The shifts to try, ATTEMPTS at most: half the estimate, then lower, last twice the errors.

    errors: e_G + e_C and what else a proof takes away. The first is at least 4 errors where half
    the estimate allows, as the estimate itself may be off.
    """
    first = max(estimate / 2, min(4 * errors, 0.9 * estimate))
    shifts = [first / LOWER**i for i in range(ATTEMPTS - 1)]
    return [s for s in shifts if s > 2 * errors] + [2 * errors]
