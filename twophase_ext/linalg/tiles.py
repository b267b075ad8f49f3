"""Lower tiles of a symmetric or lower triangular n x n float64 matrix, in memory or in a file.

A tile of the diagonal holds its lower half; its upper half is zero.
"""

import mmap
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """How n rows are cut into tiles of `tile` rows, the last one shorter."""

    n: int
    tile: int

    @property
    def count(self) -> int:
        """Tiles in a row of tiles."""
        return -(-self.n // self.tile)

    def rows(self, i: int) -> slice:
        """The matrix rows (or columns) of tile row (or column) i."""
        return slice(i * self.tile, min((i + 1) * self.tile, self.n))

    def shape(self, i: int, j: int) -> tuple[int, int]:
        """Rows and columns of tile (i, j)."""
        r, c = self.rows(i), self.rows(j)
        return r.stop - r.start, c.stop - c.start

    def lower(self) -> Iterator[tuple[int, int]]:
        """Every tile (i, j), j <= i, row by row."""
        return ((i, j) for i in range(self.count) for j in range(i + 1))

    def index(self, i: int, j: int) -> int:
        """Place of tile (i, j) in that order."""
        return i * (i + 1) // 2 + j

    @property
    def bytes(self) -> int:
        """Bytes of all lower tiles: about 4 n (n + tile)."""
        last = self.n - (self.count - 1) * self.tile
        whole = self.count - 1
        return 8 * (
            whole * (whole + 1) // 2 * self.tile**2 + whole * self.tile * last + last * last
        )

    @property
    def slot(self) -> int:
        """Bytes from one tile of a file to the next: whole pages."""
        return -(-8 * self.tile**2 // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def file_bytes(self) -> int:
        """Bytes of all lower tiles in a file."""
        return self.slot * (self.count * (self.count + 1) // 2)


class Tiles(Protocol):
    """Where the tiles of one matrix lie."""

    grid: Grid

    def write(self, i: int, j: int, tile: Tensor) -> None:
        """Keep tile (i, j); a store in memory keeps the tensor itself, so it is not used again."""

    def read(self, i: int, j: int) -> Tensor:
        """Tile (i, j) on the device that computes; not to be written to."""


class MemoryTiles:
    """Tiles on the device that computes, or in (pinned) host memory beside a CUDA device."""

    def __init__(self, grid: Grid, device: torch.device, keep_on: torch.device) -> None:
        """device: where `read` delivers; keep_on: where the tiles lie."""
        self.grid = grid
        self._device, self._keep_on = device, keep_on
        self._tiles: dict[tuple[int, int], Tensor] = {}

    def write(self, i: int, j: int, tile: Tensor) -> None:
        """Keep the tensor itself where it lies on the right device, else a copy."""
        if tile.device.type != self._keep_on.type:
            host = torch.empty(tile.shape, dtype=tile.dtype, pin_memory=tile.is_cuda, device="cpu")
            tile = host.copy_(tile)
        self._tiles[i, j] = tile

    def read(self, i: int, j: int) -> Tensor:
        """The tensor kept, or a copy on the device that computes."""
        return self._tiles[i, j].to(self._device, non_blocking=True)


class TileFile:
    """One memory-mapped file that holds the lower tiles of `regions` matrices, one after another.

    What is read is copied, and pages are dropped from the mapping after each use: they would count
    as resident memory of the process. The file is allocated at once, so a full disk is an OSError
    here and not a SIGBUS later.
    """

    def __init__(self, path: Path, grid: Grid, regions: int) -> None:
        """Open or create `path`. Raises OSError where the disk is full."""
        self.grid = grid
        size = grid.file_bytes * regions
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, size)
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def _view(self, region: int, i: int, j: int) -> tuple[Tensor, int]:
        start = region * self.grid.file_bytes + self.grid.index(i, j) * self.grid.slot
        shape = self.grid.shape(i, j)
        raw = self._bytes[start : start + 8 * shape[0] * shape[1]]
        return raw.view(torch.float64).view(shape), start

    def write(self, region: int, i: int, j: int, tile: Tensor) -> None:
        """Copy a tile into the file."""
        view, start = self._view(region, i, j)
        view.copy_(tile)
        self._map.madvise(mmap.MADV_DONTNEED, start, self.grid.slot)

    def read(self, region: int, i: int, j: int) -> Tensor:
        """A copy of a tile, in memory."""
        view, start = self._view(region, i, j)
        tile = view.clone()
        self._map.madvise(mmap.MADV_DONTNEED, start, self.grid.slot)
        return tile


class FileTiles:
    """The tiles of one region of a TileFile."""

    def __init__(self, file: TileFile, region: int, device: torch.device) -> None:
        """device: where `read` delivers."""
        self.grid = file.grid
        self._file, self._region, self._device = file, region, device

    def write(self, i: int, j: int, tile: Tensor) -> None:
        """Copy tile (i, j) into the file."""
        self._file.write(self._region, i, j, tile)

    def read(self, i: int, j: int) -> Tensor:
        """A copy of tile (i, j) on the device that computes."""
        return self._file.read(self._region, i, j).to(self._device)


class DenseTiles:
    """The lower half of a dense tensor [n, n], cut into tiles; what lies above is not looked at."""

    def __init__(self, matrix: Tensor, tile: int) -> None:
        """matrix: float64 [n, n]."""
        self.grid = Grid(len(matrix), tile)
        self._matrix = matrix

    def write(self, i: int, j: int, tile: Tensor) -> None:
        """Copy tile (i, j) into the matrix, its lower half only on the diagonal."""
        view = self._matrix[self.grid.rows(i), self.grid.rows(j)]
        view.copy_(tile if i > j else tile.tril() + view.triu(1))

    def read(self, i: int, j: int) -> Tensor:
        """A view of the tile; of the diagonal's a copy of the lower half."""
        view = self._matrix[self.grid.rows(i), self.grid.rows(j)]
        return view if i > j else view.tril()


def checksum(tile: Tensor) -> int:
    """CRC-32 of a tile's bytes, row by row."""
    return zlib.crc32(tile.detach().cpu().contiguous().numpy().data.cast("B"))
