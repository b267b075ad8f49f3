"""One run of Algorithm 1, from an epoch and batch number onwards."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..expressivity import Verdict, verify_network
from ..network import Network
from . import batchnorm, checkpoint, runfolder
from .config import Config
from .data import Samples
from .features import BATCH, Features
from .freeze import tensors_hash
from .head import HeadStep
from .interrupt import Interrupt
from .losses import CROSS_ENTROPY, ConvexLoss
from .progress import Progress
from .streams import epoch_order, stream_seed

# Attributes of a Run that a checkpoint holds as they are.
SAVED = ("cache_mode", "epoch", "batch", "sums", "rng", "hidden_hash", "history", "timings")


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
        checkpoint_every: int,
    ) -> None:
        """Nothing runs yet."""
        self.network, self.loss, self.optimizer, self.config = network, loss, optimizer, config
        self.train, self.val, self.cache_mode = train, val, cache_mode
        self.progress, self.callbacks = progress, callbacks
        self.folder: Path | None = None  # the run folder, where one is kept
        self.checkpoint_every = checkpoint_every
        self.device = train.device
        self.history: list[dict[str, Any]] = []
        self.timings: dict[str, float] = {}
        self.verdict: Verdict | None = None
        self.hidden_hash: str | None = None  # set at tau: the hidden layers are frozen from then
        self.epoch, self.batch = 0, 0  # the next batch to train on
        self.sums = torch.zeros(2, dtype=torch.float64)  # loss * samples, correct: of this epoch
        self.rng: dict[str, Tensor] | None = None  # of a run interrupted within an epoch
        self.notes: dict[str, Any] = {}  # what the second phase adds to this epoch's row
        self.train_features: Features | None = None
        self.val_features: Features | None = None
        single = train.n % config.batch_size == 1 and train.n > 1
        # BatchNorm has no variance over one sample: a last batch of one joins the batch before it.
        self.joined = single and bool(batchnorm.batch_norms(network.model))

    # --- the algorithm -----------------------------------------------------------------------

    def execute(self) -> str:
        """Train to the end; the status: completed, interrupted or diverged."""
        config = self.config
        with self.progress, Interrupt() as interrupt:
            self._call("on_fit_start")
            self.progress.begin("training", config.epochs, self.epoch)
            while self.epoch < config.epochs:
                if self.epoch >= config.tau_epoch:
                    if self.hidden_hash is None:
                        self._perturb()
                    if self.train_features is None:
                        self._cache_features()
                started = time.perf_counter()
                if not self._train_epoch(interrupt):
                    self._save()
                    return "interrupted"
                if not self._finish_epoch(time.perf_counter() - started):
                    return "diverged"
                if interrupt.requested and self.epoch < config.epochs:
                    self._save()
                    return "interrupted"
            self._prove_frozen()
        return "completed"

    @property
    def phase(self) -> int:
        """1 before the perturbation, 2 after."""
        return 1 if self.epoch < self.config.tau_epoch else 2

    def _perturb(self) -> None:
        """At tau: noise on the hidden parameters, BatchNorm statistics fixed, condition checked."""
        network, config = self.network, self.config
        hidden = network.hidden_parameters()
        with self._timed("perturbation"):
            if hidden:
                seed = stream_seed(config.seed, "noise")
                ops.perturb_(hidden, config.noise_std, seed=seed)
        if config.batch_norm == "frozen":
            with self._timed("batch_norm"):
                forward = network.backbone if network.wide is not None else network.hidden
                batchnorm.recalibrate(network.model, forward, self.train.in_order(BATCH))
            network.model.eval()
        self.optimizer.zero_grad(set_to_none=True)  # no stale hidden gradient survives tau
        self.hidden_hash = self._hash()
        self.progress.say(
            f"epoch {self.epoch}: noise added to {len(hidden)} hidden tensors; "
            f"from here {self.moving} trained"
        )
        self._call("on_perturb")
        if config.verify:
            self.verdict = self._verify()
            self.progress.say(str(self.verdict).splitlines()[0])  # whole in the result's summary
            if self.folder is not None:
                self.verdict.save(self.folder / "verdict.json")

    def _verify(self, method: str | None = None) -> Verdict:
        """The expressivity condition at the weights as they are."""
        with self._timed("verification"):
            return verify_network(
                self.network,
                self.train.in_order(BATCH),
                n=self.train.n,
                method=method or str(self.config.verify),
                batch_norm=self.config.batch_norm,
                say=self.progress.say,
            )

    def _cache_features(self) -> None:
        """Fill the caches of the frozen network's features."""
        self.network.model.train(self.config.batch_norm == "batch")
        with self._timed("features"):
            total = self.train.n + (self.val.n if self.val is not None else 0)
            self.progress.begin("features", total)
            advance = lambda rows: self.progress.advance("features", rows)  # noqa: E731
            mode = self.cache_mode
            self.train_features = Features(self.train, self.network, mode, advance)
            if self.val is not None and self.config.batch_norm == "frozen":
                self.val_features = Features(self.val, self.network, mode, advance)
            self.progress.end("features")

    def _train_epoch(self, interrupt: Interrupt) -> bool:
        """The rest of this epoch; False where it was interrupted (state at the next batch)."""
        order = epoch_order(self.config.seed, self.epoch, self.train.n)
        self.train.epoch = self.epoch
        bounds = list(self._bounds())
        step = self._first_step if self.phase == 1 else self._second_step()
        if self.phase == 1:
            self.network.model.train()
        sums = self.sums.to(self.device)
        self.progress.begin(f"epoch {self.epoch}", len(bounds), self.batch)
        with self._own_rng():
            for begin, end in bounds[self.batch :]:
                index = order[begin:end]
                loss, correct = step(index)
                sums[0] += loss.double() * len(index)
                if correct is not None:
                    sums[1] += correct
                self.batch += 1
                self.progress.advance(f"epoch {self.epoch}")
                if interrupt.requested and self.batch < len(bounds):
                    self.sums, self.rng = sums.cpu(), self._rng_state()
                    self.progress.end(f"epoch {self.epoch}")
                    return False
        self.progress.end(f"epoch {self.epoch}")
        self.sums = sums.cpu()
        return True

    def _first_step(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The base algorithm on all parameters."""
        x, y = self.train.fetch(index)
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self.network.model(x)
        loss = self.loss(outputs, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), self._correct(outputs.detach(), y)

    def _second_step(self) -> Any:
        """The base algorithm with eta_t = eta * nu: the last layer only, over fixed features."""
        head = HeadStep(self.network.last.module, self.loss, self.optimizer)
        features = self.train_features
        assert features is not None

        def step(index: Tensor) -> tuple[Tensor, Tensor | None]:
            h, y = features.batch(index)
            correct = None
            if features.mode == "none" and self.loss is CROSS_ENTROPY:
                with torch.no_grad():
                    correct = self._correct(self.network.logits(h), y)
            return head(h, y), correct

        return step

    def _finish_epoch(self, seconds: float) -> bool:
        """Metrics, checkpoint, callbacks; False where the loss is no longer finite."""
        n, phase = self.train.n, self.phase
        train_loss = float(self.sums[0]) / n
        accuracy: float | None = None
        if self.loss is CROSS_ENTROPY:
            accuracy = float(self.sums[1]) / n
            if phase == 2 and self.cache_mode != "none":
                with self._timed("evaluation"):
                    accuracy = self._measure(self.train_features, self.train)[1]
        record: dict[str, Any] = {
            "epoch": self.epoch,
            "phase": phase,
            "train_loss": train_loss,
            "train_accuracy": accuracy,
            "val_loss": None,
            "val_accuracy": None,
            "learning_rate": self._learning_rate(),
            "seconds": seconds,
        }
        self._add_time("first_phase" if phase == 1 else "second_phase", seconds)
        if self.val is not None:
            with self._timed("evaluation"):
                measured = self._measure(self.val_features, self.val)
            record["val_loss"], record["val_accuracy"] = measured
        record |= self.notes
        self.history.append(record)
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums, self.rng = torch.zeros(2, dtype=torch.float64), None
        if self.folder is not None:
            runfolder.write_metrics(self.folder, self.history)
        # The loss is that before each update: the last update may have broken the weights.
        finite = self._weights_finite()
        if not (math.isfinite(train_loss) and finite):
            self.progress.say(
                f"epoch {record['epoch']}: the training loss is {train_loss}, the weights are "
                f"{'' if finite else 'not '}finite; stopped. The last good checkpoint is kept: "
                "lower the learning rate and start again"
            )
            return False
        # Before the checkpoint, so that it holds what a callback sets (a learning rate, say).
        self._call("on_epoch_end", record)
        if self.epoch % self.checkpoint_every == 0 or self.epoch == self.config.epochs:
            self._save()
        note = f"loss {train_loss:.4f}, {seconds:.1f} s an epoch"
        self.progress.advance("training", 1, note)
        return True

    def _weights_finite(self) -> bool:
        network = self.network
        moved = network.parameters() if self.hidden_hash is None else network.last_parameters()
        return all(bool(torch.isfinite(p).all()) for p in moved.values())

    def _learning_rate(self) -> float:
        """The first group's in the first phase, that of the last layer's weight in the second."""
        groups = self.optimizer.param_groups
        if self.phase == 2:
            weight = self.network.last.module.weight
            groups = [g for g in groups if any(p is weight for p in g["params"])]
        return float(groups[0]["lr"])

    # --- measurement -------------------------------------------------------------------------

    def _correct(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        return (outputs.argmax(1) == y).sum() if self.loss is CROSS_ENTROPY else None

    @torch.no_grad()
    def _measure(self, features: Features | None, samples: Samples) -> tuple[float, float | None]:
        """Mean loss and accuracy over all samples, in evaluation mode."""
        model = self.network.model
        mode = model.training
        total, correct = 0.0, 0
        model.eval()
        source = samples.in_order(BATCH) if features is None else features.in_order(BATCH)
        for inputs, y in source:
            outputs = model(inputs) if features is None else self.network.logits(inputs)
            total += float(self.loss(outputs, y)) * len(y)
            if self.loss is CROSS_ENTROPY:
                correct += int((outputs.argmax(1) == y).sum())
        model.train(mode)
        return total / samples.n, correct / samples.n if self.loss is CROSS_ENTROPY else None

    def measure_all(self) -> dict[str, float | None]:
        """Losses and accuracies of the network as it stands, over the whole sets."""
        final: dict[str, float | None] = {}
        for name, samples, features in (
            ("train", self.train, self.train_features),
            ("val", self.val, self.val_features),
        ):
            if samples is not None:
                usable = features if self.config.batch_norm == "frozen" else None
                with self._timed("evaluation"):
                    measured = self._measure(usable, samples)
                final[f"{name}_loss"], final[f"{name}_accuracy"] = measured
        return final

    def _frozen(self) -> dict[str, Tensor]:
        """What stays as it is at tau."""
        return self.network.hidden_state(buffers=self.config.batch_norm == "frozen")

    def _hash(self) -> str:
        return tensors_hash(self._frozen())

    def _prove_frozen(self) -> None:
        if self.hidden_hash is not None and self._hash() != self.hidden_hash:
            raise RuntimeError(
                "the hidden layers changed during the second phase: a callback or another owner "
                "of the model wrote to them. The run's claim is void"
            )

    # --- plumbing ----------------------------------------------------------------------------

    def _bounds(self) -> Iterator[tuple[int, int]]:
        size, n = self.config.batch_size, self.train.n
        starts = list(range(0, n, size))
        if self.joined and len(starts) > 1:
            starts.pop()
        yield from zip(starts, [*starts[1:], n], strict=True)

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

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        """torch's global generators (dropout) seeded per epoch, the caller's left as they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(stream_seed(self.config.seed, "model", self.epoch))
            if self.rng is not None:
                torch.set_rng_state(self.rng["cpu"])
                if devices:
                    torch.cuda.set_rng_state(self.rng["cuda"], self.device)
            yield

    def _rng_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in with the run that continues it."""
        return {
            **self.config.as_dict(),
            "n": self.train.n,
            "optimizer": type(self.optimizer).__name__,
        }

    def _save(self) -> None:
        if self.folder is None:
            return
        with self._timed("checkpoint"):
            checkpoint.save(
                self.folder,
                {
                    "model": self.network.state(),
                    "optimizer": self.optimizer.state_dict(),
                    "config": self.identity(),
                    **{name: getattr(self, name) for name in SAVED},
                    "verdict": None if self.verdict is None else self.verdict.as_dict(),
                },
            )

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises ValueError, before the model has changed, where it is of another model, configuration
        or number of samples, or where its hidden layers are not those that were frozen.
        """
        model = self.network
        checkpoint.check_matches(state, checkpoint.describe(model.state()), self.identity())
        if state["hidden_hash"] is not None:
            own = self._frozen()
            theirs = {name: state["model"].get(name, tensor) for name, tensor in own.items()}
            if tensors_hash(theirs) != state["hidden_hash"]:
                raise ValueError("resume: the checkpoint's hidden layers do not match their hash")
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise ValueError(f"resume: the checkpoint's optimizer does not fit: {error}") from error
        model.load_state(state["model"])
        for name in SAVED:
            setattr(self, name, state[name])
        self.verdict = Verdict(**state["verdict"]) if state["verdict"] else None
