"""Where a run is: what a checkpoint holds beside the model and the optimizer."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..expressivity import Verdict
from .context import Context


def _no_sums() -> Tensor:
    return torch.zeros(2, dtype=torch.float64, device="cpu")


@dataclass
class PhaseState:
    """What the second phase remembers from step to step; None: not known yet.

    unfixed: evidence that h is no fixed function of the training data. weights: a hash of what
    moves, after the last epoch; changed: evidence that something else moved it. Of those with a
    bound: start, w^tau of the last layer; norms, ||[h_i, 1]||; smoothness, L_H. Of "gd": begin, the
    objective at the epoch's start; objective, at the last step; rise, what rounding explains of
    the next one. Of "sgd": first, objective and gradient_square at tau. Of "agd": iterate, the
    fields of an `Iterate`; points, those of a `Point` at the end of each epoch. Of "exact":
    iterate, the coordinates x and an estimate of the gap. Of both: sketch, {"rank", "hash"} where
    the metric is one; best, where the validation loss
    was lowest, {"loss", "epoch", "weights"}; ended, why the phase came to its end early.
    """

    unfixed: str | None = None
    weights: str | None = None
    changed: str | None = None
    start: list[Tensor] | None = None
    norms: Tensor | None = None
    smoothness: float | None = None
    begin: float | None = None
    objective: float | None = None
    rise: float | None = None
    first: dict[str, float] | None = None
    iterate: dict[str, Any] | None = None
    points: list[dict[str, Any]] | None = None
    sketch: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    ended: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """What is known."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass
class RunState:
    """The place in a run, and what it has found; a checkpoint holds these fields.

    cache_mode: of the second phase's features. epoch, batch: the next mini-batch to train on. sums:
    loss times samples, and correct answers, of this epoch. rng: the generators' states, of a run
    that stands within an epoch. hidden_hash: set at tau, from when on the hidden layers are frozen.
    hidden_unchanged: whether they were, from tau to the end; None before it. timings: seconds by
    stage.
    """

    cache_mode: str
    epoch: int = 0
    batch: int = 0
    sums: Tensor = field(default_factory=_no_sums)
    rng: dict[str, Any] | None = None
    hidden_hash: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    hidden_unchanged: bool | None = None
    second: PhaseState = field(default_factory=PhaseState)

    def next_epoch(self) -> None:
        """Stand before the first mini-batch of the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums, self.rng = _no_sums(), None


def phase(context: Context, state: RunState) -> int:
    """1 before the perturbation, 2 after; 1 to the end without a second phase."""
    config = context.config
    return 2 if state.epoch >= config.tau_epoch and config.second_phase != "none" else 1


def unfixed(context: Context, state: RunState) -> str | None:
    """Evidence that h is no fixed function of the training data; None where nothing says so."""
    moving = context.train.random and context.config.augment_copies is None
    return state.second.unfixed or (context.train.changed if moving else None)
