"""The base algorithm's learning rate schedule: any scheduler of torch.optim.lr_scheduler."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ...core.files import read_tensors
from ...core.messages import first_line
from .groups import first_settings, plain, plain_groups

SchedulerFactory = Callable[[torch.optim.Optimizer], LRScheduler]
INTERVALS = ("epoch", "step")


class Schedule:
    """A scheduler, or none, stepped once an epoch or once an update of the base algorithm.

    It goes on in the second phases that are the base algorithm's ("base", "none"). The others have
    their rates from theorems: there it stops at tau.
    """

    def __init__(
        self,
        scheduler: LRScheduler | None = None,
        interval: str = "epoch",
        second_phase: str = "base",
        first: list[dict[str, Any]] | None = None,
    ) -> None:
        """Use `make_schedule`. first: the optimizer's settings before the scheduler's."""
        self.first = first or []
        self.scheduler, self.count = scheduler, 0
        self.per_step = scheduler is not None and interval == "step"
        self.goes_on = second_phase in ("base", "none")

    @property
    def name(self) -> str | None:
        """The scheduler's class, with those of the schedulers that it is made of."""
        return None if self.scheduler is None else _describe(self.scheduler)

    def require_steps(self, epochs: int, tau_epoch: int, steps: int) -> None:
        """ValueError where a scheduler ends (OneCycleLR) before the run does: steps an epoch."""
        if self.scheduler is None:
            return
        needed = (epochs if self.goes_on else tau_epoch) * (steps if self.per_step else 1)
        ends = [getattr(part, "total_steps", None) for part in _parts(self.scheduler)]
        least = min((end for end in ends if isinstance(end, int)), default=needed)
        if least < needed:
            raise ValueError(
                f"scheduler: expected one for {needed} steps, as many as the run makes, got "
                f"{self.name} for {least}"
            )

    def end_step(self) -> None:
        """An update was made."""
        if self.scheduler is not None and self.per_step:
            self._advance(self.scheduler, None)

    def end_epoch(self, phase: int, train_loss: float) -> None:
        """An epoch of this phase is over; ReduceLROnPlateau looks at its training loss."""
        if self.scheduler is not None and not self.per_step and (phase == 1 or self.goes_on):
            self._advance(self.scheduler, train_loss)

    def _advance(self, scheduler: LRScheduler, train_loss: float | None) -> None:
        plateau = isinstance(scheduler, ReduceLROnPlateau)
        scheduler.step(*([train_loss] if plateau else []))  # type: ignore[arg-type]
        plain_groups(scheduler.optimizer)
        self.count += 1

    def follow(self, other: "Schedule", history: list[dict[str, Any]]) -> None:
        """Make the steps that `other` has made, on this optimizer; history: of these epochs."""
        if self.scheduler is None:
            return
        with warnings.catch_warnings():  # torch: this optimizer has made no step yet
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for k in range(other.count):
                loss = None if self.per_step else history[k]["train_loss"]
                self._advance(self.scheduler, loss)

    def state(self) -> dict[str, Any] | None:
        """Tensors and plain data for a checkpoint."""
        if self.scheduler is None:
            return None
        return plain({"count": self.count, "scheduler": self.scheduler.state_dict()})

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a `state()` of a scheduler of the same name."""
        if self.scheduler is not None and state is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))  # which empties it
            self.count = state["count"]


def _parts(scheduler: Any) -> list[Any]:
    """A scheduler, and those that run beside it all along."""
    chained = (
        getattr(scheduler, "_schedulers", []) if _kind(scheduler) == "ChainedScheduler" else []
    )
    return [scheduler, *chained]


def _kind(scheduler: Any) -> str:
    return type(scheduler).__name__


def _describe(scheduler: Any) -> str:
    parts = ", ".join(_describe(part) for part in getattr(scheduler, "_schedulers", ()))
    return type(scheduler).__name__ + (f"({parts})" if parts else "")


def make_schedule(
    factory: SchedulerFactory | None,
    optimizer: torch.optim.Optimizer,
    interval: str,
    second_phase: str,
) -> Schedule:
    """The schedule of an optimizer.

    TypeError for what is no LRScheduler, ValueError for one of another optimizer, for
    ReduceLROnPlateau after every step, and for a state that a checkpoint cannot hold.
    """
    first = first_settings(optimizer)
    if factory is None:
        return Schedule(first=first)
    scheduler = factory(optimizer)
    plain_groups(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(f"scheduler: expected an LRScheduler, got {type(scheduler).__name__}")
    if scheduler.optimizer is not optimizer:
        raise ValueError("scheduler: expected one of the optimizer that it was given")
    if isinstance(scheduler, ReduceLROnPlateau) and interval == "step":
        raise ValueError(
            "scheduler_interval: ReduceLROnPlateau needs an epoch's training loss, expected "
            "'epoch', got 'step'"
        )
    schedule = Schedule(scheduler, interval, second_phase, first)
    written = io.BytesIO()
    try:
        torch.save(schedule.state(), written)
        read_tensors(io.BytesIO(written.getvalue()))
    except Exception as error:  # of pickle or torch, of many types
        raise ValueError(
            f"scheduler: {schedule.name} keeps what a checkpoint cannot hold, expected tensors and "
            f"plain data: {first_line(error)}"
        ) from error
    return schedule
