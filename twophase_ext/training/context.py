"""What a run works with: settled before its first step, and never another object afterwards."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..model.losses import ConvexLoss
from ..model.network import Network
from .batchnorm import batch_bounds
from .config import Config
from .control.cadence import Cadence
from .control.progress import Progress
from .data.samples import Samples
from .distributed.ranks import Ranks
from .features.agreement import Agreement
from .metrics import Metrics
from .optimizer.averaged import Averaged
from .optimizer.schedule import Schedule
from .persistence.runfolder import RunFolder
from .steps.base import BaseStep


@dataclass(frozen=True)
class Context:
    """Model, data, settings and tools of one run.

    fixed: whether h is the same in every batch, as found before training. folder: the run's, where
    one is kept. metrics: the user's own. compiled: torch.compile's arguments, None without.
    """

    network: Network
    loss: ConvexLoss
    optimizer: torch.optim.Optimizer
    config: Config
    train: Samples
    val: Samples | None
    progress: Progress
    callbacks: tuple[Any, ...]
    cadence: Cadence
    schedule: Schedule
    ranks: Ranks
    base_step: BaseStep
    averaged: Averaged
    fixed: Agreement
    metrics: Metrics = field(default_factory=dict)
    compiled: Mapping[str, Any] | None = None
    folder: RunFolder | None = None

    @property
    def device(self) -> torch.device:
        """Where model and data are."""
        return self.train.device

    @property
    def row_batch(self) -> int:
        """Rows of a mini-batch of the last layer's: those of batch_size samples."""
        return self.config.batch_size * self.train.each

    def row_offsets(self) -> list[int]:
        """As `offsets`, of the rows that the last layer is trained on."""
        return batch_bounds(self.network.model, self.train.rows, self.row_batch)

    def offsets(self) -> list[int]:
        """Step s takes samples offsets[s] to offsets[s + 1] - 1 of the epoch's order."""
        return batch_bounds(self.network.model, self.train.n, self.config.batch_size)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree in with the run that continues it."""
        return {
            **self.config.as_dict(),
            "n": self.train.n,
            "optimizer": type(self.optimizer).__name__,
            "scheduler": self.schedule.name,
        }

    def withdraw(self) -> None:
        """Take the folder's first files back: the first step was refused."""
        if self.folder is not None:
            self.folder.withdraw()
