"""A symmetric n x n matrix in square blocks over a P x Q grid of ranks, kept above its diagonal.

Block (I, J), counted from 0, belongs to the rank in grid row I mod P and grid column J mod Q, which
keeps its blocks in order as one column-major matrix (ScaLAPACK's layout): a contiguous tensor
[local columns, local rows]. The blocks below the diagonal are a library's to work in.
"""

from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """What is needed of the processes that share a matrix; every call is collective."""

    grid: tuple[int, int]  # P, Q
    place: tuple[int, int]  # of this rank

    def broadcast(self, scope: str, values: Tensor, root: int) -> None:
        """Overwrite contiguous float64 values in this grid "Row" or "Column" by those of one rank.

        root: its column of the row, or its row of the column.
        """

    def total(self, values: Tensor) -> Tensor:
        """Contiguous float64 values added up over all ranks, in place; and returned."""

    def mirror(self, local: Tensor, n: int, block: int) -> None:
        """Copy the blocks above the diagonal, transposed, onto those below."""

    def potrf(self, local: Tensor, n: int, block: int) -> int:
        """Cholesky factor of the lower triangle, in place; LAPACK's info."""


class Axis:
    """The rows (or columns) of an n x n matrix that one of `count` grid rows (or columns) keeps."""

    def __init__(self, n: int, block: int, count: int, place: int) -> None:
        """place: of this grid row, from 0."""
        self.n, self.block, self.count = n, block, count
        self.blocks = range(place, -(-n // block), count)
        self.index = indices([self.rows(b) for b in self.blocks])  # int64, of the matrix

    def rows(self, b: int) -> slice:
        """The matrix rows of block b."""
        return slice(b * self.block, min((b + 1) * self.block, self.n))

    def from_block(self, b: int) -> range:
        """The kept blocks that are no earlier than b."""
        return self.blocks[max(0, -(-(b - self.blocks.start) // self.count)) :]

    def start(self, b: int) -> int:
        """Where these begin here."""
        kept = len(self.blocks) - len(self.from_block(b))
        return min(kept * self.block, len(self.index))

    def local(self, b: int) -> slice:
        """Where the kept block b lies here."""
        return slice(self.start(b), self.start(b + 1))


def indices(slices: list[slice]) -> Tensor:
    """int64: the numbers of all slices, one after another."""
    return torch.cat([torch.arange(s.start, s.stop, device="cpu") for s in (slice(0, 0), *slices)])


class BlockCyclic:
    """The part of one rank; float64, zero at first."""

    def __init__(self, n: int, block: int, ranks: Ranks) -> None:
        """block: rows of a block."""
        self.n, self.block, self.ranks = n, block, ranks
        self.count = -(-n // block)
        (P, Q), (p, q) = ranks.grid, ranks.place
        self.rows, self.columns = Axis(n, block, P, p), Axis(n, block, Q, q)
        width = len(self.columns.index)
        self.local = torch.zeros(width, len(self.rows.index), dtype=torch.float64, device="cpu")
        # upper halves of the blocks of the diagonal
        self.corners = {b: torch.zeros_like(self.own(b)) for b in self.rows.blocks if b % Q == q}
        self._product = self.local.new_empty(width * block)

    def own(self, b: int) -> Tensor:
        """Block b of the diagonal where the library works, [columns, rows]."""
        return self.local[self.columns.local(b), self.rows.local(b)]

    def add_products(self, left: Tensor, first: int, sign: int) -> None:
        """Add sign X X^T to the blocks on and above the diagonal, from block `first` on.

        left: the rows of X that this grid row keeps, from that block on. Those that the grid column
        needs lie in it, each with one rank. Each product is formed apart and then added.
        """
        rows, columns = self.rows, self.columns
        r0, c0 = rows.start(first), columns.start(first)
        right = left.new_empty(len(columns.index) - c0, left.shape[1])
        for root in range(self.ranks.grid[0]):
            shared = [b for b in columns.from_block(first) if b % self.ranks.grid[0] == root]
            to = indices([columns.local(b) for b in shared]) - c0
            part = left.new_empty(len(to), left.shape[1])
            if root == self.ranks.place[0]:
                part.copy_(left[indices([rows.local(b) for b in shared]) - r0])
            if shared:
                self.ranks.broadcast("Column", part, root)
            right[to] = part
        for b in rows.from_block(first):
            i, c = rows.local(b), columns.start(b + 1)
            strip = left[i.start - r0 : i.stop - r0]
            if b in self.corners:
                at = columns.local(b)
                square = right[at.start - c0 : at.stop - c0] @ strip.T
                self.corners[b].add_(square.triu_(), alpha=sign)
            others = right[c - c0 :]
            product = self._product[: len(others) * len(strip)].view(len(others), len(strip))
            torch.mm(others, strip.T, out=product)
            self.local[c:, i].add_(product, alpha=sign)

    def spread(self, parts: dict[int, Tensor]) -> Tensor:
        """float64 [n] on every rank from one vector for each block of the diagonal kept here."""
        whole = self.local.new_zeros(self.n)
        for b, part in parts.items():
            whole[self.rows.rows(b)] = part
        return self.ranks.total(whole)

    def from_all(self, *values: float) -> list[list[float]]:
        """Each number of every rank, in the order of the grid, on every rank."""
        (P, Q), (p, q) = self.ranks.grid, self.ranks.place
        gathered = self.local.new_zeros(len(values), P * Q)
        gathered[:, p * Q + q] = gathered.new_tensor(values)
        return self.ranks.total(gathered).tolist()

    def diagonal(self) -> Tensor:
        """float64 [n], on every rank."""
        return self.spread({b: corner.diagonal() for b, corner in self.corners.items()})

    def scale(self, factors: Tensor) -> None:
        """Multiply row and column i by factors[i]."""
        self.local.mul_(factors[self.columns.index, None]).mul_(factors[self.rows.index])
        for b, corner in self.corners.items():
            own = factors[self.rows.rows(b)]
            corner.mul_(own[:, None]).mul_(own)

    def submatrix(self, count: int) -> Tensor:
        """`count` rows taken evenly, and the same columns, on every rank."""
        (P, Q), (p, q) = self.ranks.grid, self.ranks.place
        chosen = torch.arange(count, device="cpu") * self.n // count
        blocks, within = chosen // self.block, chosen % self.block
        r, c = (blocks % P == p).nonzero()[:, 0], (blocks % Q == q).nonzero()[:, 0]
        at_row = blocks[r] // P * self.block + within[r]
        at_column = blocks[c] // Q * self.block + within[c]
        result = self.local.new_zeros(count, count)
        above = blocks[r, None] < blocks[c]
        result[r[:, None], c] = torch.where(above, self.local[at_column[:, None], at_row].T, 0.0)
        for b, corner in self.corners.items():
            k = (blocks == b).nonzero()[:, 0]
            result[k[:, None], k] = corner[within[k, None], within[k]]
        upper = self.ranks.total(result)
        return upper.triu() + upper.triu(1).T

    def checksums(self) -> Tensor:
        """int64: sums of the bits of the blocks above the diagonal, one a local column.

        Modulo 2^64 and with odd weights: one changed entry of a column always shows.
        """
        bits = self.local.view(torch.int64)
        weights = 2 * self.rows.index.square() + 1
        sums = torch.zeros(len(bits), dtype=torch.int64, device="cpu")
        for b in self.rows.blocks:
            i, c = self.rows.local(b), self.columns.start(b + 1)
            sums[c:] += (bits[c:, i] * weights[i]).sum(1)
        return sums

    def squares(self) -> float:
        """Of all entries on and above the diagonal, of this rank, added up."""
        parts = [float(corner.square().sum()) for corner in self.corners.values()]
        for b in self.rows.blocks:
            strip = self.local[self.columns.start(b + 1) :, self.rows.local(b)]
            parts.append(float(strip.square().sum()))
        return sum(parts)
