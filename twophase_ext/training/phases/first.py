"""The first phase: the base algorithm on all parameters, as its owner would run it."""

from collections.abc import Iterable
from itertools import pairwise

from torch import Tensor

from ...core.seeds import epoch_order
from .. import batchnorm
from ..control.interrupt import Interrupt
from ..faults import Diverged, LossWatch
from .data_parallel import DataParallelStep, own_part
from .phase import Phase


class FirstPhase(Phase):
    """Mini-batch steps on all parameters until tau."""

    parallel_step: DataParallelStep | None = None  # on several processes

    def moving(self) -> Iterable[Tensor]:
        """All trainable parameters."""
        return self.context.network.parameters().values()

    def train_epoch(self, interrupt: Interrupt) -> bool:
        """As of Phase; every process then has rank 0's buffers."""
        done = super().train_epoch(interrupt)
        self.context.ranks.broadcast_buffers(self.context.network.model)
        return done

    def epoch(self, interrupt: Interrupt) -> bool:
        """The rest of the epoch's mini-batches, in the order that its number gives."""
        state, context = self.state, self.context
        order = epoch_order(context.config.seed, state.epoch, context.train.n)
        offsets = context.offsets()
        batchnorm.train(context.network.model, keep=context.config.batch_norm == "kept")
        batches = [order[begin:end] for begin, end in pairwise(offsets)]
        with context.train.ahead(self.part(index) for index in batches[state.batch :]):
            return self._steps(batches, interrupt)

    def _steps(self, batches: list[Tensor], interrupt: Interrupt) -> bool:
        run, state, context = self.run, self.state, self.context
        sums, watch = state.sums.to(context.device), LossWatch(context.device)
        last = len(batches)
        while state.batch < last and not (interrupt.requested and state.batch):
            index = batches[state.batch]
            loss, correct = self.step(index)
            sums[0] += loss.double() * context.train.count(index)
            if correct is not None:
                sums[1] += correct
            state.batch += 1
            context.progress.advance(f"epoch {state.epoch}")
            due = run.due() and state.batch < last
            if bad := watch.add(loss, due or state.batch == last or interrupt.requested):
                step = state.batch - 1 - bad[0]
                raise Diverged(step, bad[1], batches[step])
            if due:
                state.sums = sums.cpu()
                self.save_within()
        state.sums = sums.cpu()
        return state.batch == last

    def part(self, index: Tensor) -> Tensor:
        """Those of a batch's samples that this process fetches."""
        context = self.context
        return own_part(index, context.ranks, context.base_step.least)[0]

    def step(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """One step on the samples `index`: (loss before it, correct answers)."""
        context = self.context
        if context.ranks.size > 1:
            self.parallel_step = self.parallel_step or DataParallelStep(self.run)
            return self.parallel_step(index)
        x, y = context.train.fetch(index)
        loss, outputs = context.base_step(x, y)
        return loss, self.run.correct(outputs, y)
