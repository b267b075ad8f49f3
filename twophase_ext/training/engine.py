"""One run of Algorithm 1, from an epoch and batch number onwards."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..core import seeds as streams
from ..core.files import FolderLock
from ..core.hashing import tensors_hash
from ..core.seeds import epoch_order, stream_seed
from ..expressivity import Verdict
from ..model.losses import CROSS_ENTROPY, ConvexLoss
from ..model.network import Network
from ..theory.guarantee import Guarantee
from . import batchnorm, caches, faults, runfolder, saved
from .audit import premises
from .averaged import Averaged
from .cadence import Cadence
from .config import Config
from .data import Samples
from .data_parallel import DataParallelStep
from .faults import Diverged, LossWatch
from .features import Features
from .first_step import FirstStep
from .fixed import Agreement
from .groups import learning_rate, plain_groups
from .interrupt import Interrupt
from .measure import measure
from .progress import Progress
from .proof import verified
from .ranks import Ranks
from .schedule import Schedule


class Run:
    """State and stages of one run; `Trainer.fit` builds it and calls `execute`."""

    moving = "only the last layer is"  # in the second phase, for the log

    def __init__(
        self,
        network: Network,
        loss: ConvexLoss,
        optimizer: torch.optim.Optimizer,
        config: Config,
        train: Samples,
        val: Samples | None,
        cache_mode: str,
        progress: Progress,
        callbacks: tuple[Any, ...],
        cadence: Cadence,
        schedule: Schedule,
        ranks: Ranks,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing runs yet."""
        self.ranks = ranks
        ranks.where = lambda: f"epoch {self.epoch}, step {self.batch}"
        self.parallel_step: DataParallelStep | None = None  # of the first phase, on several ranks
        self.schedule, self.compiled = schedule, compile_options
        self.first_step = FirstStep(network, loss, optimizer, config, schedule, compile_options)
        self.first_step.after_first = lambda: saved.check_holds(self)
        self.first_step.withdraw = lambda: runfolder.withdraw(self.folder)
        self.averaged = Averaged(optimizer)
        self.network, self.loss, self.optimizer, self.config = network, loss, optimizer, config
        self.train, self.val, self.cache_mode = train, val, cache_mode
        self.progress, self.callbacks = progress, callbacks
        self.folder: Path | None = None  # the run folder, where one is kept
        self.lock: FolderLock | None = None  # on the folder
        self.cadence = cadence  # of checkpoints
        self.fault: dict[str, Any] | None = None  # where the run diverged
        self.device = train.device
        self.fixed = Agreement()  # whether h is the same in every batch, as found before training
        self.history: list[dict[str, Any]] = []
        self.timings: dict[str, float] = {}
        self.verdict: Verdict | None = None
        self.hidden_hash: str | None = None  # set at tau: the hidden layers are frozen from then
        self.epoch, self.batch = 0, 0  # the next batch to train on
        # loss * samples, correct: of this epoch
        self.sums = torch.zeros(2, dtype=torch.float64, device="cpu")
        self.rng: dict[str, Any] | None = None  # of a run interrupted within an epoch
        self.unchanged: bool | None = None  # the hidden layers, from tau to the end
        self.notes: dict[str, Any] = {}  # what the second phase adds to this epoch's row
        self.descent: dict[str, Any] = {}  # what the second phase remembers from step to step
        # What branches with the same hidden layers share: features and verdicts.
        self.shared: dict[tuple[str | None, str], Any] | None = None
        self.train_features: Features | None = None
        self.val_features: Features | None = None

    # --- the algorithm -----------------------------------------------------------------------

    def execute(self, epochs: int | None = None) -> str:
        """Train to the end, or so far; the status: completed, interrupted or diverged."""
        epochs = self.config.epochs if epochs is None else epochs
        with self.progress, Interrupt(self.ranks) as interrupt:
            self._call("on_fit_start")
            self.progress.begin("training", epochs, self.epoch)
            while self.epoch < epochs:
                if self.phase == 2 and (self.hidden_hash is None or self.train_features is None):
                    self._begin_second_phase()
                started = time.perf_counter()
                try:
                    if not self._train_epoch(interrupt):
                        self._save()
                        return "interrupted"
                    self._finish_epoch(time.perf_counter() - started)
                except Diverged as fault:
                    self._record(time.perf_counter() - started, fault.loss)
                    self.fault = faults.describe(self, fault)
                    return "diverged"
                if interrupt.requested and self.epoch < epochs:
                    self._save()
                    return "interrupted"
            self._prove_frozen()
        return "completed"

    @property
    def phase(self) -> int:
        """1 before the perturbation, 2 after; 1 to the end without a second phase."""
        second = self.epoch >= self.config.tau_epoch and self.config.second_phase != "none"
        return 2 if second else 1

    def _begin_second_phase(self) -> None:
        """Noise, proof and caches, as far as they are not done; each sample is fetched once."""
        with self.train.held(), nullcontext() if self.val is None else self.val.held():
            if self.hidden_hash is None:
                self._perturb()
                self._save()  # the verification may have taken hours
            if self.train_features is None:
                self._cache_features()

    @property
    def unfixed(self) -> str | None:
        """Evidence that h is no fixed function of the training data; None where nothing says so."""
        moving = self.train.random and self.config.augment_copies is None
        return self.descent.get("unfixed") or (self.train.changed if moving else None)

    @unfixed.setter
    def unfixed(self, evidence: str) -> None:
        self.descent["unfixed"] = evidence  # checkpoints hold it

    def _perturb(self) -> None:
        """At tau: noise on the hidden parameters, BatchNorm statistics fixed, condition checked."""
        network, config = self.network, self.config
        hidden = network.hidden_parameters()
        with self._timed("perturbation"):
            if hidden:
                own = config.noise_seed
                seed = stream_seed(config.seed if own is None else own, "noise")
                ops.perturb_(hidden, config.noise_std, seed=seed)
        if config.batch_norm == "frozen":
            with self._timed("batch_norm"):
                batchnorm.recalibrate_over(network, self.train, self.ranks)
            network.model.eval()
        self.optimizer.zero_grad(set_to_none=True)  # no stale hidden gradient survives tau
        self.averaged.forget(hidden)
        self.hidden_hash, self.parallel_step = self._hash(), None
        self.ranks.agree("hidden layers after the noise", self.hidden_hash)
        self.progress.say(
            f"epoch {self.epoch}: noise added to {len(hidden)} hidden tensors; "
            f"from here {self.moving} trained"
        )
        self._call("on_perturb")
        if config.verify:
            key = (self.hidden_hash, f"verdict {config.verify} {config.batch_norm}")
            known = {} if self.shared is None else self.shared
            if key not in known:
                known[key] = self.ranks.once(self._verify)
            self.verdict = known[key]
            self.progress.say(str(self.verdict).splitlines()[0])  # whole in the result's summary
            if self.folder is not None:
                self.verdict.save(self.folder / "verdict.json")

    def _verify(self, method: str | None = None) -> Verdict:
        """The expressivity condition at the weights as they are."""
        with self._timed("verification"):
            return verified(self, method or str(self.config.verify))

    def _cache_features(self) -> None:
        """Fill the caches of the frozen network's features, or take a branch's with the same."""
        caches.fill(self)

    def _fill_caches(self, mode: str) -> None:
        with self._timed("features"):
            caches.fill_in(self, mode)

    def _train_epoch(self, interrupt: Interrupt) -> bool:
        """The rest of this epoch; False where it was interrupted (state at the next batch)."""
        self.train.epoch = self.epoch
        self.progress.begin(f"epoch {self.epoch}", self._steps(), self.batch)
        with self._own_rng(), self.averaged.steps(self):
            done = (self._first if self.phase == 1 else self._second)(interrupt)
            if not done:
                self.rng = streams.states(self.device)
        if self.phase == 1:
            self.ranks.broadcast_buffers(self.network.model)
        self.progress.end(f"epoch {self.epoch}")
        return done

    def _steps(self) -> int:
        """Steps in an epoch of this phase."""
        return len(self._bounds()) - 1

    def _first(self, interrupt: Interrupt) -> bool:
        """The base algorithm on all parameters."""
        order = epoch_order(self.config.seed, self.epoch, self.train.n)
        bounds = self._bounds()
        self.network.model.train()
        sums, watch = self.sums.to(self.device), LossWatch(self.device)
        last = len(bounds) - 1
        while self.batch < last and not (interrupt.requested and self.batch):
            index = order[bounds[self.batch] : bounds[self.batch + 1]]
            loss, correct = self._first_step(index)
            sums[0] += loss.double() * len(index)
            if correct is not None:
                sums[1] += correct
            self.batch += 1
            self.progress.advance(f"epoch {self.epoch}")
            due = self._due() and self.batch < last
            if bad := watch.add(loss, due or self.batch == last or interrupt.requested):
                step = self.batch - 1 - bad[0]
                raise Diverged(step, bad[1], order[bounds[step] : bounds[step + 1]])
            if due:
                self.sums = sums.cpu()
                self._save_within()
        self.sums = sums.cpu()
        return self.batch == last

    def _first_step(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The base algorithm on all parameters."""
        if self.ranks.size > 1:
            self.parallel_step = self.parallel_step or DataParallelStep(self)
            return self.parallel_step(index)
        x, y = self.train.fetch(index)
        loss, outputs = self.first_step(x, y)
        return loss, self._correct(outputs, y)

    def _second(self, interrupt: Interrupt) -> bool:
        """The rest of an epoch of the second phase."""
        raise NotImplementedError

    def _finish_epoch(self, seconds: float) -> None:
        """Metrics, callbacks, checkpoint; Diverged where the weights are not finite."""
        n, phase = self.train.n, self.phase
        train_loss = float(self.sums[0]) / n
        # The loss is that before each update: the last update may have broken the weights.
        if not (math.isfinite(train_loss) and self._weights_finite()):
            bounds = self._bounds()
            samples = None
            if self.phase == 1:
                samples = epoch_order(self.config.seed, self.epoch, n)[bounds[-2] :]
            raise Diverged(self._steps() - 1, train_loss, samples)
        accuracy: float | None = None
        if self.loss is CROSS_ENTROPY:
            accuracy = float(self.sums[1]) / n
            if phase == 2 and self.cache_mode != "none":
                accuracy = self._measure(self.train_features, self.train)[1]
        measured: tuple[float | None, float | None] = (None, None)
        if self.val is not None:
            measured = self._measure(self.val_features, self.val)
        record = self._record(seconds, train_loss, accuracy, *measured)
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums, self.rng = torch.zeros(2, dtype=torch.float64, device="cpu"), None
        self.schedule.end_epoch(phase, train_loss)
        # Before the checkpoint, so that it holds what a callback sets (a learning rate, say).
        self._call("on_epoch_end", record)
        if self.cadence.epoch(self.epoch) or self.epoch == self.config.epochs:
            self._save()
        note = f"loss {train_loss:.4f}, {seconds:.1f} s an epoch"
        self.progress.advance("training", 1, note)

    def _record(
        self,
        seconds: float,
        train_loss: float,
        train_accuracy: float | None = None,
        val_loss: float | None = None,
        val_accuracy: float | None = None,
    ) -> dict[str, Any]:
        """This epoch's row, added to the history and written."""
        record: dict[str, Any] = {
            "epoch": self.epoch,
            "phase": self.phase,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "learning_rate": self._learning_rate(),
            "seconds": seconds,
            **self.notes,
        }
        self._add_time("first_phase" if self.phase == 1 else "second_phase", seconds)
        self.history.append(record)
        if self.folder is not None:
            runfolder.write_metrics(self.folder, self.history)
        return record

    def _due(self, steps: int = 1) -> bool:
        """Whether a checkpoint is due within the epoch; rank 0's clock tells."""
        return self.ranks.any(self.cadence.step(steps) and self.ranks.rank == 0)

    def _save_within(self) -> None:
        """A checkpoint inside an epoch, at the next batch; none of broken weights."""
        if self._weights_finite():
            self.rng = streams.states(self.device)
            self._save()

    def _weights_finite(self) -> bool:
        network = self.network
        moved = network.parameters() if self.hidden_hash is None else network.last_parameters()
        return all(bool(torch.isfinite(p).all()) for p in moved.values())

    def _learning_rate(self) -> float | None:
        """The first group's in the first phase, that of the last layer's weight in the second."""
        weight = self.network.last.module.weight
        return learning_rate(self.optimizer, weight if self.phase == 2 else None)

    # --- measurement -------------------------------------------------------------------------

    def _correct(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        return (outputs.argmax(1) == y).sum() if self.loss is CROSS_ENTROPY else None

    def _measure(self, features: Features | None, samples: Samples) -> tuple[float, float | None]:
        """Mean loss and accuracy over all samples, in evaluation mode."""
        with self._timed("evaluation"):
            return measure(self.network, self.loss, features or samples, self.ranks)

    def frozen(self) -> dict[str, Tensor]:
        """What stays as it is at tau."""
        return self.network.hidden_state(buffers=self.config.batch_norm == "frozen")

    def _hash(self) -> str:
        return tensors_hash(self.frozen())

    def _prove_frozen(self) -> None:
        self.unchanged = self.hidden_hash is None or self._hash() == self.hidden_hash
        if not self.unchanged:
            raise RuntimeError(
                "the hidden layers changed during the second phase: a callback, the optimizer or "
                "another owner of the model wrote to them. The run's claim is void"
            )

    def _own_rng(self) -> AbstractContextManager[None]:
        """torch's global generators (dropout) for this epoch, or as they were within it."""
        seed = stream_seed(self.config.seed, "model", self.epoch)
        return streams.global_stream(self.device, seed, self.rng)

    # --- plumbing ----------------------------------------------------------------------------

    def _bounds(self) -> list[int]:
        """Step s takes samples bounds[s] to bounds[s + 1] - 1 of the epoch's order."""
        return batchnorm.batch_bounds(self.network.model, self.train.n, self.config.batch_size)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._add_time(stage, time.perf_counter() - started)

    def _add_time(self, stage: str, seconds: float) -> None:
        self.timings[stage] = self.timings.get(stage, 0.0) + seconds

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(self, *arguments)
        plain_groups(self.optimizer)  # a rate that NumPy made

    def guarantee(self, status: str) -> Any:
        """The premise audit, and the bound where one is claimed; status: the run's."""
        return Guarantee(mode=self.config.second_phase, premises=premises(self))

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in with the run that continues it."""
        return {
            **self.config.as_dict(),
            "n": self.train.n,
            "optimizer": type(self.optimizer).__name__,
            "scheduler": self.schedule.name,
        }

    def _save(self) -> None:
        if self.folder is not None:
            with self._timed("checkpoint"):
                saved.store(self, self.folder)
        self.cadence.saved()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; see `saved.restore`."""
        saved.restore(self, state)
