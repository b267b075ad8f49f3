"""Second phases that train the last layer alone, over features that no longer change.

base: the base algorithm's own steps. gd, sgd: Theorem 1 (i) and (ii).
"""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..core.seeds import epoch_order, stream_seed
from ..model.losses import CROSS_ENTROPY, SQUARED_ERROR
from ..theory.guarantee import Guarantee, guarantee, smoothness
from ..theory.premises import UNCHECKED
from .audit import premises
from .columns import ColumnStep, OwnColumns
from .engine import Run
from .faults import Diverged
from .features import BATCH
from .gradient import Rounding, full_gradient, row_norms
from .head import HeadStep
from .interrupt import Interrupt

ONE_CALL = 0.1  # seconds of steps without a look at Ctrl-C


class HeadRun(Run):
    """second_phase="base": the base algorithm with eta_t = eta * nu; see `Run`."""

    columns: OwnColumns | None = None  # of this epoch, on several ranks

    def _second(self, interrupt: Interrupt) -> bool:
        features = self.train_features
        assert features is not None
        features.copy = self.epoch % features.copies
        order = epoch_order(self.config.seed, self.epoch, self.train.n)
        return self._head_epoch(self.optimizer, interrupt, order, self._bounds())

    def _head_epoch(
        self,
        optimizer: torch.optim.Optimizer,
        interrupt: Interrupt,
        order: Tensor,
        bounds: list[int],
        rates: list[float] | None = None,
    ) -> bool:
        """The rest of an epoch's mini-batch steps of the last layer, many a call."""
        layer = self.network.last.module
        if self.ranks.size == 1:
            head = HeadStep(layer, self.loss, optimizer)
            return self._head_steps(head, interrupt, order, bounds, rates)
        with OwnColumns(layer, optimizer, self.ranks) as self.columns:
            head = ColumnStep(layer, self.loss, optimizer)
            return self._head_steps(head, interrupt, order, bounds, rates)

    def _save_within(self) -> None:
        with nullcontext() if self.columns is None else self.columns.whole():
            super()._save_within()

    def _head_steps(
        self,
        head: HeadStep,
        interrupt: Interrupt,
        order: Tensor,
        bounds: list[int],
        rates: list[float] | None,
    ) -> bool:
        features = self.train_features
        assert features is not None
        one_by_one = features.mode == "none" or (self.schedule.per_step and rates is None)
        at_once = 1 if one_by_one else 8

        def count(h: Tensor, y: Tensor) -> None:
            correct = self._correct(self.network.logits(h), y)
            self.sums[1] += 0 if correct is None else int(correct)

        last = len(bounds) - 1
        while self.batch < last and not (interrupt.requested and self.batch):
            started = time.perf_counter()
            now = self.cadence.most(min(at_once, last - self.batch))
            steps = slice(self.batch, self.batch + now)
            part = bounds[steps.start : steps.stop + 1]
            with torch.no_grad():
                losses = head.run(features, order, part, rates and rates[steps], count)
            for loss, begin, end in zip(losses, part[:-1], part[1:], strict=True):
                if not math.isfinite(loss):
                    raise Diverged(self.batch, loss, order[begin:end] % self.train.n)
                self.sums[0] += loss * (end - begin)
                self.batch += 1
            if one_by_one and rates is None:
                self.schedule.end_step()
                head.look_again()  # the groups' rates may differ from now on
            if self._due(len(losses)) and self.batch < last:
                self._save_within()
            self.progress.advance(f"epoch {self.epoch}", len(losses))
            # Ctrl-C is looked at a few times a second.
            slow = self.ranks.any(time.perf_counter() - started >= ONE_CALL)
            if not one_by_one and not slow:
                at_once *= 2
        return self.batch == last

    def _moving(self) -> list[nn.Parameter]:
        """The last layer's weight and, where it has a trainable one, bias."""
        return [p for p in self.network.last.module.parameters() if p.requires_grad]


