"""Second phases that watch the validation loss, and may end before the last epoch."""

import math
from typing import Any

import torch

from .theorem import TheoremPhase


class WatchedPhase(TheoremPhase):
    """With early_stopping the weights of the lowest validation loss are those that stay."""

    early_stopping: int | None = None

    def watch(self, early_stopping: int | None) -> None:
        """Watch from now on; ValueError without validation data."""
        if early_stopping is not None and self.context.val is None:
            raise ValueError("early_stopping: expected validation data, fit(train, val), got none")
        self.early_stopping = early_stopping

    @property
    def kept(self) -> dict[str, Any] | None:
        """Whose weights stay at the end of the phase; None where the last ones do."""
        known, last = self.state.second, self.state.epoch == self.context.config.epochs
        return known.best if last or known.ended is not None else None

    def look_back(self, record: dict[str, Any]) -> None:
        """Keep the best weights; at the end, put them back."""
        known = self.state.second
        if self.early_stopping is None:
            return
        loss = record["val_loss"]
        if loss is not None and loss < (math.inf if known.best is None else known.best["loss"]):
            known.best = {
                "loss": loss,
                "epoch": record["epoch"],
                "weights": [p.detach().clone() for p in self.parameters()],
            }
        if known.best is None:
            return
        waited = record["epoch"] - known.best["epoch"]
        if waited >= self.early_stopping and known.ended is None:
            known.ended = f"the validation loss was not lower in {waited} epochs"
        if known.ended is not None or self.state.epoch == self.context.config.epochs:
            with torch.no_grad():
                for p, best in zip(self.parameters(), known.best["weights"], strict=True):
                    p.copy_(best)
            self.note_weights()
            self.context.progress.say(
                f"kept: the weights of epoch {known.best['epoch']}, validation loss "
                f"{known.best['loss']:.5f}"
            )
