"""What a phase is: how an epoch trains, what moves, and what can be claimed of it."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ...core import seeds
from ...core.hashing import tensors_hash
from ...expressivity import Verdict
from ...theory.guarantee import Guarantee
from ..audit import premises
from ..context import Context
from ..control.interrupt import Interrupt
from ..optimizer.groups import learning_rate
from ..proof import verified
from ..run import Run
from .caches import fill


class Phase:
    """Part of a run; `epoch` makes its steps. row: what it adds to this epoch's row."""

    def __init__(self, run: Run) -> None:
        """Nothing runs yet."""
        self.run, self.context, self.state = run, run.context, run.state
        self.row: dict[str, Any] = {}

    def steps(self) -> int:
        """Steps in an epoch."""
        return len(self.context.offsets()) - 1

    def moving(self) -> Iterable[Tensor]:
        """The parameters that steps change."""
        raise NotImplementedError

    def learning_rate(self) -> float | None:
        """The rate in the epoch's row."""
        return learning_rate(self.context.optimizer, None)

    def epoch(self, interrupt: Interrupt) -> bool:
        """The rest of this epoch's steps; False where it was interrupted (at the next batch)."""
        raise NotImplementedError

    def train_epoch(self, interrupt: Interrupt) -> bool:
        """`epoch`, drawing from the epoch's own random numbers, at the weights of steps."""
        run, state, context = self.run, self.state, self.context
        context.train.epoch = state.epoch
        stage = f"epoch {state.epoch}"
        context.progress.begin(stage, self.steps(), state.batch)
        steps = context.averaged.steps(context.network, context.config.second_phase, run.phase)
        with run.own_rng(), steps:
            done = self.epoch(interrupt)
            if not done:
                state.rng = seeds.states(context.device)
        context.progress.end(stage)
        return done

    def look_back(self, record: dict[str, Any]) -> None:
        """After an epoch, whose row `record` is; the state stands before the next one."""

    def save_within(self) -> None:
        """A checkpoint inside the epoch."""
        self.run.save_within(self.moving())


class SecondPhase(Phase):
    """From tau on. By itself the phase "none", of which no epoch runs.

    moves: what is trained, for the log. stopped: why the run ended early, or None.
    """

    moves = "only the last layer is"
    stopped: str | None = None

    def steps(self) -> int:
        """Steps in an epoch, over rows of features."""
        return len(self.context.row_offsets()) - 1

    @property
    def finished(self) -> bool:
        """Whether the phase has come to its end before the last epoch."""
        return self.state.second.ended is not None

    @staticmethod
    def frozen(context: Context) -> dict[str, Tensor]:
        """What stays as it is from tau on, by name."""
        return context.network.hidden_state(buffers=context.config.fixed_statistics)

    def moving(self) -> Iterable[Tensor]:
        """The last layer's parameters."""
        return self.context.network.last_parameters().values()

    def learning_rate(self) -> float | None:
        """That of the last layer's weight."""
        return learning_rate(self.context.optimizer, self.context.network.last.module.weight)

    def verify(self, method: str | None = None) -> Verdict:
        """The expressivity condition at the weights as they are."""
        with self.run.timed("verification"):
            return verified(self.context, method or str(self.context.config.verify))

    def look_for_other_steps(self) -> None:
        """Between epochs: was what moves changed by anything but this phase's own steps?"""
        known = self.state.second
        if known.weights not in (None, self._weights()) and not known.changed:
            known.changed = (
                f"weights were changed before epoch {self.state.epoch} by something else than the "
                "phase's steps (a callback?)"
            )
            warnings.warn(f"nothing is claimed: {known.changed}", stacklevel=2)

    def note_weights(self) -> None:
        """After an epoch's own steps."""
        self.state.second.weights = self._weights()

    def _weights(self) -> str:
        return tensors_hash({str(k): p for k, p in enumerate(self.moving())})

    def fill_caches(self) -> None:
        """Before the first epoch in this process: the frozen network's features."""
        fill(self.run)

    def guarantee(self, status: str) -> Any:
        """The premise audit, and the bound where one is claimed; status: the run's."""
        found = premises(self.context, self.state)
        return Guarantee(mode=self.context.config.second_phase, premises=found)
