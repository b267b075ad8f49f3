"""lambda_min(M M^T) over many machines: our own Gram and residual around ScaLAPACK's Cholesky.

Ranks share G = fl(M M^T) in square blocks (block_cyclic.py). A panel of b columns of M is made by
one grid column of ranks, each its own rows: each number is made once, and no rank ever holds more
than a few panels. It travels along the rows and columns of the grid, and each rank adds its
products to its own blocks. As in gram_tiles.py each product is formed apart and then added:
    | G - M M^T | <= gamma_K |M||M|^T,   K = b + ceil(p/b).

G is summed in the blocks above the diagonal, which keep it; those of the diagonal are kept apart.
The library transposes it into the lower blocks, A = G - s I with its diagonal rounded down, and
factors that in place. What it left there, L, is then measured. Block column by block column a
product of `block` terms, formed apart, is subtracted from A, N = ceil(n/block) at most. A
subtraction is Z = (Y - P)/(1 + d), |d| <= u; so (as in cholesky_tiles.py), with Z what is left,
    | L L^T - A | <= gamma_(block+N) |L||L|^T + (1 + gamma_N) |Z|
for any L, in whatever order a product adds its terms. Hence
    lambda_min(M M^T) >= ell = s - e_G - e_C,
    e_C = gamma_(block+N) ||L||_F^2 + (1 + gamma_N) ||Z||_F,
and where ell > 0 also log det(M M^T) >= 2 sum log |l_ii|. All that is assumed of the library is
that messages arrive unchanged: an `info` that lies, or a wrong factor, costs the proof, never its
truth, and what is written above the diagonal changes a checksum.

Sums over ranks are of vectors in which each entry comes from one rank, the others adding zero: they
are exact, and all ranks hold the same result.

    mpirun -n 4 python -m twophase_ext.linalg.distributed features.npy
"""

import argparse
import json
import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .block_cyclic import BlockCyclic, Ranks
from .bounds import SLACK, UNDERFLOW, bound_text, exponents_of, gamma, power_of_two, shifted_down
from .gram_run import GramCertificate, conclude
from .gram_tiles import PANEL, e_G, moderate
from .progress import Stages
from .scalapack import LARGEST, PART, Scalapack
from .shift import extrapolated, lambda_estimates, shifts_to_try, subsample

BLOCK = 256  # rows of a block
SCALED = 50  # binary exponents; rows are scaled no further: no underflow that counts
ASSUMPTIONS = [
    "float64 arithmetic rounds to nearest",
    "matrix products are sums of products in some order (no Strassen, no emulated float64)",
    "messages between ranks arrive unchanged",
    "logarithms are within 4 ulp (log det only)",
]
BlockSource = Callable[[int, int, int, int], Tensor | np.ndarray]


def rank_bytes(
    n: int, columns: int, grid: tuple[int, int], block: int = BLOCK, panel: int = PANEL
) -> int:
    """Memory of the largest rank: its blocks of G; then panels, or a subsample of G; strips.

    A panel of its rows is made while another one is used, whose rows for the columns come in P
    parts. Two messages. Beside it: what block_of needs.
    """
    blocks = math.ceil(n / block)
    rows, others = (block * math.ceil(blocks / side) for side in grid)
    panels = min(panel, columns) * (2 * rows + others + 2 * math.ceil(others / grid[0]))
    stage = max(panels, 5 * subsample(n) ** 2) + 4 * block * (rows + others) + 2 * PART
    return 8 * (rows * others + stage)


def certify_distributed(
    block_of: BlockSource,
    n: int,
    columns: int,
    ranks: Ranks,
    *,
    ones: bool = True,
    shift: float | None = None,
    scale_rows: bool = True,
    block: int = BLOCK,
    panel: int = PANEL,
    stages: Stages | None = None,
) -> GramCertificate:
    """Prove lambda_min(M M^T) >= ell for M = [h, 1], h [n, columns]; the same result on every rank.

    Collective: every rank calls it with the same arguments. block_of(i0, i1, j0, j1): float64
    h[i0:i1, j0:j1], asked for once for each entry, on one rank. ones: whether M has the column 1.
    shift: as of `certify_gram`. scale_rows: by powers of two, where their sizes are far apart.
    block: rows of a block; panel: columns of a panel. e_C of the result is the bound of the
    residual. Raises ValueError for a wrong argument or block, RuntimeError where the library
    refuses the call; an error on one rank alone leaves the others waiting (`Scalapack.abort`).
    """
    wanted = (("n", n, 1), ("columns", columns, 0), ("block", block, 1), ("panel", panel, 1))
    for name, value, least in wanted:
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    if shift is not None and not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift: expected a positive number, got {shift}")
    numbers = math.prod(block * math.ceil(math.ceil(n / block) / side) for side in ranks.grid)
    if numbers > LARGEST:
        raise ValueError(
            f"n: expected {LARGEST} entries of G a rank at most (ScaLAPACK's 32-bit offsets), "
            f"got {numbers}; use more ranks"
        )
    result = GramCertificate(n, columns + ones, tile=block, panel=panel)
    result.assumptions = list(ASSUMPTIONS)
    if n > result.columns:
        result.reason = f"{n} rows of {result.columns} columns are dependent"
        return result
    run = _Run(block_of, columns, ranks, result, Stages(False, None) if stages is None else stages)
    run.certify(shift, scale_rows)
    return result


