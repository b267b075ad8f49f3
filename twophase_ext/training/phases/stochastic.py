"""second_phase="sgd", Theorem 1 (ii): eta_t = c / t^(1/2 + eps), independent mini-batches."""

import math

import torch
from torch import Tensor

from ...core.seeds import stream_seed
from ...model.losses import CROSS_ENTROPY
from ...theory.guarantee import Guarantee
from ...theory.premises import UNCHECKED
from ..control.interrupt import Interrupt
from ..data.samples import BATCH
from ..run import Run
from ..settings import StochasticDescent
from .theorem import TheoremPhase


class StochasticPhase(TheoremPhase):
    """Mini-batch steps with falling rates."""

    def __init__(self, run: Run) -> None:
        """As of TheoremPhase."""
        super().__init__(run)
        self.settings = self.context.config.sgd or StochasticDescent()

    def fill_caches(self) -> None:
        """As of TheoremPhase; then the loss at tau."""
        super().fill_caches()
        if self.state.second.first is None:
            with self.run.timed("evaluation"):
                self.state.second.first = self._evaluate()

    def draws(self) -> tuple[Tensor, list[int]]:
        """Indices of this epoch's mini-batches, uniform with replacement, and their offsets."""
        size, config = self.context.row_batch, self.context.config
        steps = math.ceil(self.context.train.rows / size)
        seed = stream_seed(config.seed, "draw", self.state.epoch)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randint(self.features.n, (steps * size,), generator=generator, device="cpu")
        return order, [size * s for s in range(steps + 1)]

    def rates(self, epoch: int, steps: int) -> list[float]:
        """eta of an epoch's steps."""
        settings, done = self.settings, (epoch - self.context.config.tau_epoch) * steps
        c = settings.c
        if c is None:
            if self.state.second.smoothness is None:
                raise RuntimeError("a rate was asked for before L_H was computed")
            c = 1 / self.state.second.smoothness
        return [settings.rate(c, done + s + 1) for s in range(steps)]

    def epoch(self, interrupt: Interrupt) -> bool:
        """The rest of the epoch's mini-batches."""
        state = self.state
        order, offsets = self.draws()
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        rates = self.rates(state.epoch, len(offsets) - 1)
        if not self.mini_batches(optimizer, interrupt, order, offsets, rates):
            return False
        state.sums *= self.context.train.rows / len(order)
        self.row = self._evaluate()
        return True

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """L(w) at the epoch's end, and E ||g||^2 <= mean_i ||grad l_i||^2 there."""
        losses, squares, done = [], [], 0
        norms, features = self.state.second.norms, self.features
        if norms is None:
            raise RuntimeError("the gradient's size was asked for before the features' norms")
        for outputs, y in features.outputs(self.context.network, BATCH):
            outputs = outputs.double().requires_grad_()
            target = y.double() if y.is_floating_point() else y
            with torch.enable_grad():
                loss = self.context.loss(outputs, target)
                (delta,) = torch.autograd.grad(loss, outputs)
            share = len(y) / features.n
            losses.append(float(loss.detach()) * share)
            rows = (delta * len(y)).square().sum(1) * norms[done : done + len(y)].square()
            squares.append(float(rows.mean()) * share)
            done += len(y)
        return {"objective": math.fsum(losses), "gradient_square": math.fsum(squares)}

    def guarantee(self, status: str) -> Guarantee:
        """Theorem 1 (ii) in its comparator form, beside the loss at every epoch's end."""
        state, config = self.state, self.context.config
        if status != "completed":
            return self.bound(status)
        if self.run.train_features is None:  # resumed at its end
            self.fill_caches()
        steps = math.ceil(self.context.train.rows / self.context.row_batch)
        epochs = range(config.tau_epoch, state.epoch)
        rows = [state.second.first or {}, *(row for row in state.history if row["phase"] == 2)]
        measured = max(row["gradient_square"] for row in rows)
        found = self.bound(
            status,
            lambda: self.theorem_1(
                steps=[steps * k for k in range(len(rows))],
                losses=[row["objective"] for row in rows],
                rates=[rate for epoch in epochs for rate in self.rates(epoch, steps)],
                gradient_bound=None if self.context.loss is CROSS_ENTROPY else measured,
            ),
        )
        if self.run.stop is not None:  # an average over draws of which some stop earlier
            row = ("a number of steps that no draw decides", UNCHECKED, f"ended by {self.run.stop}")
            found.premises.append(row)
        return found
