"""The metric H = B B^T + mu I where neither side of M fits into memory: a Nystroem sketch.

B [p, r] is the stabilised sketch of A = M^T M / n (Tropp, Yurtsever, Udell & Cevher 2017, algorithm
3) along an orthonormal basis Q of A times r random directions: Y = A Q + nu Q, Q^T Y = C C^T,
B = Y C^-T. H is defined by the B
and mu that are stored; how well B B^T is A is not believed. Accelerated steps need ||D||_H^2 >=
||M D^T||^2 / n for the displacements D that they make, no others, and that is measured at every
step: what is missing, if ever, enters the bound (`excess`; docs/theory.md has the proof).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...core.seeds import stream_seed
from ...linalg.bounds import SLACK, UNIT_ROUNDOFF, gamma
from ..data.samples import BATCH
from .metric import Problem, Slope, factored, room, solved
from .sides import FeatureSide

LARGE = 1e30  # of the trace: beyond it squares may overflow in float32
EACH, MOST, LEAST = 32, 1024, 8  # directions for an output; in all; fewer are no sketch
PROBES, PASSES, MARGIN = 8, 3, 1.5  # of the power iteration for ||A - B B^T||; mu beside it


def planned(n: int, p: int, k: int, device: torch.device, name: str) -> int:
    """0 where the smaller side of M fits into memory, else r of a sketch that does.

    A sketch takes five [p, r] in float64, and rows. A product with r directions costs what r / k
    steps do, so more than EACH k are not worth it. ValueError where not even LEAST fit.
    """
    needed, there = room(n, p, device)
    if needed <= there:
        return 0
    rows = 8 * p * (2 * BATCH + 16 * k)
    rank = min(max(EACH * k, 128), MOST, max(min(n, p) // 2, LEAST), (there - rows) // (40 * p))
    if rank >= LEAST:
        return rank
    raise ValueError(
        f"second_phase: {name!r} factors the smaller side of M, {n} x {p}, in float64, "
        f"{needed / 2**30:.2g} GiB with two panels, or sketches it along {LEAST} directions at "
        f"least, {(rows + 40 * p * LEAST) / 2**30:.2g} GiB, where {there / 2**30:.2g} GiB can be "
        "had; second_phase='agd' with damping=None needs none"
    )


class SketchSide(FeatureSide):
    """Coordinates D^T [p, k], and passes over the features; rank: r.

    damping: mu, at least that asked for, and MARGIN times the norm of what the sketch leaves, by
    power iteration; l2 / L_ell included.
    """

    def __init__(
        self,
        problem: Problem,
        rank: int,
        seed: int,
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        """The sketch is made in two passes, its remainder measured in PASSES, the first with it.

        advance: called with the number of rows done, of PASSES + 1 times n.
        """
        super(FeatureSide, self).__init__(problem)
        self._advance = advance
        self.rank, device = rank, self.moving.device
        draws = torch.Generator().manual_seed(stream_seed(seed, "sketch"))
        q = torch.randn(self.p, rank + PROBES, generator=draws, dtype=torch.float64, device="cpu")
        q, probes = q.to(device).split((rank, PROBES), 1)
        # what spans the range need not be exact, as long as squares are in float32's range
        first = q.float() if self.trace < LARGE else q
        q = torch.linalg.qr(self.curved(first).double()).Q
        probes = torch.linalg.qr(probes - q @ (q.T @ probes)).Q
        y, image = self.curved(torch.cat([q, probes], 1)).split((rank, PROBES), 1)
        shift = 8 * gamma(self.n + self.p + 8) * self.trace / self.n
        y = y.add(q, alpha=shift)
        inner = q.T @ y
        lower = factored((inner + inner.T) / 2)
        self.sketch = torch.linalg.solve_triangular(lower, y.T, upper=False).T.contiguous()
        self.small = self.sketch.T @ self.sketch
        self.norm = float(self.sketch.norm()) * SLACK
        self.remainder = self._remainder(probes, image)
        self.refactor(problem.damping or 0.0)

    def curved(self, x: Tensor) -> Tensor:
        """M^T M x / n, x [p, b], in the precision of x: one pass."""
        total = torch.zeros_like(x)
        for _, m, _ in self.rows():
            m = m.to(x.dtype)
            total.addmm_(m.T, m @ x)
            self._advance(len(m))
        return total.div_(self.n)

    def _remainder(self, x: Tensor, image: Tensor) -> float:
        """||A - B B^T||, from below, by a few steps of block power iteration from x, A x known."""
        size = 0.0
        for k in range(PASSES):
            if k:
                x = torch.linalg.qr(x).Q
                image = self.curved(x)
            x = image - self.sketch @ (self.sketch.T @ x)
            size = max(size, float(torch.linalg.matrix_norm(x, 2)))
        return size

    def refactor(self, damping: float) -> None:
        """As of Side: mu I + B^T B is factored, r x r."""
        own = self.l2 / self.curvature
        self.damping = max(self.damped(damping), MARGIN * self.remainder + own)
        lower = self.small.clone()
        lower.diagonal().add_(self.damping)
        self.factor = factored(lower)

    @property
    def largest(self) -> float:
        """A bound of ||H||, and of ||M^T M|| / n."""
        return (max(self.trace / self.n, self.norm * self.norm) + self.damping) * SLACK

    def slope(self, at: Tensor) -> Slope:
        """As of Side; ||M^T e||_(H^-1) <= ||M|| ||e|| / sqrt(mu), where n ||e||^2 is not proved."""
        found = super().slope(at)
        more = max(1.0, math.sqrt(self.trace / (self.n * self.damping))) * SLACK
        return found._replace(size=found.size * more, error=found.error * more)

    def solve(self, rhs: Tensor) -> Tensor:
        """H^-1 = (I - B (mu I + B^T B)^-1 B^T) / mu, once refined."""

        def once(rhs: Tensor) -> Tensor:
            inner = solved(self.factor, self.sketch.T @ rhs) if self.factor is not None else rhs
            return rhs.sub(self.sketch @ inner).div_(self.damping)

        found = once(rhs)
        return found.add_(once(rhs - self._times(found)))

    def _times(self, x: Tensor) -> Tensor:
        """H x."""
        return (self.sketch @ (self.sketch.T @ x)).add_(x, alpha=self.damping)

    def error(self, found: Tensor, rhs: Tensor) -> float:
        """As of FeatureSide."""
        residual = self._times(found).sub_(rhs)
        of_product = gamma(self.p + self.rank + 8) * self.largest * float(found.norm())
        rounding = of_product + 4 * UNIT_ROUNDOFF * float(rhs.norm())
        return (float(residual.norm()) + rounding) / math.sqrt(self.damping) * SLACK

    def squared(self, at: Tensor, image: Tensor) -> float:
        """As of Side."""
        return float((self.sketch.T @ at).square().sum()) + self.damping * float(at.square().sum())

    def squared_above(self, moved: Tensor) -> float:
        """||D||_H^2, rounded up; D [k, p]."""
        length = float(moved.norm()) * SLACK
        inner = float((moved @ self.sketch).norm()) * SLACK
        inner += gamma(self.p + 2) * self.norm * length * SLACK
        return (inner * inner + self.damping * length * length) * SLACK + moved.numel() * 2.0**-1074

    def excess(self, step: Tensor, off: float) -> float:
        """As of Side: M D^T is formed, one pass."""
        squares, numbers = 0.0, self.n * self.k
        for _, m, _ in self.rows():
            squares += float((m @ step).square().sum())
        length, up = float(step.norm()), 1 + 4 * gamma(numbers + step.numel() + 8)
        lost = gamma(self.p + 2) * length * SLACK
        root = (math.sqrt(squares) * up + math.sqrt(self.trace) * lost) / math.sqrt(self.n) + off
        inner = max(float((self.sketch.T @ step).norm()) / up - self.norm * lost, 0.0)
        plain = max(self.damping - self.l2 / self.curvature * (1 + 8 * UNIT_ROUNDOFF), 0.0)
        norm = max(math.sqrt(inner * inner + plain * (length / up) ** 2) / up - off, 0.0)
        return max(0.0, root * root * up - norm * norm / up)
