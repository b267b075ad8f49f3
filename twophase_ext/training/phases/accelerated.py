"""second_phase="agd": accelerated gradient in the metric H = M^T M / n + lambda I.

docs/theory.md has the theorem: Theorem 1's premises, and a bound that falls as 1 / t^2.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...linalg.bounds import UNIT_ROUNDOFF
from ...model.losses import CROSS_ENTROPY, SQUARED_ERROR
from ...theory.accelerated import Point, accelerated_guarantee
from ...theory.guarantee import ARITHMETIC, Guarantee, smoothness
from ..control.interrupt import Interrupt
from ..faults import Diverged, Stopped
from ..run import Run
from ..settings import AcceleratedDescent
from ..steps.accelerated import Iterate, weight_of
from ..steps.metric import Problem, Side, check_room, slopes
from ..steps.sides import SampleSide, made
from .watched import WatchedPhase

SCALES = [0.25 * 2 ** (k / 2) for k in range(16)]  # of logits that comparators aim at: 0.25 to 45
SHARES = (1.0, 0.5, 0.25)  # of the way there
STRETCHES = (0.5, 1.0, 1.5, 2.0, 4.0)  # of the last weights' displacement
Estimate = tuple[float, float, str, Callable[[], Tensor]]


class AcceleratedPhase(WatchedPhase):
    """`agd.steps` accelerated steps an epoch."""

    side: Side | None = None

    def __init__(self, run: Run) -> None:
        """As of TheoremPhase; ValueError where the metric does not fit into memory."""
        super().__init__(run)
        context = self.context
        self.settings = context.config.agd or AcceleratedDescent()
        self.watch(self.settings.early_stopping, run)
        if self.settings.damping is not None:
            n = context.train.n * (context.config.augment_copies or 1)
            check_room(n, context.network.width + 1, context.device, "agd")

    def steps(self) -> int:
        """Steps in an epoch."""
        return self.settings.steps

    def smoothness(self) -> float:
        """L_H without l2; for the factored metric, which does not use it, the form of one pass."""
        form = "tight" if self.settings.damping is None else "paper"
        return smoothness(self.blocks, loss=self.context.loss, form=form, ones=self.ones)

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
            self.settings.damping,
            self.settings.l2,
        )
        with self.run.timed("factorization"), torch.no_grad():
            try:
                self.side = made(problem)
            except ValueError as error:
                raise Stopped(str(error)) from error

    def metric(self) -> Side:
        """The side of M that steps are made on."""
        if self.side is None:
            raise RuntimeError("a step was asked for before the metric was made")
        return self.side

    @torch.no_grad()
    def epoch(self, interrupt: Interrupt) -> bool:
        """The rest of the epoch's steps."""
        state, known, side = self.state, self.state.second, self.metric()
        if known.iterate is None:
            known.iterate = vars(Iterate(side.zeros(), side.zeros()))
        place, steps = Iterate(**known.iterate), self.steps()
        place.x, place.z = (t.to(side.moving.device) for t in (place.x, place.z))
        while state.batch < steps and not (interrupt.requested and state.batch):
            loss = place.advance(side)
            if not math.isfinite(loss):
                raise Diverged(state.batch, loss, None)
            known.iterate = dict(vars(place))
            state.batch += 1
            self.context.progress.advance(f"epoch {state.epoch}")
            if self.run.due() and state.batch < steps:
                self.save_within()
        off = self._write(side, place.x)
        if state.batch < steps:
            return False
        self._measure(side, place, off)
        return True

    def _write(self, side: Side, at: Tensor) -> float:
        """The last layer's weights from coordinates; how far they are from them, ||.||_F."""
        moved, off = side.displacement(at)
        exact = side.moving + moved
        parts = [exact[:, : side.p - side.ones], exact[:, -1]] if side.ones else [exact]
        squares = 0.0
        for p, part in zip(self.parameters(), parts, strict=True):
            p.copy_(part)
            squares += float((p.double() - part).square().sum())
        rounding = 4 * UNIT_ROUNDOFF * (side.length + float(moved.norm()))
        return (math.sqrt(squares) + rounding + off) * (1 + 1e-9)

    def _measure(self, side: Side, place: Iterate, off: float) -> None:
        """The objective at the weights as they are, and the point of the curve."""
        state, known, n = self.state, self.state.second, side.n
        weight = torch.cat([p.detach().double().view(side.k, -1) for p in self.parameters()], 1)
        total, squares, correct = 0.0, 0.0, 0
        for _, m, y in side.rows():
            outputs = side.logits(m, weight)
            if self.context.loss is CROSS_ENTROPY:
                correct += int((outputs.argmax(1) == y).sum())
            value, delta, rounding = slopes(self.context.loss, outputs, y)
            total += value
            squares += (float(delta.norm()) + rounding) ** 2
        length = float(weight.norm())
        objective = total / n + self.settings.l2 / 2 * length**2
        # convexity: L(w) <= L(x) + <grad L(w), w - x>
        slope = math.sqrt(squares / n * side.trace / n) + self.settings.l2 * length
        point = Point(
            steps=place.steps,
            loss=objective,
            weight=weight_of(place.steps),
            drift=place.drift,
            pull=place.pull,
            rise=slope * off * (1 + 1e-6),
        )
        known.points = [*(known.points or []), vars(point) | {"epoch": state.epoch}]
        train = self.context.train.n
        state.sums[0], state.sums[1] = total / n * train, correct / n * train
        self.row = {"objective": objective}

    def guarantee(self, status: str) -> Guarantee:
        """The accelerated bound beside the objective at the end of every epoch."""
        if status != "completed" or not self.state.second.points:
            return self.bound(status)
        if self.run.train_features is None:  # resumed at its end
            self.fill_caches()
        found = self.bound(status, self._evaluate)
        best = self.state.second.best
        if best is not None and found.curve:
            found.kept = f"the weights kept are those of epoch {best['epoch']}"
        return found

    @torch.no_grad()
    def _evaluate(self) -> Guarantee:
        known, side, context = self.state.second, self.metric(), self.context
        last = math.inf if known.best is None else known.best["epoch"]
        points = [Point(0, 0.0, 1.0, 0.0, 0.0, 0.0)]
        for row in known.points or []:
            if row["epoch"] <= last:  # of the weights that stay
                points.append(Point(**{k: v for k, v in row.items() if k != "epoch"}))
        start = known.start or []
        return accelerated_guarantee(
            self.blocks,
            start[0],
            start[1] if self.ones else self.fixed_bias(),
            loss=context.loss,
            mode=context.config.second_phase,
            points=points,
            damping=side.damping,
            l2=self.settings.l2,
            ones=self.ones,
            estimates=self._estimates(side),
            most=self._affordable(side, points[-1].steps),
            assumptions=[ARITHMETIC],
            known=context.loss in (CROSS_ENTROPY, SQUARED_ERROR),
        )

    def _affordable(self, side: Side, steps: int) -> int:
        """Comparators whose evaluation, two passes each, costs less than the phase did."""
        n, p, k = side.n, side.p, side.k
        small = n if isinstance(side, SampleSide) else p
        factored = 0 if self.settings.damping is None else n * p * small + small**3 // 3
        each = 8 * n * k * small if isinstance(side, SampleSide) else 4 * k * (n + p) * p
        return max(1, min(12, (factored + steps * each) // (12 * n * p * k)))

    def _estimates(self, side: Side) -> Iterator[Estimate]:
        """Comparators: towards the last weights, and towards outputs that the loss would like."""
        known = self.state.second
        if known.iterate is None:
            return
        own, y = self._outputs_at_tau(side)
        x = known.iterate["x"].to(side.moving.device)
        yield from self._along(
            side, own, y, [x], [([s], f"the last weights, {s:g} of the way") for s in STRETCHES]
        )
        if self.context.loss is CROSS_ENTROPY:
            classes = own.shape[1]
            wish = F.one_hot(y, classes).double() - 1 / classes
            back = side.towards(own - own.mean(1, keepdim=True))
            aims = [
                ([share * c, -share], f"{share:g} of the way to {c:.3g} (one-hot - 1/{classes})")
                for c in SCALES
                for share in SHARES
            ]
            yield from self._along(side, own, y, [side.towards(wish), back], aims)
        elif self.context.loss is SQUARED_ERROR:
            aims = [([share], f"{share:g} of the way to the targets") for share in SHARES]
            yield from self._along(side, own, y, [side.towards(y.double() - own)], aims)

    def _outputs_at_tau(self, side: Side) -> tuple[Tensor, Tensor]:
        """(outputs [n, k] at w^tau, targets)."""
        parts = [(side.logits(m, side.moving), y) for _, m, y in side.rows()]
        return torch.cat([a for a, _ in parts]), torch.cat([y for _, y in parts])

    def _along(
        self,
        side: Side,
        own: Tensor,
        y: Tensor,
        directions: list[Tensor],
        mixtures: list[tuple[list[float], str]],
    ) -> Iterator[Estimate]:
        """Estimates of displacements that are sums of multiples of the directions."""
        moved = [side.moved(d) for d in directions]
        inner = side.products(directions, directions)
        along = (
            side.products([side.start_coordinates()], directions)[0] if self.settings.l2 else None
        )
        y = y.double() if y.is_floating_point() else y
        for factors, name in mixtures:
            shift = sum((f * part for f, part in zip(factors, moved, strict=True)), own * 0)
            f = torch.tensor(factors, dtype=torch.float64, device="cpu")
            square = float(f @ inner @ f)
            value = float(self.context.loss(own + shift, y))
            if along is not None:
                whole = float(side.moving.square().sum()) + 2 * float(f @ along) + square
                value += self.settings.l2 / 2 * whole
            distance = float(shift.square().sum()) / side.n + side.damping * square

            def displacement(factors: list[float] = factors) -> Tensor:
                at = sum((f * d for f, d in zip(factors, directions, strict=True)), side.zeros())
                return side.displacement(at)[0]

            yield value, distance, name, displacement