class TheoremRun(HeadRun):
    """What gd and sgd share: w^tau kept, the constants of the bound, the objective."""

    def __init__(self, *arguments: Any) -> None:
        """As of Run. ValueError for training data that change from visit to visit."""
        super().__init__(*arguments)
        if self.train.random and self.config.augment_copies is None:
            raise ValueError(
                f"train: second_phase={self.config.second_phase!r} needs fixed features, but the "
                "inputs change from visit to visit; augment_copies=k fixes k visits"
            )

    @property
    def ones(self) -> bool:
        """Whether the last layer trains a bias: M = [h_X, 1]."""
        bias = self.network.last.module.bias
        return bias is not None and bias.requires_grad

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over features and targets."""
        assert self.train_features is not None
        return self.train_features.in_order(BATCH)

    def _cache_features(self) -> None:
        super()._cache_features()
        if "start" in self.descent:
            return
        assert self.train_features is not None
        with self._timed("smoothness"):
            norms = row_norms(self.train_features)
            largest = self._smoothness()
            if largest == 0:
                raise ValueError("train: all features are 0 at tau, and the last layer has no bias")
            self.descent |= {
                "start": [p.detach().clone() for p in self._moving()],
                "norms": norms,
                "smoothness": largest,
                "objective": None,
            }

    def _smoothness(self, form: str = "tight", l2: float = 0.0) -> float:
        return smoothness(self.blocks, loss=self.loss, form=form, ones=self.ones, l2=l2)

    def _guarantee(self, status: str, **arguments: Any) -> Guarantee:
        """The curve, where the run has come to its end, and the audit."""
        found, failed = Guarantee(mode=self.config.second_phase), ""
        layer = self.network.last.module
        if status == "completed" and not self.unfixed:
            start = self.descent["start"]
            fixed = None if layer.bias is None or self.ones else layer.bias.detach()
            self.progress.say("guarantee: the bound is minimised over comparators")
            # A pass in float64, with what is bounded, costs less than three of the phase's steps.
            rows = self.config.batch_size if self.config.second_phase == "sgd" else self.train.n
            passes = max(arguments["steps"]) * rows / self.train.n / 3
            try:
                with self._timed("guarantee"):
                    found = guarantee(
                        self.blocks,
                        start[0],
                        start[1] if self.ones else fixed,
                        loss=self.loss,
                        mode=self.config.second_phase,
                        ones=self.ones,
                        candidates=[("the last weights", *(p.detach() for p in self._moving()))],
                        passes=passes,
                        **arguments,
                    )
            except Exception as error:  # the run is fine without its bound
                failed = f"not evaluated: {type(error).__name__}: {error}"
                warnings.warn(f"guarantee {failed}", stacklevel=2)
        found.premises = premises(self)
        if failed:
            found.premises.append(("bound", UNCHECKED, failed))
        return found


class GradientDescentRun(TheoremRun):
    """second_phase="gd": w <- w - grad L(w) / L_H."""

    def _steps(self) -> int:
        assert self.config.gd is not None
        return super()._steps() if self.phase == 1 else self.config.gd.steps

    def _smoothness(self, form: str = "tight", l2: float = 0.0) -> float:
        settings = self.config.gd
        assert settings is not None
        return super()._smoothness(settings.smoothness, settings.l2)

    @torch.no_grad()
    def _second(self, interrupt: Interrupt) -> bool:
        while self.batch < self._steps() and not (interrupt.requested and self.batch):
            loss = self._descend()
            if self.batch == 0:
                self.sums[0] = loss * self.train.n
            self.batch += 1
            self.progress.advance(f"epoch {self.epoch}")
            if self._due() and self.batch < self._steps():
                self._save_within()
        if self.batch < self._steps():
            return False
        assert self.train_features is not None
        self.notes = {"objective": self.descent["begin"]}
        if self.train_features.mode == "none":  # counting would be one more pass
            self.notes["train_accuracy"] = None
        return True

    def _objective(self, loss: float) -> float:
        assert self.config.gd is not None
        squares = sum(float(p.detach().double().square().sum()) for p in self._moving())
        return loss + self.config.gd.l2 / 2 * squares

    def _descend(self) -> float:
        """One step; the loss before it."""
        features, settings, known = self.train_features, self.config.gd, self.descent
        assert features is not None and settings is not None
        layer, step = self.network.last.module, 1 / known["smoothness"]
        loss, *gradients = full_gradient(features, layer, self.loss)
        if not math.isfinite(loss):
            raise Diverged(self.batch, loss, None)
        objective = self._objective(loss)
        moving = self._moving()
        squares = 0.0
        for p, gradient in zip(moving, gradients, strict=False):
            gradient.add_(p, alpha=settings.l2)
            squares += float(gradient.double().square().sum())
        self._check(objective)
        if self.batch == 0:
            known["begin"] = objective
        if self.loss in (CROSS_ENTROPY, SQUARED_ERROR):
            rounding = Rounding(known["norms"], layer, self.loss)
            rows = torch.cat([p.detach().double().view(len(p), -1) for p in layer.parameters()], 1)
            size, whole = float(rows.norm(dim=1).max()), float(rows.norm())
            known["rise"] = 2 * rounding.of_loss(loss, size) + rounding.of_step(
                loss, size, math.sqrt(squares), step, whole, known["smoothness"]
            )
        known["objective"] = objective
        for p, gradient in zip(moving, gradients, strict=False):
            p.sub_(gradient, alpha=step)
        return loss

    def _check(self, objective: float) -> None:
        """Theorem 1 (i) rests on descent: a rise beyond rounding ends the claim, not the run."""
        known = self.descent
        if (
            self.unfixed
            or known["objective"] is None
            or "rise" not in known
            or not math.isfinite(objective)
        ):
            return
        if objective > known["objective"] + known["rise"]:
            self.unfixed = (
                f"the objective rose in epoch {self.epoch}, {known['objective']!r} -> "
                f"{objective!r}, where rounding explains at most {known['rise']:.3g}: weights or "
                "features changed between the steps (a callback?)"
            )
            warnings.warn(f"nothing is claimed: {self.unfixed}", stacklevel=2)

    def guarantee(self, status: str) -> Guarantee:
        """Theorem 1 (i) in its comparator form, beside the objective at every epoch's start."""
        settings, rows = self.config.gd, [r for r in self.history if r["phase"] == 2]
        assert settings is not None
        if status != "completed":
            return self._guarantee(status)
        if self.train_features is None:  # resumed at its end
            self._cache_features()
        assert self.train_features is not None
        last = full_gradient(self.train_features, self.network.last.module, self.loss)[0]
        self._check(self._objective(last))
        return self._guarantee(
            status,
            steps=[settings.steps * k for k in range(len(rows) + 1)],
            losses=[*(row["objective"] for row in rows), self._objective(last)],
            smoothness=self.descent["smoothness"],
            l2=settings.l2,
        )


