"""second_phase="base": the base algorithm with eta_t = eta * nu, on the last layer alone.

Over features that no longer change: many steps are one call.
"""

import math
import time
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor

from ...core.seeds import epoch_order
from ..control.interrupt import Interrupt
from ..faults import Diverged
from ..features.cache import Features
from ..steps.last_layer import LastLayerStep
from ..steps.sharded import OwnShard, ShardedStep
from .phase import SecondPhase

ONE_CALL = 0.1  # seconds of steps without a look at Ctrl-C


class LastLayer(SecondPhase):
    """Mini-batch steps of the last layer, by the base algorithm's own optimizer."""

    columns: OwnShard | None = None  # of this epoch, on several ranks

    @property
    def features(self) -> Features:
        """Of the training samples; `fill_caches` comes before."""
        found = self.run.train_features
        if found is None:
            raise RuntimeError("the second phase was asked for its features before they were made")
        return found

    def epoch(self, interrupt: Interrupt) -> bool:
        """The rest of the epoch's mini-batches."""
        features, state, context = self.features, self.state, self.context
        features.copy = state.epoch % features.copies
        order = epoch_order(context.config.seed, state.epoch, context.train.rows)
        return self.mini_batches(context.optimizer, interrupt, order, context.row_offsets())

    def mini_batches(
        self,
        optimizer: torch.optim.Optimizer,
        interrupt: Interrupt,
        order: Tensor,
        offsets: list[int],
        rates: list[float] | None = None,
    ) -> bool:
        """The rest of an epoch's steps; rates: a learning rate each, in place of the groups'."""
        layer, loss = self.context.network.last.module, self.context.loss
        if self.context.ranks.size == 1:
            step = LastLayerStep(layer, loss, optimizer)
            bounds = pairwise(offsets[self.state.batch :])
            with self.features.ahead(order[begin:end] for begin, end in bounds):
                return self._steps(step, interrupt, order, offsets, rates)
        with OwnShard(layer, optimizer, self.context.ranks) as self.columns:
            return self._steps(
                ShardedStep(layer, loss, optimizer), interrupt, order, offsets, rates
            )

    def save_within(self) -> None:
        """A checkpoint inside the epoch, of the whole last layer."""
        with nullcontext() if self.columns is None else self.columns.whole():
            super().save_within()

    def _steps(
        self,
        step: LastLayerStep,
        interrupt: Interrupt,
        order: Tensor,
        offsets: list[int],
        rates: list[float] | None,
    ) -> bool:
        run, state, context, features = self.run, self.state, self.context, self.features
        one_by_one = features.mode == "none" or (context.schedule.per_step and rates is None)
        at_once = 1 if one_by_one else 8

        def count(h: Tensor, y: Tensor) -> None:
            correct = run.correct(context.network.logits(h), y)
            state.sums[1] += 0 if correct is None else int(correct)

        last = len(offsets) - 1
        while state.batch < last and not (interrupt.requested and state.batch):
            started = time.perf_counter()
            now = context.cadence.most(min(at_once, last - state.batch))
            steps = slice(state.batch, state.batch + now)
            part = offsets[steps.start : steps.stop + 1]
            with torch.no_grad():
                losses = step.run(features, order, part, rates and rates[steps], count)
            for loss, begin, end in zip(losses, part[:-1], part[1:], strict=True):
                if not math.isfinite(loss):
                    rows = order[begin:end] % context.train.rows
                    raise Diverged(state.batch, loss, context.train.samples_of(rows))
                state.sums[0] += loss * (end - begin)
                state.batch += 1
            if one_by_one and rates is None:
                context.schedule.end_step()
                step.refresh_rule()  # the groups' rates may differ from now on
            if run.due(len(losses)) and state.batch < last:
                self.save_within()
            context.progress.advance(f"epoch {state.epoch}", len(losses))
            # Ctrl-C is looked at a few times a second.
            slow = context.ranks.all_reduce_any(time.perf_counter() - started >= ONE_CALL)
            if not one_by_one and not slow:
                at_once *= 2
        return state.batch == last
