"""Algorithm 1 of the paper, from any epoch and step onwards.

for t < tau:            w^{t+1} = w^t - eta^t g^t                     first phase
at t = tau:             w^tau_(1:H) += sigma times Gaussian noise     transition.py
for t >= tau:           w^{t+1} = w^t - eta^t * nu g^t, nu keeping rank K(w)   second phase
"""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ..core.hashing import tensors_hash
from ..core.malloc import pages_kept
from ..core.seeds import epoch_order
from ..model.losses import has_labels
from . import faults
from .callbacks import call
from .control.interrupt import Interrupt
from .faults import Diverged, Stopped
from .metrics import own_metrics
from .phases import SECOND, FirstPhase, Phase
from .run import Run, all_finite
from .transition import enter_second_phase


class Loop:
    """The epochs of one run. fault: where it diverged."""

    def __init__(self, run: Run) -> None:
        """Nothing runs yet; ValueError for data that the second phase cannot have."""
        self.run, self.context, self.state = run, run.context, run.state
        self.first = FirstPhase(run)
        self.second = SECOND[run.context.config.second_phase](run)
        self.fault: dict[str, Any] | None = None

    def execute(self, epochs: int | None = None) -> str:
        """Train to the end, or so far: "completed", "interrupted", "diverged" or "stopped"."""
        run, state, context = self.run, self.state, self.context
        epochs = context.config.epochs if epochs is None else epochs
        kept = False
        with context.progress, Interrupt(context.ranks) as interrupt, ExitStack() as stack:
            call(run, "on_fit_start")
            context.progress.begin("epochs", epochs, state.epoch)
            while state.epoch < epochs and not self.second.finished:
                phase: Phase = self.first if run.phase == 1 else self.second
                started = time.perf_counter()
                try:
                    if phase is self.second:
                        if not kept:  # rows of h are large, and made again and again
                            stack.enter_context(pages_kept())
                            kept = True
                        enter_second_phase(run, self.second)
                        started = time.perf_counter()
                    if not phase.train_epoch(interrupt):
                        return self._interrupted()
                    self._finish_epoch(phase, time.perf_counter() - started)
                except Diverged as fault:
                    self._record(phase, time.perf_counter() - started, fault.loss)
                    self.fault = faults.describe(context, state, fault)
                    return "diverged"
                except Stopped as reason:
                    self.second.stopped = str(reason)
                    context.progress.say(f"epoch {state.epoch}: stopped, {reason}")
                    run.save()
                    return "stopped"
                if interrupt.requested and state.epoch < epochs:
                    return self._interrupted()
                if self._asked_to_stop():
                    break
            self._prove_frozen()
            if run.stop is None:
                return "completed"
            context.progress.say(f"epoch {state.epoch}: stopped by {run.stop}")
            run.save()
        return "stopped"

    def conclude(self, status: str) -> tuple[str, dict[str, float | None], Any]:
        """(status, what is measured at the end, the guarantee) of a run that `execute` left.

        "interrupted" after Ctrl-C: all epochs are saved, and a resumed run only ends.
        """
        whole = status == "completed" or self.run.stop is not None  # no epoch was cut short
        try:
            with pages_kept():
                final = self.run.measure_all() if whole else {}
                ended = "completed" if whole and self.state.hidden_hash else status
                return status, final, self.second.guarantee(ended)
        except KeyboardInterrupt:
            return self._interrupted(), {}, self.second.guarantee("interrupted")

    def _interrupted(self) -> str:
        self.run.save()
        again = "without a run folder it cannot go on"
        if (folder := self.context.folder) is not None:
            again = f"fit(..., resume={str(folder.path)!r}) goes on"
        self.context.progress.say(f"epoch {self.state.epoch}: interrupted; {again}")
        return "interrupted"

    def _asked_to_stop(self) -> bool:
        """Whether a callback of any process asked for the end, and the run is not there anyway."""
        run, last = self.run, self.state.epoch == self.context.config.epochs
        asked = None if last or self.second.finished else run.stop
        run.stop = next(filter(None, self.context.ranks.all_gather_object(asked)), None)
        return run.stop is not None

    def _finish_epoch(self, phase: Phase, seconds: float) -> None:
        """Metrics, callbacks, checkpoint; Diverged where the weights are not finite."""
        run, state, context = self.run, self.state, self.context
        rows = context.train.rows
        loss = float(state.sums[0]) / rows
        # The loss is that before each update: the last update may have broken the weights.
        if not (math.isfinite(loss) and all_finite(phase.moving())):
            samples = None
            if phase is self.first:
                order = epoch_order(context.config.seed, state.epoch, context.train.n)
                samples = order[context.offsets()[-2] :]
            raise Diverged(phase.steps() - 1, loss, samples)
        accuracy: float | None = None
        labelled = has_labels(context.loss, context.train.targets)
        cached = phase is self.second and state.cache_mode != "none"
        found: dict[str, float | None] = {}
        if labelled:
            accuracy = float(state.sums[1]) / rows
        if context.metrics or (labelled and cached):
            now = run.measure(run.train_features, context.train)
            accuracy = now.accuracy if labelled and cached else accuracy
            found |= {f"train_{name}": value for name, value in now.metrics.items()}
        measured: tuple[float | None, float | None] = (None, None)
        if context.val is not None:
            now = run.measure(run.val_features, context.val)
            measured = now.loss, now.accuracy
            found |= {f"val_{name}": value for name, value in now.metrics.items()}
        record = self._record(phase, seconds, loss, accuracy, *measured, found)
        state.next_epoch()
        phase.look_back(record)
        context.schedule.end_epoch(record["phase"], loss)
        # Before the checkpoint, so that it holds what a callback sets (a learning rate, say).
        call(run, "on_epoch_end", record)
        last = state.epoch == context.config.epochs or self.second.finished
        if context.cadence.epoch(state.epoch) or last:
            run.save()
        own = [f"{part} {text}" for part in ("train", "val") for text in own_metrics(found, part)]
        shown = [f"loss {loss:.4f}", *own, f"{seconds:.1f} s an epoch"]
        context.progress.advance("epochs", 1, ", ".join(shown))

    def _record(
        self,
        phase: Phase,
        seconds: float,
        train_loss: float,
        train_accuracy: float | None = None,
        val_loss: float | None = None,
        val_accuracy: float | None = None,
        metrics: Mapping[str, float | None] | None = None,
    ) -> dict[str, Any]:
        """This epoch's row, added to the history and written."""
        record: dict[str, Any] = {
            "epoch": self.state.epoch,
            "phase": 2 if phase is self.second else 1,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "learning_rate": phase.learning_rate(),
            "seconds": seconds,
            **phase.row,
            **(metrics or {}),
        }
        stage = "second_phase" if phase is self.second else "first_phase"
        self.run.add_time(stage, seconds)
        self.state.history.append(record)
        if self.context.folder is not None:
            self.context.folder.write_metrics(self.state.history)
        return record

    def _prove_frozen(self) -> None:
        known = self.state.hidden_hash
        self.state.hidden_unchanged = (
            known is None or tensors_hash(self.second.frozen(self.context)) == known
        )
        if not self.state.hidden_unchanged:
            raise RuntimeError(
                "the hidden layers changed during the second phase: a callback, the optimizer or "
                "another owner of the model wrote to them. The run's claim is void"
            )