class _Run:
    """One call of certify_distributed, on one rank."""

    def __init__(
        self,
        block_of: BlockSource,
        features: int,
        ranks: Ranks,
        result: GramCertificate,
        stages: Stages,
    ) -> None:
        self.block_of, self.features, self.ranks = block_of, features, ranks
        self.result, self.stages = result, stages
        self.gram = BlockCyclic(result.n, result.tile, ranks)
        P, Q = ranks.grid
        result.storage = {"gram": f"upper blocks, {P} x {Q} ranks", "factor": "lower blocks"}

    def certify(self, shift: float | None, scale_rows: bool) -> None:
        """Fill in the result."""
        result, earlier = self.result, len(self.stages.done)
        self._prove(shift, scale_rows)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result.peak_bytes = int(max(self.gram.from_all(float(peak))[0]))
        result.stages = self.stages.done[earlier:]

    def _prove(self, shift: float | None, scale_rows: bool) -> None:
        result, n = self.result, float(self.result.n)
        with self.stages.stage("Gram", n * n * result.columns) as stage:
            self._sum()
            stage.advance(n * n * result.columns)
        result.passes = 1
        diagonal = self.gram.diagonal()
        exponents = torch.zeros(len(diagonal), dtype=torch.int64, device="cpu")
        if scale_rows and bool(diagonal.isfinite().all()):
            exponents = moderate(exponents_of(diagonal.sqrt()).clamp(-SCALED, SCALED))
            self.gram.scale(power_of_two(-exponents))
            diagonal = self.gram.diagonal()
        result.row_exponents = int(exponents.min()), int(exponents.max())
        result.trace, result.max_diagonal = sum(diagonal.tolist()), float(diagonal.max())
        if not math.isfinite(result.trace):
            result.status = "not finite"
            result.reason = "an entry of the matrix is not finite, or M M^T is too large"
            return
        result.e_G = e_G(result.trace, result.columns, result.panel)
        for attempt, s in enumerate([shift] if shift is not None else self._ladder(), 1):
            result.attempts, result.shift = attempt, s
            if self._attempt(s, exponents):
                return

    def _sum(self) -> None:
        """G: as many panels are made at a time as the grid has columns, then added one by one."""
        Q, q = self.ranks.grid[1], self.ranks.place[1]
        p, b, kept = self.result.columns, self.result.panel, len(self.gram.rows.index)
        for base in range(0, p, Q * b):
            spans = [(start, min(start + b, p)) for start in range(base, min(base + Q * b, p), b)]
            mine = self._panel(*spans[q]) if q < len(spans) else None
            for root, (start, end) in enumerate(spans):
                own = mine if root == q else None
                left = self.gram.local.new_empty(kept, end - start) if own is None else own
                self.ranks.broadcast("Row", left, root)
                self.gram.add_products(left, 0, 1)

    def _panel(self, start: int, end: int) -> Tensor:
        """Columns start..end-1 of M, the rows kept here."""
        rows, stop = self.gram.rows, min(end, self.features)
        panel = self.gram.local.new_ones(len(rows.index), end - start)
        for b in rows.blocks if stop > start else ():
            span = rows.rows(b).start, rows.rows(b).stop, start, stop
            part = torch.as_tensor(self.block_of(*span), device="cpu")
            expected = [span[1] - span[0], stop - start]
            if part.dtype != torch.float64 or list(part.shape) != expected:
                raise ValueError(
                    f"block_of{span}: expected float64 {expected}, got {part.dtype} "
                    f"{list(part.shape)}"
                )
            panel[rows.local(b), : stop - start] = part
        return panel

    def _ladder(self) -> list[float]:
        """Shifts to try; the estimates are the first rank's."""
        result, gram = self.result, self.gram
        with self.stages.stage("smallest eigenvalue, estimated", 0.0):
            sizes, values = zip(*lambda_estimates(result.n, gram.submatrix), strict=True)
        result.lambda_estimates = [
            (k, found[0]) for k, found in zip(sizes, gram.from_all(*values), strict=True)
        ]
        errors = result.e_G + gamma(gram.block + gram.count + 8) * result.trace + UNDERFLOW
        estimate = extrapolated(result.lambda_estimates, result.n, result.columns)
        self.stages.say(f"lambda_min: about {estimate:.3g}; rounding errors: {errors:.3g}")
        return shifts_to_try(estimate, errors)

    def _attempt(self, s: float, exponents: Tensor) -> bool:
        """Factor G - s I and measure the residual; whether that settles the matter."""
        result, gram, stages, n = self.result, self.gram, self.stages, float(self.result.n)
        before = gram.checksums()
        shifted = {b: corner.clone() for b, corner in gram.corners.items()}
        for b, corner in shifted.items():
            corner.diagonal().copy_(shifted_down(corner.diagonal(), s))
            gram.own(b).copy_(corner + corner.triu(1).T)
        with stages.stage(f"Cholesky, s = {s:.3g}", n**3 / 3) as stage:
            self.ranks.mirror(gram.local, gram.n, gram.block)
            info = self.ranks.potrf(gram.local, gram.n, gram.block)
            stage.advance(n**3 / 3)
        changed = not torch.equal(before, gram.checksums())
        infos, changes = gram.from_all(float(info), float(changed))
        if any(changes):
            result.reason = "the library wrote above the diagonal: G is lost"
            return True
        if any(infos):
            result.failed_pivot = int(next(filter(None, infos))) - 1
            result.reason = f"no positive pivot in row {result.failed_pivot}, s = {s:.3g}"
            stages.say(result.reason)
            return False
        diagonal = gram.spread({b: gram.own(b).diagonal() for b in gram.corners})
        gram.corners = shifted
        with stages.stage("residual", n**3 / 3) as stage:
            e_C = self._residual()
            stage.advance(n**3 / 3)
        conclude(result, e_C, s, exponents, diagonal)
        return True

    def _residual(self) -> float:
        """e_C of the top of the file; what is left of A stands where G stood."""
        gram, Q, q = self.gram, self.ranks.grid[1], self.ranks.place[1]
        size = 0.0
        for k in range(gram.count):
            start, width = gram.rows.start(k), min(gram.block, gram.n - k * gram.block)
            left = gram.local.new_empty(len(gram.rows.index) - start, width)
            if k % Q == q:
                left.copy_(gram.local[gram.columns.local(k), start:].T)
                if k in gram.corners:
                    left[:width].tril_()
                size += float(left.square().sum())
            self.ranks.broadcast("Row", left, k % Q)
            gram.add_products(left, k, -1)
        sizes, rests = map(sum, gram.from_all(size, 2 * gram.squares()))
        # squares below 2^-1022 are lost
        rest = math.sqrt(rests) * (1 + gamma(gram.count)) + gram.n * 2.0**-510
        return (gamma(min(gram.block, gram.n) + gram.count) * sizes + rest) * SLACK


