"""A proved lower bound of lambda_min(M M^T), M [n, p] too large to be stored (Rump, BIT 46, 2006).

G = fl(M M^T) is off by e_G at most (gram_tiles.py), L L^T by e_C from G - s I with its diagonal
rounded down (cholesky_tiles.py). L L^T is positive semidefinite, so
    lambda_min(M M^T) >= ell = s - e_G - e_C,
and where ell > 0: rank M = n, sigma_min(M) >= sqrt(ell). Where ell >= 0, M M^T - L L^T is positive
semidefinite too, so log det(M M^T) >= 2 sum log l_ii.
"""

import math
import resource
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import inside
from .bounds import UNDERFLOW, above, below, power_of_two
from .cholesky_tiles import expected_e_C, factor
from .gram_tiles import PanelSource, accumulate, e_G, row_exponents
from .journal import Journal, RecordedTiles
from .logdet import log_det_lower, log_det_shift
from .plan import Plan
from .progress import Stages
from .shift import extrapolated, lambda_estimates, shifts_to_try, submatrix
from .tiles import FileTiles, Grid, MemoryTiles, TileFile, Tiles

VERSION = 2  # of the journal
ASSUMPTIONS = [
    "float64 arithmetic rounds to nearest",
    "matrix products are sums of products in some order (no Strassen, no emulated float64)",
    "every call for a panel of columns gives the same numbers",
    "logarithms are within 4 ulp (log det only)",
]


