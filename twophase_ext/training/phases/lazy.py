"""The lazy second phase (Theorem 3): all layers move, by full gradient steps that keep the rank.

w^{t+1} = w^t - (2 eta_bar / L) grad L(w^t) on every trainable parameter, one step an epoch, the
gradient summed over the whole training set in index order. The NTK K(w^k) keeps its full rank as
long as [h_X'(w^k), 1] has rank N (see ntk.py), which is verified again at a chosen cadence.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...expressivity import Verdict
from ...model.losses import SQUARED_ERROR
from ...theory.lazy_guarantee import LazyGuarantee
from ...theory.lemma7 import lemma7
from ...theory.ntk import method_at_w, rank_shown
from ...theory.premises import loss_premise
from ..audit import fixed_premise
from ..context import Context
from ..control.interrupt import Interrupt
from ..data.samples import BATCH
from ..faults import Stopped
from ..optimizer.groups import rate
from ..run import Run
from ..settings import Lazy
from .phase import SecondPhase

HALVINGS = 8  # of the step at one check, before the run stops


class LazyPhase(SecondPhase):
    """Steps on all layers that keep the rank, as Theorem 3 asks; one an epoch."""

    moves = "all layers are"

    def __init__(self, run: Run) -> None:
        """ValueError for data that change from visit to visit, and for several learning rates."""
        super().__init__(run)
        context = self.context
        self.settings = context.config.lazy or Lazy()
        if context.train.random:
            raise ValueError(
                "train: second_phase='lazy' needs the gradient of one fixed function, but the "
                "inputs change from visit to visit"
            )
        rates = sorted({rate(group) for group in context.optimizer.param_groups}, key=str)
        if self.settings.smoothness is None and (len(rates) > 1 or None in rates):
            raise ValueError(
                "optimizer: second_phase='lazy' takes one step size for all parameters, got "
                f"learning rates {rates[:3]}; give lazy={{'smoothness': L}}"
            )
        # set at tau, halved where the rank cannot be shown; a resumed run goes on with its own
        rows = self._rows()
        self.step: float | None = rows[-1]["learning_rate"] if rows else None

    def _rows(self) -> list[dict[str, Any]]:
        return [row for row in self.state.history if row["phase"] == 2]

    @staticmethod
    def frozen(context: Context) -> dict[str, Tensor]:
        """BatchNorm's statistics and whatever else is not trained."""
        moving = context.network.parameters()
        return {n: t for n, t in SecondPhase.frozen(context).items() if n not in moving}

    def moving(self) -> Iterable[Tensor]:
        """All trainable parameters."""
        return self.context.network.parameters().values()

    def learning_rate(self) -> float | None:
        """The step made."""
        return super().learning_rate() if self.step is None else self.step

    def verify(self, method: str | None = None) -> Verdict:
        """As of SecondPhase; "auto" is what says something of these very weights."""
        if self.context.config.verify == "auto":
            method = method_at_w(self.context.train.distinct, self.context.network.width + 1)
        return super().verify(method)

    # --- one step ----------------------------------------------------------------------------

    def train_epoch(self, interrupt: Interrupt) -> bool:
        """One full gradient step; False where it was interrupted (state before the step)."""
        if self.state.verdict is None:
            raise RuntimeError("the lazy phase was asked for a step before its verification")
        self.context.train.epoch = self.state.epoch
        self.look_for_other_steps()
        steps = self.state.epoch - self.context.config.tau_epoch
        self.row = {"gradient_norm": None, "rank": None, "sigma_min": None, "checks": []}
        if steps == 0:
            self._note(self.state.verdict, 0)
        if not rank_shown(self.state.verdict):
            raise Stopped(f"rank N not shown at w^tau: {_why(self.state.verdict)}")
        if self.step is None:
            smoothness = self.settings.smoothness
            rate = super().learning_rate()
            self.step = rate if smoothness is None else 2 * self.settings.eta_bar / smoothness
        if not self._gradient(interrupt):
            return False
        last = self.state.epoch + 1 == self.context.config.epochs
        self._descend(steps + 1, last or (steps + 1) % self.settings.verify_every == 0)
        self.note_weights()
        return True

    def _gradient(self, interrupt: Interrupt) -> bool:
        """grad L(w) over all samples into the parameters' .grad; False where interrupted."""
        n, size, done = self.context.train.n, self.context.config.batch_size, 0
        rows = self.context.train.rows
        sums = torch.zeros(2, dtype=torch.float64, device=self.context.device)
        self.context.optimizer.zero_grad(set_to_none=True)
        stage = f"epoch {self.state.epoch}"
        self.context.progress.begin(stage, math.ceil(n / size))
        with self.run.own_rng():
            for x, y in self.context.train.in_order(size):
                if interrupt.requested:
                    break
                outputs, counted = self.context.network.model(x), self.context.train.counted(y)
                outputs, y = outputs[counted], y[counted]
                if not len(y):
                    continue
                loss = self.context.loss(outputs, y)
                (loss * (len(y) / rows)).backward()
                sums[0] += loss.detach().double() * len(y)
                correct = self.run.correct(outputs.detach(), y)
                if correct is not None:
                    sums[1] += correct
                done += len(y)
                self.context.progress.advance(stage)
        self.context.progress.end(stage)
        if done < n:
            self.context.optimizer.zero_grad(set_to_none=True)
            return False
        self.state.sums = sums.cpu()
        return True

    @torch.no_grad()
    def _descend(self, steps: int, check: bool) -> None:
        """The step; where it is checked, halved until the rank is shown after it."""
        if self.step is None:
            raise RuntimeError("a step was asked for before its size was settled")
        moved = [
            (p, p.grad) for p in self.context.network.parameters().values() if p.grad is not None
        ]
        self.context.optimizer.zero_grad(set_to_none=True)
        self.row["gradient_norm"] = math.sqrt(
            sum(float(grad.double().square().sum()) for _, grad in moved)
        )
        origin = [p.clone() for p, _ in moved] if check else []
        for attempt in range(HALVINGS + 1):
            if attempt:
                self.step /= 2
                self.context.progress.say(
                    f"epoch {self.state.epoch}: rank N not shown after the step, halved to "
                    f"{self.step:.3g}"
                )
            for p, grad in moved:
                p.sub_(grad, alpha=self.step)
            if not check:
                return
            verdict = self.verify()
            if rank_shown(verdict):
                self._note(verdict, steps)
                return
            for (p, _), value in zip(moved, origin, strict=True):
                p.copy_(value)
        self._note(verdict, steps)
        raise Stopped(
            f"rank N not shown after step {steps}, nor after {HALVINGS} halvings: {_why(verdict)}"
        )

    def _note(self, verdict: Verdict, steps: int) -> None:
        """A verification's outcome into this epoch's row, with Lemma 7 where the rank was shown."""
        bound, shown = None, rank_shown(verdict)
        if shown and method_at_w(verdict.distinct, verdict.width + 1) == "svd":  # M fits, too
            with self.run.timed("lemma 7"), self.run.own_rng():
                batches = list(self.context.train.in_order(BATCH))
                bound = lemma7(self.context.network, batches, self.context.loss)
        names = ("status", "method", "rank", "sigma_min", "sigma_min_lower", "reason")
        found = {name: getattr(verdict, name) for name in names}
        if shown:
            found["rank"] = verdict.distinct  # a certificate counts none
        self.row["checks"].append({"steps": steps, **found, "lemma7": bound})
        if steps:
            sigma = found["sigma_min"]
            sigma = found["sigma_min_lower"] if sigma is None else sigma
            self.row |= {"rank": found["rank"], "sigma_min": sigma}

    # --- what is known -----------------------------------------------------------------------

    def guarantee(self, status: str) -> LazyGuarantee | None:
        """The audit of Theorem 3's premises; None before tau."""
        if self.state.verdict is None:
            return None
        rows = self._rows()
        checks = [check for row in rows for check in row["checks"]]
        checks += self.row["checks"] if self.stopped else []
        at_tau = _rank_status([self.state.verdict.status])
        self.look_for_other_steps()
        shown = _rank_status([check["status"] for check in checks])
        every = self.settings.verify_every
        cadence = "every step" if every == 1 else f"every {every} steps"
        ranks = f"{len(rows)} steps made, verified at w^tau and after {cadence}"
        if shown != "failed" and every > 1 and len(rows) > 1:
            shown, ranks = "not checked", f"{ranks}, not between them"
        if changed := self.state.second.changed:
            shown, ranks = "failed", changed
        smoothness = self._smoothness_audit(rows, checks)
        step = ("0 < eta_bar < 1", "held", f"eta_bar = {self.settings.eta_bar:g}")
        if self.settings.smoothness is None:
            step = ("0 < eta_bar < 1", "not checked", "the step is the learning rate")
        declared = loss_premise(self.context.loss)
        result = LazyGuarantee(
            [
                ("Assumption 1, at w^tau", at_tau, _why(self.state.verdict)),
                ("Assumption 2", declared.status, declared.evidence),
                ("L-smooth objective", *smoothness),
                step,
                fixed_premise(self.context, self.state),
                ("rank preserved", shown, ranks),
            ],
            checks,
            self.stopped,
        )
        whole = shown in ("proved", "numerical") and len(checks) == len(rows) + 1
        failed = smoothness[0] == "failed" or self.run.unfixed
        if whole and not failed and self.settings.smoothness is not None:
            result.bound = self._rate(rows, checks, self.settings.smoothness)
        return result

    def _smoothness_audit(
        self, rows: list[dict[str, Any]], checks: list[dict[str, Any]]
    ) -> tuple[str, str]:
        """L is the user's word; the descent that it implies (Lemma 8) can contradict it."""
        smoothness = self.settings.smoothness
        if smoothness is None:
            return "not checked", "no L was given"
        eps = torch.finfo(self.context.config.dtype).eps
        ends = [c["lemma7"]["loss"] for c in checks if c["lemma7"] and c["steps"] == len(rows) > 0]
        losses = [row["train_loss"] for row in rows] + ends[-1:]
        for now, (loss, after) in zip(rows, pairwise(losses), strict=False):
            step = now["learning_rate"]
            decrease = step * (1 - step * smoothness / 2) * now["gradient_norm"] ** 2
            # a thousandth and 1000 eps: far above the rounding of losses and gradients
            if not after <= loss - 0.999 * decrease + 1e3 * eps * loss:
                return "failed", (
                    f"L = {smoothness:g} is too small: the loss fell by "
                    f"{loss - after:.3g} in epoch {now['epoch']}, L promises "
                    f"{decrease:.3g}"
                )
        return "not checked", f"L = {smoothness:g} as given; no step contradicted it"

    def _rate(
        self, rows: list[dict[str, Any]], checks: list[dict[str, Any]], smoothness: float
    ) -> float | None:
        """Theorem 3's bound, for squared error: its Q_k holds the group means' interpolator.

        With steps that shrank: the least eta_bar (1 - eta_bar). R_bar from last-layer
        displacements, which are at least the theorem's (a minimum over more directions).
        """
        if (
            self.context.loss is not SQUARED_ERROR
            or not rows
            or any(c["lemma7"] is None for c in checks)
        ):
            return None
        radius = max(check["lemma7"]["distance"] for check in checks)
        used = [row["learning_rate"] * smoothness / 2 for row in rows]
        least = min(eta * (1 - eta) for eta in used)
        first = checks[0]["lemma7"]["loss"]
        return radius * math.sqrt(smoothness * first / (2 * least * (len(rows) + 1)))


def _why(verdict: Verdict) -> str:
    shown = f", sigma_min {verdict.sigma_min:.2e}" if verdict.sigma_min is not None else ""
    return verdict.reason or f"{verdict.status} at these weights by {verdict.method}{shown}"


def _rank_status(statuses: list[str]) -> str:
    """The weakest of verdicts: "failed" here means that the rank was not shown."""
    if not statuses or not set(statuses) <= {"proved", "full rank"}:
        return "failed"
    return "proved" if set(statuses) == {"proved"} else "numerical"