def main(arguments: list[str] | None = None) -> int:
    """Prove rank n for features in a file; 0 where that was proved. Every rank runs this."""
    parser = argparse.ArgumentParser(
        prog="mpirun -n RANKS python -m twophase_ext.linalg.distributed",
        description="Prove a lower bound of sigma_min([h, 1]) for stored features, over MPI ranks.",
    )
    parser.add_argument("features", type=Path, help=".npy, float64 [n, m]; read in blocks")
    parser.add_argument("--no_ones", action="store_true", help="leave the column 1 away")
    parser.add_argument("--grid", type=int, nargs=2, metavar=("P", "Q"), help="P x Q ranks")
    parser.add_argument("--block", type=int, default=BLOCK, help="rows of a block")
    parser.add_argument("--panel", type=int, default=PANEL, help="columns of a panel")
    parser.add_argument("--shift", type=float, help="s, tried alone (default: estimated)")
    parser.add_argument("--out", type=Path, metavar="RESULT.json", help="written by the first rank")
    options = parser.parse_args(arguments)
    ranks = Scalapack(None if options.grid is None else tuple(options.grid))
    first = ranks.rank == 0
    try:
        h = np.load(options.features, mmap_mode="r", allow_pickle=False)
        if h.ndim != 2 or h.dtype != np.float64:
            raise ValueError(f"features: expected float64 [n, m], got {h.dtype} {list(h.shape)}")
        proof = certify_distributed(
            lambda i0, i1, j0, j1: h[i0:i1, j0:j1].copy(),
            len(h),
            h.shape[1],
            ranks,
            ones=not options.no_ones,
            shift=options.shift,
            block=options.block,
            panel=options.panel,
            stages=Stages(False, (lambda text: print(text, flush=True)) if first else None),
        )
        if first:
            bound = f"sigma_min >= {bound_text(proof.sigma_min_lower, 6)}"
            print(f"{proof.status}: {bound if proof.proved else proof.reason}", flush=True)
            if options.out is not None:
                more = {k: getattr(proof, k) for k in ("stages", "peak_bytes", "assumptions")}
                text = json.dumps(proof.constants() | more | {"grid": ranks.grid}, indent=1)
                options.out.write_text(text + "\n", encoding="utf-8")
    except Exception as error:
        print(f"rank {ranks.rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        ranks.abort()  # the others wait for a message that never comes
        raise
    ranks.close()
    return 0 if proof.proved else 1


if __name__ == "__main__":
    sys.exit(main())