@dataclass
class GramCertificate:
    """What was proved of M [n, columns], and how.

    shift, e_G, e_C, ell, trace and max_diagonal are of the matrix whose row i is row i of M times
    2^-e_i, e_i between the two row_exponents; sigma_min_lower and both log dets are of M itself.
    """

    n: int
    columns: int
    status: str = "not proved"  # "proved", "not proved" or "not finite"
    reason: str = ""
    ell: float = -math.inf  # lambda_min >= ell, rounded down
    sigma_min_lower: float = 0.0
    shift: float | None = None
    e_G: float = math.nan
    e_C: float = math.nan
    row_exponents: tuple[int, int] = (0, 0)
    logdet_lower: float | None = None  # proved
    logdet_estimate: float | None = None  # an estimate
    trace: float = math.nan
    max_diagonal: float = math.nan
    attempts: int = 0
    failed_pivot: int | None = None  # row (from 0) of the last attempt that broke down
    lambda_estimates: list[tuple[int, float]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    storage: dict[str, str] = field(default_factory=dict)
    tile: int = 0
    panel: int = 0
    passes: int = 0  # over the columns, for G, in this process
    peak_bytes: int = 0  # of the process so far (CUDA: of the device)
    assumptions: list[str] = field(default_factory=lambda: list(ASSUMPTIONS))

    @property
    def proved(self) -> bool:
        """Whether rank M = n is proved."""
        return self.status == "proved"

    def constants(self) -> dict[str, Any]:
        """The numbers of the proof as plain JSON types; what is not finite is left out."""
        names = [
            "n",
            "columns",
            "status",
            "reason",
            "ell",
            "sigma_min_lower",
            "shift",
            "e_G",
            "e_C",
            "row_exponents",
            "logdet_lower",
            "logdet_estimate",
            "trace",
            "max_diagonal",
            "attempts",
            "failed_pivot",
            "lambda_estimates",
            "storage",
            "tile",
            "panel",
            "passes",
        ]
        values = {name: getattr(self, name) for name in names}
        return {
            name: [list(v) if isinstance(v, tuple) else v for v in value]
            if isinstance(value, list | tuple)
            else value
            for name, value in values.items()
            if not isinstance(value, float) or math.isfinite(value)
        }


class GramRun:
    """One certification by tiles: stores, journal and stages; `certify_gram` makes it."""

    def __init__(
        self,
        source: PanelSource,
        sizes: Plan,
        folder: Path | None,
        key: str,
        resume: bool | str,
        scale_rows: bool | None,
        shift: float | None,
        stages: Stages,
        result: GramCertificate,
    ) -> None:
        """Open the files; the other arguments as of `certify_gram`."""
        self.source, self.sizes, self.stages, self.result = source, sizes, stages, result
        self.scale_rows = scale_rows
        self.earlier = len(stages.done)
        self.grid = Grid(sizes.n, sizes.tile)
        self.file: TileFile | None = None
        self.journal: Journal | None = None
        if folder is not None:
            header = {
                "version": VERSION,
                "key": key,
                "n": sizes.n,
                "columns": sizes.columns,
                "tile": sizes.tile,
                "panel": sizes.panel,
                "scale_rows": scale_rows,
                "shift": shift,
            }
            self.journal = Journal(inside(folder, "tiles.journal"), header, resume)
            try:
                self.file = TileFile(inside(folder, "tiles.bin"), self.grid, regions=2)
            except BaseException:
                self.journal.close()
                raise
        result.storage = {"gram": sizes.gram, "factor": sizes.factor}

    def close(self) -> None:
        """Leave a state that can be resumed, and say what was used."""
        if self.journal is not None:
            self.journal.close()
        self.result.stages = self.stages.done[self.earlier :]
        if self.source.device.type == "cuda":
            self.result.peak_bytes = torch.cuda.max_memory_allocated(self.source.device)
        else:
            self.result.peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _tiles(self, name: str, place: str, region: int) -> RecordedTiles:
        device = self.source.device
        kept = None if self.file is None else FileTiles(self.file, region, device)
        keep_on = device if place == "device" else torch.device("cpu")
        store: Tiles
        if place == "file" and kept is not None:
            store = kept
        else:
            store = MemoryTiles(self.grid, device, keep_on)
        return RecordedTiles(name, store, kept, self.journal)

    def certify(self, shift: float | None, passes: int | None) -> None:
        """Fill in the result."""
        exponents = self._exponents()
        if exponents is None:
            self._not_finite("an entry of the matrix is not finite")
            return
        result, grid = self.result, self.grid
        result.row_exponents = int(exponents.min()), int(exponents.max())
        gram = self._gram(exponents, passes)
        diagonal = torch.cat([gram.read(i, i).diagonal() for i in range(grid.count)])
        result.trace, result.max_diagonal = float(diagonal.sum()), float(diagonal.max())
        if not math.isfinite(result.trace):
            self._not_finite("an entry of the matrix is not finite, or M M^T is too large")
            return
        result.e_G = e_G(result.trace, self.source.columns, self.sizes.panel)
        shifts = [shift] if shift is not None else self._ladder(gram, result.trace, result.e_G)
        for attempt, s in enumerate(shifts, 1):
            if self._attempt(gram, attempt, s, exponents):
                return

    def _not_finite(self, reason: str) -> None:
        self.result.status, self.result.reason = "not finite", reason

    def _exponents(self) -> Tensor | None:
        """Of the rows; None where an entry is not finite."""
        device = self.source.device
        if self.scale_rows is False:
            return torch.zeros(self.source.n, dtype=torch.int64, device=device)
        known = self.journal and self.journal.find("exponents")
        if known:
            return torch.tensor(known[1], dtype=torch.int64, device=device)
        with self.stages.stage(
            "sizes of the rows", float(self.source.n) * self.source.columns
        ) as s:
            exponents = row_exponents(self.source, self.sizes.panel, bool(self.scale_rows))
            s.advance(float(self.source.n) * self.source.columns)
        if exponents is not None and self.journal is not None:
            self.journal.add("exponents", exponents.tolist())
        return exponents

    def _gram(self, exponents: Tensor, passes: int | None) -> Tiles:
        gram = self._tiles("G", self.sizes.gram, 0)
        n = float(self.source.n)
        with self.stages.stage("Gram", n * (n + self.grid.tile) * self.source.columns) as stage:
            self.result.passes = accumulate(
                self.source,
                power_of_two(-exponents) if bool(exponents.any()) else None,
                gram,
                gram.restore(),
                panel=self.sizes.panel,
                group_bytes=self.sizes.group_bytes,
                passes=passes,
                stage=stage,
            )
        return gram

    def _ladder(self, gram: Tiles, trace: float, e_G: float) -> list[float]:
        n, result = self.source.n, self.result
        known = self.journal and self.journal.find("lambda")
        if known:
            result.lambda_estimates = [(int(rows), float(value)) for rows, value in known[1]]
        else:
            with self.stages.stage("smallest eigenvalue, estimated", 0.0):
                result.lambda_estimates = lambda_estimates(n, partial(submatrix, gram))
            if self.journal is not None:
                self.journal.add("lambda", result.lambda_estimates)
        errors = e_G + expected_e_C(trace, self.grid) + UNDERFLOW
        estimate = extrapolated(result.lambda_estimates, n, self.source.columns)
        self.stages.say(f"lambda_min: about {estimate:.3g}; rounding errors: {errors:.3g}")
        return shifts_to_try(estimate, errors)

    def _attempt(self, gram: Tiles, attempt: int, s: float, exponents: Tensor) -> bool:
        """Factor G - s I; whether it ran to its end, which settles the matter."""
        result, journal, name = self.result, self.journal, f"L{attempt}"
        tried = journal and journal.find(f"shift {name}")
        if tried:
            s = float(tried[1])
        elif journal is not None:
            journal.add(f"shift {name}", s)
        result.attempts, result.shift = attempt, s
        failed = journal and journal.find(f"failed {name}")
        if failed:
            result.failed_pivot = int(failed[1])
        else:
            lower = self._tiles(name, self.sizes.factor, 1)
            n = float(self.source.n)
            with self.stages.stage(f"Cholesky, s = {s:.3g}", n**3 / 3 + n**2 * self.grid.tile) as t:
                done = factor(gram, lower, s, lower.restore(), t)
            if done.failed_pivot is None:
                self._settle(done.e_C(self.grid), lower, s, exponents)
                return True
            result.failed_pivot = done.failed_pivot
            if journal is not None:
                journal.add(f"failed {name}", done.failed_pivot)
        result.reason = f"no positive pivot in row {result.failed_pivot}, s = {s:.3g}"
        self.stages.say(result.reason)
        return False

    def _settle(self, e_C: float, lower: Tiles, s: float, exponents: Tensor) -> None:
        result = self.result
        diagonal = torch.cat([lower.read(i, i).diagonal() for i in range(self.grid.count)])
        conclude(result, e_C, s, exponents, diagonal)
        if result.logdet_lower is not None and self.sizes.factor != "file":
            with self.stages.stage("log det, estimated", 0.0):
                result.logdet_estimate = result.logdet_lower + log_det_shift(lower, s)


def conclude(
    result: GramCertificate, e_C: float, s: float, exponents: Tensor, diagonal: Tensor
) -> None:
    """Write down what a factor L of G - s I proves; row_exponents and e_G stand in the result.

    e_C: bound of || L L^T - A ||_2, A <= G - s I. exponents: int64 [n], of the rows. diagonal:
    float64 [n], of L.
    """
    result.failed_pivot, result.e_C = None, e_C
    result.ell = below(below(s - above(result.e_G + result.e_C)) - UNDERFLOW)
    if not result.ell > 0:
        result.reason = f"the shift {s:.3g} does not exceed the rounding errors"
        return
    result.status, result.reason = "proved", ""
    # beyond the largest double the product is inf, and that double is still a lower bound
    sigma = below(math.sqrt(result.ell)) * 2.0 ** result.row_exponents[0]
    result.sigma_min_lower = max(0.0, below(sigma))
    rows = 2 * math.log(2) * int(exponents.sum())  # log det is of the rows as they came
    logdet = log_det_lower(diagonal)
    result.logdet_lower = below(logdet + rows - 2.0**-50 * (abs(logdet) + abs(rows)))
