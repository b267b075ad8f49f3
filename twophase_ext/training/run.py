"""A run in this process: what it works with, where it is, and what every phase does with both."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import seeds
from ..core.seeds import stream_seed
from ..model.losses import correct
from . import saved
from .context import Context
from .data.samples import BATCH, Samples
from .features.cache import Features
from .measure import Measured, measure
from .state import RunState, phase, unfixed


@dataclass
class Run:
    """Context, state, and the caches of features.

    branch_cache: what branches with the same hidden layers share, features and verdicts. stop:
    which callback wants the run to end, and why.
    """

    context: Context
    state: RunState
    branch_cache: dict[tuple[str | None, str], Any] | None = None
    train_features: Features | None = None
    val_features: Features | None = None
    stop: str | None = None

    @property
    def phase(self) -> int:
        """1 before the perturbation, 2 after."""
        return phase(self.context, self.state)

    @property
    def unfixed(self) -> str | None:
        """Evidence that h is no fixed function of the training data."""
        return unfixed(self.context, self.state)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what is done within to the stage's seconds."""
        started = time.perf_counter()
        yield
        self.add_time(stage, time.perf_counter() - started)

    def add_time(self, stage: str, seconds: float) -> None:
        """Add to the stage's seconds."""
        self.state.timings[stage] = self.state.timings.get(stage, 0.0) + seconds

    def own_rng(self) -> AbstractContextManager[None]:
        """torch's global generators (dropout) for this epoch, or as they were within it."""
        seed = stream_seed(self.context.config.seed, "model", self.state.epoch)
        return seeds.global_stream(self.context.device, seed, self.state.rng)

    # --- measurement

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor | None:
        """Correct answers among the outputs; None for other losses than cross-entropy."""
        return correct(self.context.loss, outputs, y)

    def measure(self, features: Features | None, samples: Samples) -> Measured:
        """Mean loss, accuracy and metrics over all samples, in evaluation mode."""
        context = self.context
        with self.timed("evaluation"):
            own = (context.network, samples.objective, features or samples)
            # As much at once as a step of training: the memory that it took is enough.
            step = -(-context.config.batch_size // context.config.accumulate) * samples.each
            return measure(*own, context.ranks, context.metrics, min(BATCH, max(64, step)))

    def measure_all(self) -> dict[str, float | None]:
        """Losses, accuracies and metrics of the network as it stands, over the whole sets."""
        context, final = self.context, dict[str, float | None]()
        usable = context.config.fixed_statistics
        features = {"train": self.train_features, "val": self.val_features}
        for samples in self.sets():
            name = samples.name
            found = self.measure(features[name] if usable else None, samples)
            final[f"{name}_loss"], final[f"{name}_accuracy"] = found.loss, found.accuracy
            final |= {f"{name}_{metric}": value for metric, value in found.metrics.items()}
        return final

    def sets(self) -> list[Samples]:
        """Training samples, and those of validation where there are some."""
        return [part for part in (self.context.train, self.context.val) if part is not None]

    # --- checkpoints

    def due(self, steps: int = 1) -> bool:
        """Whether a checkpoint is due within the epoch; rank 0's clock tells."""
        ranks = self.context.ranks
        return ranks.all_reduce_any(self.context.cadence.step(steps) and ranks.rank == 0)

    def save(self) -> None:
        """Write a checkpoint, where a folder is kept."""
        if self.context.folder is not None:
            with self.timed("checkpoint"):
                saved.store(self.context, self.state, self.context.folder.path)
        self.context.cadence.saved()

    def save_within(self, moving: Iterable[Tensor]) -> None:
        """A checkpoint inside an epoch, at the next batch; none of broken weights."""
        if all_finite(moving):
            self.state.rng = seeds.states(self.context.device)
            self.save()


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether none holds NaN or infinity."""
    return all(bool(torch.isfinite(t).all()) for t in tensors)