class StochasticRun(TheoremRun):
    """second_phase="sgd": eta_t = c / t^(1/2 + eps), every mini-batch drawn independently."""

    def _cache_features(self) -> None:
        super()._cache_features()
        if "first" not in self.descent:
            with self._timed("evaluation"):
                self.descent["first"] = self._evaluate()

    def _draws(self) -> tuple[Tensor, list[int]]:
        """Indices of this epoch's mini-batches, uniform with replacement, and their bounds."""
        assert self.train_features is not None
        size = self.config.batch_size
        steps = math.ceil(self.train.n / size)
        seed = stream_seed(self.config.seed, "draw", self.epoch)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randint(
            self.train_features.n, (steps * size,), generator=generator, device="cpu"
        )
        return order, [size * s for s in range(steps + 1)]

    def _rates(self, epoch: int, steps: int) -> list[float]:
        """eta of an epoch's steps."""
        settings, done = self.config.sgd, (epoch - self.config.tau_epoch) * steps
        assert settings is not None
        c = 1 / self.descent["smoothness"] if settings.c is None else settings.c
        return [settings.rate(c, done + s + 1) for s in range(steps)]

    def _second(self, interrupt: Interrupt) -> bool:
        order, bounds = self._draws()
        optimizer = torch.optim.SGD(self._moving(), lr=1.0)
        if not self._head_epoch(
            optimizer, interrupt, order, bounds, self._rates(self.epoch, len(bounds) - 1)
        ):
            return False
        self.sums *= self.train.n / len(order)
        self.notes = self._evaluate()
        return True

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """L(w) at the epoch's end, and E ||g||^2 <= mean_i ||grad l_i||^2 there."""
        assert self.train_features is not None
        losses, squares, done = [], [], 0
        norms = self.descent["norms"]
        for outputs, y in self.train_features.outputs(self.network, BATCH):
            outputs = outputs.double().requires_grad_()
            target = y.double() if y.is_floating_point() else y
            with torch.enable_grad():
                loss = self.loss(outputs, target)
                (delta,) = torch.autograd.grad(loss, outputs)
            share = len(y) / self.train_features.n
            losses.append(float(loss.detach()) * share)
            rows = (delta * len(y)).square().sum(1) * norms[done : done + len(y)].square()
            squares.append(float(rows.mean()) * share)
            done += len(y)
        return {"objective": math.fsum(losses), "gradient_square": math.fsum(squares)}

    def guarantee(self, status: str) -> Guarantee:
        """Theorem 1 (ii) in its comparator form, beside the loss at every epoch's end."""
        rows = [row for row in self.history if row["phase"] == 2]
        if status != "completed":
            return self._guarantee(status)
        if self.train_features is None:  # resumed at its end
            self._cache_features()
        steps = math.ceil(self.train.n / self.config.batch_size)
        epochs = range(self.config.tau_epoch, self.epoch)
        rows = [self.descent["first"], *rows]
        measured = max(row["gradient_square"] for row in rows)
        return self._guarantee(
            status,
            steps=[steps * k for k in range(len(rows))],
            losses=[row["objective"] for row in rows],
            rates=[rate for epoch in epochs for rate in self._rates(epoch, steps)],
            gradient_bound=None if self.loss is CROSS_ENTROPY else measured,
        )
