"""second_phase="gd", Theorem 1 (i): w <- w - grad L(w) / L_H, the gradient over all samples."""

import math
import warnings

import torch
from torch import Tensor

from ...model.losses import CROSS_ENTROPY, SQUARED_ERROR
from ...theory.guarantee import Guarantee, smoothness
from ..control.interrupt import Interrupt
from ..faults import Diverged
from ..run import Run
from ..settings import GradientDescent
from ..steps.gradient import Rounding, full_gradient
from .theorem import TheoremPhase


class GradientDescentPhase(TheoremPhase):
    """Full gradient steps of size 1 / L_H; each epoch makes `gd.steps` of them."""

    def __init__(self, run: Run) -> None:
        """As of TheoremPhase."""
        super().__init__(run)
        self.settings = self.context.config.gd or GradientDescent()

    def steps(self) -> int:
        """Steps in an epoch."""
        return self.settings.steps

    def smoothness(self, norms: Tensor) -> float:
        """L_H in the form asked for, l2 included."""
        form, l2 = self.settings.smoothness, self.settings.l2
        return smoothness(self.blocks, loss=self.context.loss, form=form, ones=self.ones, l2=l2)

    @torch.no_grad()
    def epoch(self, interrupt: Interrupt) -> bool:
        """The rest of the epoch's steps."""
        state, steps = self.state, self.steps()
        while state.batch < steps and not (interrupt.requested and state.batch):
            loss = self._descend()
            if state.batch == 0:
                state.sums[0] = loss * self.context.train.rows
            state.batch += 1
            self.context.progress.advance(f"epoch {state.epoch}")
            if self.run.due() and state.batch < steps:
                self.save_within()
        if state.batch < steps:
            return False
        self.row = {"objective": state.second.begin}
        if self.features.mode == "none":  # counting would be one more pass
            self.row["train_accuracy"] = None
        return True

    def _objective(self, loss: float) -> float:
        squares = sum(float(p.detach().double().square().sum()) for p in self.parameters())
        return loss + self.settings.l2 / 2 * squares

    def _descend(self) -> float:
        """One step; the loss before it."""
        known, context = self.state.second, self.context
        layer = context.network.last.module
        if known.smoothness is None or known.norms is None:
            raise RuntimeError("a step was asked for before L_H was computed")
        step = 1 / known.smoothness
        loss, *gradients = full_gradient(self.features, layer, context.loss)
        if not math.isfinite(loss):
            raise Diverged(self.state.batch, loss, None)
        objective = self._objective(loss)
        moving = self.parameters()
        squares = 0.0
        for p, gradient in zip(moving, gradients, strict=False):
            gradient.add_(p, alpha=self.settings.l2)
            squares += float(gradient.double().square().sum())
        self._check(objective)
        if self.state.batch == 0:
            known.begin = objective
        if context.loss in (CROSS_ENTROPY, SQUARED_ERROR):
            rounding = Rounding(known.norms, layer, context.loss)
            rows = torch.cat([p.detach().double().view(len(p), -1) for p in layer.parameters()], 1)
            size, whole = float(rows.norm(dim=1).max()), float(rows.norm())
            known.rise = 2 * rounding.of_loss(loss, size) + rounding.of_step(
                loss, size, math.sqrt(squares), step, whole, known.smoothness
            )
        known.objective = objective
        for p, gradient in zip(moving, gradients, strict=False):
            p.sub_(gradient, alpha=step)
        return loss

    def _check(self, objective: float) -> None:
        """Theorem 1 (i) rests on descent: a rise beyond rounding ends the claim, not the run."""
        known = self.state.second
        if self.run.unfixed or known.objective is None or known.rise is None:
            return
        if math.isfinite(objective) and objective > known.objective + known.rise:
            known.unfixed = (
                f"the objective rose in epoch {self.state.epoch}, {known.objective!r} -> "
                f"{objective!r}, where rounding explains at most {known.rise:.3g}: weights or "
                "features changed between the steps (a callback?)"
            )
            warnings.warn(f"nothing is claimed: {known.unfixed}", stacklevel=2)

    def guarantee(self, status: str) -> Guarantee:
        """Theorem 1 (i) in its comparator form, beside the objective at every epoch's start."""
        settings, rows = self.settings, [r for r in self.state.history if r["phase"] == 2]
        if status != "completed":
            return self.bound(status)
        if self.run.train_features is None:  # resumed at its end
            self.fill_caches()
        layer = self.context.network.last.module
        last, *gradients = full_gradient(self.features, layer, self.context.loss)
        self._check(self._objective(last))
        found = self.bound(
            status,
            lambda: self.theorem_1(
                steps=[settings.steps * k for k in range(len(rows) + 1)],
                losses=[*(row["objective"] for row in rows), self._objective(last)],
                smoothness=self.state.second.smoothness,
                l2=settings.l2,
            ),
        )
        if settings.l2 > 0 and self.run.unfixed is None:
            found.constants["last_layer_gap"] = self._gap(gradients)
        return found

    def _gap(self, gradients: list[torch.Tensor]) -> float:
        """||grad F||^2 / (2 l2), above F - min F over the last layer: F is l2-strongly convex."""
        l2, squares = self.settings.l2, 0.0
        for p, gradient in zip(self.parameters(), gradients, strict=False):
            whole = gradient.double().add_(p.detach().double(), alpha=l2)
            squares += float(whole.square().sum())
        return squares / (2 * l2) * (1 + 1e-9)
