"""G = M M^T tile by tile, M [n, p] float64 made a panel of columns at a time.

Every tile adds up its panels in the same order, each product formed apart (beta = 0) and then added
by one rounding. A term of g_ij passes the b roundings of its panel's product, in whatever order the
BLAS adds, and at most ceil(p/b) - 1 additions of panels, so
    | fl(M M^T) - M M^T | <= gamma_K |M||M|^T,  K = b + ceil(p/b),
entry by entry, for entries of any sign; and || |M||M|^T ||_2 <= trace(|M||M|^T) = trace(M M^T) = T.
Products below 2^-1022 add at most n p eta, which UNDERFLOW covers. With beta = 1 a BLAS may round
what it adds to many times: then K = p.
"""

import time
from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from ..core.hashing import tensors_hash
from .bounds import SLACK, exponents_of, gamma
from .journal import RecordedTiles
from .progress import Stage
from .tiles import Grid

PANEL = 2000  # columns
STRIP = 512  # rows of the products that make a tile of the diagonal: less of its upper half
MODERATE = 4  # binary exponents: rows that differ by less are left as they are


class PanelSource(Protocol):
    """The columns of M, made on request: the same bits at every call."""

    @property
    def n(self) -> int:
        """Rows."""

    @property
    def columns(self) -> int:
        """Columns, p."""

    @property
    def device(self) -> torch.device:
        """Where panels are made and products computed."""

    def panel(self, start: int, end: int) -> Tensor:
        """Columns start..end-1: float64 [n, end - start] on `device`; it is not written to."""


class MatrixSource:
    """A stored matrix as a PanelSource."""

    def __init__(self, matrix: Tensor) -> None:
        """matrix: float32 or float64 [n, p]; converted panel by panel."""
        self.n, self.columns = matrix.shape
        self.device = matrix.device
        self._matrix = matrix

    def panel(self, start: int, end: int) -> Tensor:
        """Columns start..end-1 in float64."""
        return self._matrix[:, start:end].double()

    def content(self) -> str:
        """A hash of every entry: what tiles on disk belong to."""
        return tensors_hash({"matrix": self._matrix})


def e_G(trace: float, columns: int, panel: int) -> float:
    """Bound of || fl(M M^T) - M M^T ||_2 but for underflow. trace: computed trace of G."""
    b = min(panel, columns)
    return gamma(b + -(-columns // max(b, 1))) * trace * SLACK


def row_exponents(source: PanelSource, panel: int, always: bool) -> Tensor | None:
    """int64 [n]: row i is to be multiplied by 2^-e_i; None where an entry is not finite.

    Exact but for underflow, it leaves the rank as it is. All zero, unless `always`, where the rows'
    largest entries lie within MODERATE exponents of each other and not far from 1. One pass over
    the columns.
    """
    largest = torch.zeros(source.n, dtype=torch.float64, device=source.device)
    for start in range(0, source.columns, panel):
        columns = source.panel(start, min(start + panel, source.columns))
        largest = torch.maximum(largest, columns.abs().amax(1))  # a NaN is the largest
    if not bool(largest.isfinite().all()):
        return None
    exponents = exponents_of(largest)
    return exponents if always else moderate(exponents)


def moderate(exponents: Tensor) -> Tensor:
    """Zeros where they lie within MODERATE of each other and not far from 0, else themselves."""
    low, high = int(exponents.min()), int(exponents.max())
    if high - low <= MODERATE and max(-low, high) <= 25 * MODERATE:
        return torch.zeros_like(exponents)
    return exponents


def accumulate(
    source: PanelSource,
    scale: Tensor | None,
    tiles: RecordedTiles,
    done: Collection[tuple[int, int]],
    *,
    panel: int,
    group_bytes: int,
    passes: int | None,
    stage: Stage,
) -> int:
    """Write every tile of G that is not in `done`, each once; how many passes that took.

    A pass makes all panels and holds the sums of one group of tiles, of group_bytes at most.
    passes: at least so many; None: as few as memory allows, but with a journal on a CPU as many as
    add a tenth to the time, so that a kill costs a group and not the whole stage.
    scale: float64 [n] factors of the rows, or None.
    """
    left = [tile for tile in tiles.grid.lower() if tile not in done]
    most = max(1, group_bytes // (8 * tiles.grid.tile**2))
    if passes is not None:
        most = min(most, max(1, -(-len(left) // passes)))
    adapt = passes is None and tiles.recorded and source.device.type == "cpu"
    taken = 0
    while left:
        sums = _one_pass(source, scale, tiles.grid, left[:most], panel, adapt, stage)
        for (i, j), tile in sums.items():
            tiles.write(i, j, tile)
        stage.advance(0, len(sums))
        left = left[len(sums) :]
        taken += 1
    return taken


def _one_pass(
    source: PanelSource,
    scale: Tensor | None,
    grid: Grid,
    group: list[tuple[int, int]],
    panel: int,
    adapt: bool,
    stage: Stage,
) -> dict[tuple[int, int], Tensor]:
    """Sums over all panels for the tiles of the group.

    adapt: for its first tiles only, as soon as their products take ten times as long as making a
    panel, a row of tiles at least. The group changes no bit of a tile.
    """
    if source.columns == 0:
        return {(i, j): new_tile(grid.shape(i, j), source.device).zero_() for i, j in group}
    sums: dict[tuple[int, int], Tensor] = {}
    buffer = new_tile((grid.tile**2,), source.device)
    for start in range(0, source.columns, panel):
        began = time.perf_counter()
        columns = source.panel(start, min(start + panel, source.columns))
        if scale is not None:
            columns = columns * scale[:, None]
        made = time.perf_counter()
        for i, j in group:
            r, c = grid.shape(i, j)
            new = new_tile((r, c), source.device) if start == 0 else buffer[: r * c].view(r, c)
            flops = lower_product(columns[grid.rows(i)], columns[grid.rows(j)], i == j, new)
            if start == 0:
                sums[i, j] = new
            else:
                sums[i, j].add_(new)
            stage.advance(flops)
            enough = adapt and start == 0 and len(sums) >= grid.count
            if enough and time.perf_counter() - made >= 10 * (made - began):
                break
        group = list(sums)
    return sums


def new_tile(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """An uninitialised float64 tensor."""
    return torch.empty(shape, dtype=torch.float64, device=device)


def lower_product(rows: Tensor, others: Tensor, diagonal: bool, out: Tensor) -> float:
    """out = rows others^T, of a tile of the diagonal the lower half; operations executed.

    Formed apart (beta = 0). rows [r, k], others [c, k], out [r, c], float64.
    """
    if not diagonal:
        torch.mm(rows, others.T, out=out)
        return 2.0 * out.numel() * rows.shape[1]
    flops = 0.0
    for start in range(0, len(rows), STRIP):
        end = min(start + STRIP, len(rows))
        torch.mm(rows[start:end], others[:end].T, out=out[start:end, :end])
        flops += 2.0 * (end - start) * end * rows.shape[1]
        out[start:end, end:] = 0
    out.tril_()
    return flops
