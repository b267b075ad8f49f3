"""second_phase="exact": the minimum of the last layer's objective, to a stated gap.

Squared error without l2 is one least squares problem; anything else goes by L-BFGS in the metric of
the features. How the weights were found is not believed: their objective is evaluated in float64,
rounded up, and compared with a lower bound of every objective:
    L(w) - inf L <= L(w) - L_floor                  (over all weights of every network)
    L(w) - min L <= ||grad L(w)||^2 / (2 l2)        (over the last layer, by strong convexity).
"""

import math

import torch
from torch import Tensor

from ...core.memory import available_memory
from ...linalg.bounds import bound_text, plus
from ...model.losses import CROSS_ENTROPY, SQUARED_ERROR, split, unweighted
from ...theory.comparators import last_layer_objective
from ...theory.floor import floor_of
from ...theory.guarantee import ARITHMETIC, Guarantee
from ...theory.loss_rounding import ASSUMED
from ..control.interrupt import Interrupt
from ..faults import Diverged
from ..run import Run
from ..settings import Exact
from ..steps.least_squares import least_squares
from ..steps.metric import SHARE
from ..steps.quasi_newton import QuasiNewton
from .metric import MetricPhase, trace_form

# of the metric of L-BFGS, in mean eigenvalues: what is reached first generalises best; divided by
# LESS after so many iterations, as what is left then lies along small eigenvalues
DAMPING, LESS, EVERY = 0.1, 100.0, 50
ENOUGH = 0.1  # of the gap: an estimated one that ends the run where none is proved


