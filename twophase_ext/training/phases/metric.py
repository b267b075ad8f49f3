"""What "agd" and "exact" share: the metric of the features, weights from coordinates, a look."""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.hashing import tensors_hash
from ...linalg.bounds import SLACK, UNIT_ROUNDOFF, gamma
from ...model.losses import ConvexLoss
from ..faults import Stopped
from ..steps.metric import Problem, Side, slopes
from ..steps.sides import made
from ..steps.sketch import PASSES, SketchSide, planned
from .watched import WatchedPhase


class Look(NamedTuple):
    """The last layer as it stands, over all samples in float64.

    loss: mean, without l2; objective: with it. slope: a bound of the mean over samples of
    ||delta_i|| ||M_i||, root mean squares each. gradient: a bound of ||grad||_F of the objective.
    correct: answers.
    """

    loss: float
    objective: float
    slope: float
    gradient: float
    correct: int


def trace_form(norms: Tensor, targets: Tensor, loss: ConvexLoss) -> float:
    """(L_ell / n) sum_i r_i ||[h_i, 1]||^2 of Theorem 1; ValueError where it is not finite."""
    scale = loss.row_scale(targets)
    rows = norms if scale is None else norms * scale.to(norms)
    found = loss.smoothness * float(rows.square().sum()) / len(norms) * SLACK
    if not found < math.inf:
        raise ValueError("blocks: expected finite features, got NaN, infinity or too large ones")
    return found


class MetricPhase(WatchedPhase):
    """Steps in coordinates of a `Side` of M; the layer's weights follow at an epoch's end."""

    side: Side | None = None
    l2: float = 0.0
    damping: float | None = None
    rank: int = 0

    def check_room(self) -> None:
        """Plan the metric: factored where it fits into memory, else sketched; else ValueError."""
        context, network = self.context, self.context.network
        n = context.train.rows * (context.config.augment_copies or 1)
        name, p = context.config.second_phase, network.width + 1
        self.rank = planned(n, p, network.outputs, context.device, name)

    def smoothness(self, norms: Tensor) -> float:
        """L_H without l2; where the metric is factored, which makes no use of it, from the norms.

        ValueError for features that are not finite.
        """
        loss = self.context.loss
        if self.damping is None:
            return super().smoothness(norms)
        return trace_form(norms, self.features.targets, loss)

    def fill_caches(self) -> None:
        """As of TheoremPhase; then the metric, in every process."""
        super().fill_caches()
        known, layer = self.state.second, self.context.network.last.module
        if known.start is None or known.norms is None or known.smoothness is None:
            raise RuntimeError("the metric was asked for before its constants")
        problem = Problem(
            self.features,
            known.start,
            layer,
            self.context.loss,
            known.norms,
            known.smoothness,
            self.damping,
            self.l2,
        )
        with self.run.timed("factorization"), torch.no_grad():
            try:
                self.side = self._sketched(problem) or made(problem)
            except ValueError as error:
                raise Stopped(str(error)) from error

    def _sketched(self, problem: Problem) -> Side | None:
        """The sketch, where one is planned or was begun with; the very same one, or no claim."""
        known, context = self.state.second, self.context
        begun = known.iterate is not None
        rank = known.sketch["rank"] if known.sketch else 0 if begun else self.rank
        if problem.damping is None or not rank:
            return None
        stage, progress = "sketch of the metric", context.progress
        progress.begin(stage, (PASSES + 1) * problem.features.n)
        try:
            side = SketchSide(
                problem, rank, context.config.seed, lambda rows: progress.advance(stage, rows)
            )
        finally:
            progress.end(stage)
        now = tensors_hash({"B": side.sketch, "mu": torch.tensor(side.remainder, device="cpu")})
        if known.sketch and known.sketch["hash"] != now:
            known.unfixed = "the metric's sketch is another one than that of the checkpoint"
            warnings.warn(f"nothing is claimed: {known.unfixed}", stacklevel=2)
        known.sketch = {"rank": rank, "hash": now}
        context.progress.say(
            f"epoch {self.state.epoch}: the {problem.features.n} x {side.p} matrix M is too large "
            f"to be factored: its metric is a sketch of rank {rank} + {side.damping:.3g} I"
        )
        return side

    def metric(self) -> Side:
        """The side of M that steps are made on."""
        if self.side is None:
            raise RuntimeError("a step was asked for before the metric was made")
        return self.side

    def write(self, at: Tensor) -> float:
        """The last layer's weights from coordinates; how far they are from them, ||.||_F."""
        side = self.metric()
        moved, off = side.displacement(at)
        exact = side.moving + moved
        parts = [exact[:, :-1], exact[:, -1]] if side.ones else [exact]
        squares = 0.0
        for p, part in zip(self.parameters(), parts, strict=True):
            p.copy_(part)
            squares += float((p.double() - part).square().sum())
        rounding = 4 * UNIT_ROUNDOFF * (side.length + float(moved.norm()))
        return (math.sqrt(squares) + rounding + off) * (1 + 1e-9)

    def weights(self) -> Tensor:
        """The moving part of the last layer [k, p], float64."""
        parts = [p.detach().double().view(len(p), -1) for p in self.parameters()]
        return torch.cat(parts, 1)

    def look(self) -> Look:
        """Loss and gradient at the weights as they are: one pass."""
        side, weight = self.metric(), self.weights()
        total, squares, correct, rounding = 0.0, 0.0, 0, 0.0
        gradient = torch.zeros_like(weight)
        for _, m, y in side.rows():
            outputs = side.logits(m, weight, y)
            right = self.run.correct(outputs, y)
            correct += 0 if right is None else int(right)
            value, delta, error = slopes(side.loss, outputs, y)
            total, rounding = total + value, rounding + error
            squares += (float(delta.norm()) + error) ** 2
            gradient.addmm_(delta.T, m)
        n, root, length = side.n, math.sqrt(side.trace), float(weight.norm())
        gradient.div_(n).add_(weight, alpha=self.l2)
        off = gamma(side.p + 8) * root * (side.length + length)
        of_delta = (side.curvature * off + rounding) / n
        summed = gamma(n + 8) * root * math.sqrt(squares) / n + 8 * UNIT_ROUNDOFF * self.l2 * length
        return Look(
            loss=total / n,
            objective=total / n + self.l2 / 2 * length**2,
            slope=math.sqrt(squares / n * side.trace / n) + self.l2 * length,
            gradient=(float(gradient.norm()) + root * of_delta + summed) * SLACK,
            correct=correct,
        )

    def curved(self, gradient: float) -> float:
        """||grad||^2 / (2 l2), above objective - its least over the last layer; inf without l2."""
        return gradient * gradient / (2 * self.l2) * (1 + 1e-9) if self.l2 else math.inf

    def note(self, look: Look) -> None:
        """What the epoch's row has: the loss at its end."""
        state, train, n = self.state, self.context.train.rows, self.metric().n
        state.sums[0], state.sums[1] = look.loss * train, look.correct / n * train
        self.row = {"objective": look.objective}
