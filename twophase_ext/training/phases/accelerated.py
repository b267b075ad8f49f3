"""second_phase="agd": accelerated gradient in the metric H = M^T M / n + lambda I.

docs/theory.md has the theorem: Theorem 1's premises, and a bound that falls as 1 / t^2.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.losses import CROSS_ENTROPY, SquaresLoss, split, unweighted
from ...theory.accelerated import Point, accelerated_guarantee
from ...theory.guarantee import ARITHMETIC, Guarantee
from ..control.interrupt import Interrupt
from ..faults import Diverged
from ..run import Run
from ..settings import AcceleratedDescent
from ..steps.accelerated import Iterate, weight_of
from ..steps.metric import Side
from ..steps.sides import SampleSide
from ..steps.sketch import SketchSide
from .metric import MetricPhase

SCALES = [0.25 * 2 ** (k / 2) for k in range(16)]  # of logits that comparators aim at: 0.25 to 45
SHARES = (1.0, 0.5, 0.25)  # of the way there
STRETCHES = (0.5, 1.0, 1.5, 2.0, 4.0)  # of the last weights' displacement
ESTIMATES = 2  # for each step made: less than that step costs
Estimate = tuple[float, float, str, Callable[[], Tensor]]


class AcceleratedPhase(MetricPhase):
    """`agd.steps` accelerated steps an epoch."""

    def __init__(self, run: Run) -> None:
        """As of TheoremPhase; ValueError where the metric does not fit into memory."""
        super().__init__(run)
        self.settings = self.context.config.agd or AcceleratedDescent()
        self.damping, self.l2 = self.settings.damping, self.settings.l2
        self.watch(self.settings.early_stopping)
        if self.damping is not None:
            self.check_room()

    def steps(self) -> int:
        """Steps in an epoch."""
        return self.settings.steps

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
        off = self.write(place.x)
        if state.batch < steps:
            return False
        look = self.look()
        self.note(look)
        point = Point(
            steps=place.steps,
            loss=look.objective,
            weight=weight_of(place.steps),
            drift=place.drift,
            pull=place.pull,
            # convexity: L(w) <= L(x) + <grad L(w), w - x>
            rise=look.slope * off * (1 + 1e-6),
        )
        known.points = [*(known.points or []), vars(point) | {"epoch": state.epoch}]
        return True

    def guarantee(self, status: str) -> Guarantee:
        """The accelerated bound beside the objective at the end of every epoch."""
        if status != "completed" or not self.state.second.points:
            return self.bound(status)
        if self.run.train_features is None:  # resumed at its end
            self.fill_caches()
        found = self.bound(status, self._evaluate)
        if (best := self.kept) is not None and found.curve:
            found.notes.append(f"the weights kept are those of epoch {best['epoch']}")
        return found

    @torch.no_grad()
    def _evaluate(self) -> Guarantee:
        known, side, context = self.state.second, self.metric(), self.context
        last = math.inf if self.kept is None else self.kept["epoch"]
        points = [Point(0, 0.0, 1.0, 0.0, 0.0, 0.0)]
        for row in known.points or []:
            if row["epoch"] <= last:  # of the weights that stay
                points.append(Point(**{k: v for k, v in row.items() if k != "epoch"}))
        start, steps = known.start or [], points[-1].steps
        found = accelerated_guarantee(
            self.blocks,
            start[0],
            start[1] if self.ones else self.fixed_bias(),
            loss=context.loss,
            mode=context.config.second_phase,
            points=points,
            damping=side.damping,
            l2=self.l2,
            ones=self.ones,
            estimates=self._estimates(side, ESTIMATES * steps),
            most=self._affordable(side, steps),
            assumptions=[ARITHMETIC],
            norm2=side.squared_above if isinstance(side, SketchSide) else None,
        )
        if self.l2:  # at the weights that stay
            found.constants["last_layer_gap"] = self.curved(self.look().gradient)
        return found

    def _affordable(self, side: Side, steps: int) -> int:
        """Comparators whose evaluation, two passes each, costs less than the phase did."""
        if isinstance(side, SketchSide):  # passes: two a comparator, two a step, four before
            return min(3, steps)
        n, p, k = side.n, side.p, side.k
        small = n if isinstance(side, SampleSide) else p
        factored = 0 if self.damping is None else n * p * small + small**3 // 3
        each = 8 * n * k * small if isinstance(side, SampleSide) else 4 * k * (n + p) * p
        return max(1, min(12, (factored + steps * each) // (12 * n * p * k)))

    def _estimates(self, side: Side, most: int) -> Iterator[Estimate]:
        """Some `most` of them: the last weights, then towards outputs that the loss would like."""
        known = self.state.second
        if known.iterate is None:
            return
        own = side.outputs_at(side.image(side.zeros()))
        x = known.iterate["x"].to(own.device)
        yield from self._along(
            side, [x], [([s], f"the last weights, {s:g} of the way") for s in STRETCHES]
        )
        loss = unweighted(self.context.loss)
        y, scale = split(self.context.loss, side.y)[0], side.scale(side.y)
        by = 1.0 if scale is None else scale[:, None]  # of outputs
        if loss is CROSS_ENTROPY:
            classes = own.shape[1]
            wish = (F.one_hot(y, classes).double() - 1 / classes) * by
            back = side.towards(own - own.mean(1, keepdim=True))
            aims = [
                ([share * c, -share], f"{share:g} of the way to {c:.3g} (one-hot - 1/{classes})")
                for c in SCALES
                for share in SHARES
            ]
            fewer = max(1, len(aims) // max(1, most - len(STRETCHES)))
            yield from self._along(side, [side.towards(wish), back], aims[::fewer])
        elif isinstance(loss, SquaresLoss):
            aims = [([share], f"{share:g} of the way to the targets") for share in SHARES]
            yield from self._along(side, [side.towards(y.double() * by - own)], aims)

    def _along(
        self, side: Side, directions: list[Tensor], mixtures: list[tuple[list[float], str]]
    ) -> Iterator[Estimate]:
        """Estimates of displacements that are sums of multiples of the directions."""
        images, start = [side.image(d) for d in directions], side.start_coordinates()
        y = side.y.double() if side.y.is_floating_point() else side.y
        for factors, name in mixtures:
            at = sum((f * d for f, d in zip(factors, directions, strict=True)), side.zeros())
            image = sum((f * i for f, i in zip(factors, images, strict=True)), 0 * images[0])
            square = side.dot(at, at, image)
            value = float(side.loss(side.outputs_at(image), y))
            whole = float(side.moving.square().sum()) + 2 * side.dot(start, at, image) + square
            value += self.l2 / 2 * whole
            yield value, side.squared(at, image), name, partial(_displacement, side, at)


def _displacement(side: Side, at: Tensor) -> Tensor:
    return side.displacement(at)[0]
