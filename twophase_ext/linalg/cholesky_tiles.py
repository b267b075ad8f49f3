"""Cholesky by tile columns, left-looking, and what its factor proves whatever the library did.

A = G - s I (diagonal rounded down). For column J of tiles and every tile (I, J), I >= J:
  1. from A_IJ subtract L_IK L_JK^T for K < J one by one, each product formed apart;
  2. halve the tile's columns again and again: first half, then subtract its product from the
     second, formed apart, then second half; leaves of LEAF columns at most are factored (I = J) or
     solved with their triangle by whatever a library offers;
  3. measure the leaf's residual R = S - x l^T, computed as fl(S - fl(x l^T)).

Bound of E = L L^T - A, for any finite L. Let N be the number of tile columns, b their width and D
the number of halvings. A subtraction is Z = (Y - P)/(1 + d), |d| <= u, so Y = P + (1 + d) Z: with
at most B = N - 1 + D of them on the way to a leaf, A differs from the sum of the computed products
and S by at most u (1 + u)^B B (sum |P| + |S|), S = x l^T + R. Each product of at most b terms is
off by gamma_b |L||L|^T on its terms, x l^T included. Hence, entry by entry,
    |E| <= gamma_(b+N+D+1) |L||L|^T + (1 + 2^-20) |fl(R)|.
Norms: the first part is at most gamma ||L_i|| ||L_j||, a matrix of rank one with 2-norm
gamma ||L||_F^2. So
    || L L^T - A ||_2 <= e_C = gamma_(b+N+D+1) ||L||_F^2 + (1 + 2^-20) ||fl(R)||_F
but for underflow: n^2 eta at most, which UNDERFLOW covers, and squares of fl(R) below 2^-1022,
which add n 2^-510 to its norm. ||L||_F^2 is about trace(A), and fl(R) of
a backward stable leaf is smaller than the first part. Nothing is assumed of the library's leaf.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds import SLACK, gamma, shifted_down
from .gram_tiles import lower_product, new_tile
from .journal import RecordedTiles
from .progress import Stage
from .tiles import Grid, Tiles

LEAF = 128


@dataclass
class Factorization:
    """failed_pivot: row (from 0) where no positive pivot was left, else None."""

    failed_pivot: int | None
    size: float  # ||L||_F^2
    residual: float  # 2 sum fl(R)^2 >= ||fl(R)||_F^2
    tiles: int

    def e_C(self, grid: Grid) -> float:
        """Bound of || L L^T - A ||_2 but for underflow of products."""
        lost = grid.n * 2.0**-510  # squares of residuals below 2^-1022
        return (gamma(_roundings(grid)) * self.size + math.sqrt(self.residual) + lost) * SLACK


def expected_e_C(trace: float, grid: Grid) -> float:
    """About e_C, before factoring: leaves residuals of a few u per entry to a library."""
    return gamma(_roundings(grid) + 8) * trace


def _roundings(grid: Grid) -> int:
    """b + N + D + 1."""
    return grid.tile + grid.count + grid.tile.bit_length() + 1


def factor(
    gram: Tiles,
    factor: RecordedTiles,
    shift: float,
    done: dict[tuple[int, int], float],
    stage: Stage,
) -> Factorization:
    """Write the tiles of L, L L^T = G - shift I, column by column, but those of `done`.

    done: residuals of the tiles that are already there. Columns are kept up to the first that is
    not whole, and of that one the tiles that are there with its diagonal: what follows was computed
    from the tiles that are gone.
    """
    grid = gram.grid
    result = Factorization(None, 0.0, 0.0, 0)
    buffer = new_tile((grid.tile**2,), gram.read(0, 0).device)
    for j in range(grid.count):
        here = {i for i in range(j, grid.count) if (i, j) in done and (j, j) in done}
        if len(here) < grid.count - j:
            first_bad = j + 1 if here else j
            if any(column >= first_bad for _, column in done):
                factor.forget(first_bad)
            done = {(i, j): done[i, j] for i in here}
        row = [factor.read(j, k) for k in range(j)] if len(here) < grid.count - j else []
        top: Tensor | None = None
        for i in range(j, grid.count):
            if i in here:
                tile, residual = factor.read(i, j), done[i, j]
            else:
                tile = _updated(gram, factor, row, i, j, shift, buffer, stage)
                columns = _Columns(tile)
                try:
                    columns.factor(tile) if top is None else columns.solve(tile, top)
                except _Breakdown as breakdown:
                    result.failed_pivot = j * grid.tile + breakdown.args[0]
                    return result
                stage.advance(columns.flops)
                residual = float(columns.squares)
                if i == j:
                    tile.tril_()
                factor.write(i, j, tile, residual)
                result.tiles += 1
                stage.advance(0, 1)
            if i == j:
                top = tile
            result.size += float(tile.square().sum())
            result.residual += residual
    return result


def _updated(
    gram: Tiles,
    factor: RecordedTiles,
    row: list[Tensor],
    i: int,
    j: int,
    shift: float,
    buffer: Tensor,
    stage: Stage,
) -> Tensor:
    """Step 1: A_IJ - sum over k < j of L_IK L_JK^T. row: L_JK."""
    tile = gram.read(i, j).clone()
    if i == j:
        tile.diagonal().copy_(shifted_down(tile.diagonal(), shift))
    product = buffer[: tile.numel()].view(tile.shape)
    for k in range(j):
        left = row[k] if i == j else factor.read(i, k)
        flops = lower_product(left, row[k], i == j, product)
        tile.sub_(product)
        stage.advance(flops)
    return tile


class _Breakdown(Exception):
    """No positive pivot in this row of the tile."""


class _Columns:
    """Steps 2 and 3 of one tile, in place."""

    def __init__(self, tile: Tensor) -> None:
        self.squares = tile.new_zeros(())  # 2 sum fl(R)^2
        self.flops = 0.0

    def factor(self, tile: Tensor, row: int = 0) -> None:
        """L of a tile of the diagonal, lower half. row: of the tile, the first one here."""
        c = len(tile)
        if c <= LEAF:
            block = tile.tril()
            triangle, info = torch.linalg.cholesky_ex(block)
            if int(info):
                raise _Breakdown(row + int(info) - 1)
            self._measure((block - torch.mm(triangle, triangle.T)).tril_())
            tile.copy_(triangle)
            return
        h = c // 2
        self.factor(tile[:h, :h], row)
        self.solve(tile[h:, :h], tile[:h, :h])
        self._subtract(tile[h:, h:], tile[h:, :h], tile[h:, :h])
        self.factor(tile[h:, h:], row + h)

    def solve(self, tile: Tensor, triangle: Tensor) -> None:
        """X with X triangle^T = tile; triangle [c, c], only its lower half is looked at."""
        c = len(triangle)
        if c <= LEAF:
            triangle = triangle.tril()
            solved = torch.linalg.solve_triangular(triangle, tile.T, upper=False).T
            self._measure(tile - torch.mm(solved, triangle.T))
            tile.copy_(solved)
            self.flops += 3.0 * len(tile) * c * c
            return
        h = c // 2
        self.solve(tile[:, :h], triangle[:h, :h])
        self._subtract(tile[:, h:], tile[:, :h], triangle[h:, :h])
        self.solve(tile[:, h:], triangle[h:, h:])

    def _measure(self, residual: Tensor) -> None:
        self.squares += 2 * residual.square_().sum()

    def _subtract(self, tile: Tensor, left: Tensor, right: Tensor) -> None:
        tile.sub_(torch.mm(left, right.T))
        self.flops += 2.0 * tile.numel() * left.shape[1]