class ExactPhase(MetricPhase):
    """An epoch is one least squares solve, or `exact.steps` iterations of L-BFGS."""

    floor: float = -math.inf

    def __init__(self, run: Run) -> None:
        """As of TheoremPhase; ValueError where the metric does not fit into memory."""
        super().__init__(run)
        context = self.context
        self.settings = context.config.exact or Exact()
        self.l2 = self.settings.l2
        self.watch(self.settings.early_stopping)
        n = context.train.rows * (context.config.augment_copies or 1)
        needed = 3 * 8 * n * (context.network.width + 1)
        fits = needed <= SHARE * available_memory(context.device)
        self.direct = unweighted(context.loss) is SQUARED_ERROR and not self.l2 and fits
        self.damping = None if self.direct else DAMPING
        if not self.direct:
            self.check_room()

    def steps(self) -> int:
        """An epoch is one."""
        return 1

    def smoothness(self, norms: Tensor) -> float:
        """Not used but for what cannot be computed with."""
        return trace_form(norms, self.features.targets, self.context.loss)

    def fill_caches(self) -> None:
        """As of MetricPhase; then L_floor, from the equal inputs."""
        super().fill_caches()
        context, train = self.context, self.context.train
        if context.config.augment_copies is not None or self.run.unfixed or train.groups is None:
            return  # of other samples than those given
        outputs = context.network.outputs
        self.floor = floor_of(context.loss, train.groups, train.targets, outputs).lower

    @torch.no_grad()
    def epoch(self, interrupt: Interrupt) -> bool:
        """One solve, or some iterations; nothing of it is kept where it is interrupted."""
        state, known, side = self.state, self.state.second, self.metric()
        if self.direct:
            at, estimate, ended = *self._least_squares(), True
        else:
            at = side.zeros() if known.iterate is None else known.iterate["x"]
            done = (state.epoch - self.context.config.tau_epoch) * self.settings.steps
            damping = DAMPING / LESS ** (done // EVERY)
            if side.damping != side.damped(damping):
                side.refactor(damping)
            solver = QuasiNewton(side, at.to(side.moving.device))
            found = solver.run(self.settings.steps, self._enough)
            at, estimate, ended = found.at, found.decrement, found.ended
            if not math.isfinite(found.value):
                raise Diverged(0, found.value, None)
            ended = ended or found.iterations < self.settings.steps
        known.iterate = {"x": at, "estimate": estimate}
        self.write(at)
        look = self.look()
        self.note(look)
        gap = self.gap(look.gradient)[0]
        self.row |= {"gap": gap if math.isfinite(gap) else None}
        if gap <= self.settings.gap:
            known.ended = f"the gap is below {self.settings.gap:g}"
        elif ended:
            known.ended = "no step lowers the objective by more than the estimated gap"
        state.batch = 1
        self.context.progress.advance(f"epoch {state.epoch}")
        return True

    def _enough(self, value: float, decrement: float, squared: float) -> bool:
        """Whether the iterations may end; the weights' rounding comes on top."""
        gap = 0.5 * self.settings.gap
        if self.l2:
            return min(value - self.floor, squared / (2 * self.l2)) <= gap
        return value - self.floor <= gap or decrement <= ENOUGH * self.settings.gap

    def _least_squares(self) -> tuple[Tensor, float]:
        """(coordinates D^T [p, k], what the refinement lowered the loss by)."""
        side = self.metric()
        m, targets = torch.empty(side.n, side.p, dtype=torch.float64, device=side.moving.device), []
        for here, rows, y in side.rows():
            m[here] = rows
            scale, aims = side.scale(y), split(self.context.loss, y)[0].double()
            targets.append(aims if scale is None else aims * scale[:, None])
        wish = torch.cat(targets) - side.logits(m, side.moving, side.y)
        found, correction = least_squares(m, wish)
        return found, correction / side.n * side.curvature / 2

    def gap(self, gradient: float) -> tuple[float, float, str]:
        """(proved upper bound of what the weights are above the least objective, L, by what)."""
        known, loss = self.state.second, self.context.loss
        weight, start = self.weights(), known.start
        if start is None:
            raise RuntimeError("the gap was asked for before w^tau was kept")
        m = start[0].shape[1]
        bias = weight[:, m] if self.ones else self.fixed_bias()
        value = last_layer_objective(
            self.blocks, weight[:, :m], bias, loss, self.l2, ones=self.ones
        )
        found = plus(value, -self.floor), value, f"L_floor = {self.floor:.6g}, over all weights"
        if self.l2:
            curved = self.curved(gradient)
            found = min(found, (curved, value, f"strong convexity, l2 = {self.l2:g}, last layer"))
        return found

    def guarantee(self, status: str) -> Guarantee:
        """The audit, and how far the weights are from the minimum."""
        if status != "completed" or self.state.second.iterate is None:
            return self.bound(status)
        if self.run.train_features is None:  # resumed at its end
            self.fill_caches()
        return self.bound(status, self._evaluate)

    @torch.no_grad()
    def _evaluate(self) -> Guarantee:
        known, loss, settings = self.state.second, self.context.loss, self.settings
        gradient = self.look().gradient
        gap, value, by = self.gap(gradient)
        found = Guarantee(mode="exact", assumptions=[ARITHMETIC])
        if not loss.known:
            found.assumptions.append(
                f"{loss.name} is convex in the output with L_ell = {loss.smoothness:g}, as declared"
            )
        if loss not in (CROSS_ENTROPY, SQUARED_ERROR):
            found.assumptions.append(f"the evaluation of {loss.name} in float64: {ASSUMED}")
        found.constants = {"objective": value, "l2": self.l2, "asked": settings.gap}
        if self.l2:
            found.constants["last_layer_gap"] = self.curved(gradient)
        what = "objective" if self.l2 else "training loss"
        reached = f"the {what} is at most {bound_text(value, 6, upper=True)}"
        if math.isfinite(gap):
            found.constants |= {"gap": gap, "floor": self.floor}
            reached += f", proved to be at most {bound_text(gap, 3, upper=True)} above the least"
            reached += f" ({by})"
        found.notes.append(reached)
        if (best := self.kept) is not None:
            found.notes.append(f"the weights kept are those of epoch {best['epoch']}")
        elif not gap <= settings.gap and known.iterate is not None:
            estimate = known.iterate["estimate"]
            left = ""
            if math.isfinite(estimate):
                found.constants["estimate"] = estimate
                left = f"; over the last layer alone about {estimate:.2g} is left, an estimate"
            found.notes.append(f"a gap of {settings.gap:g} is not proved{left}")
        return found
