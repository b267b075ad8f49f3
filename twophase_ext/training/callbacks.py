"""What a run tells its callbacks, and what these may see of it."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..expressivity import Verdict
from ..model.network import Network
from .config import Config
from .data.samples import Samples
from .distributed.ranks import Ranks
from .loggers import make_logger
from .optimizer.groups import plain_groups
from .run import Run


class RunView:
    """A run as callbacks see it: nothing of it can be replaced.

    What it gives are the run's own objects: `optimizer.param_groups` may be written (a learning
    rate; checkpoints hold it). Weights that a callback changes after tau end the claim of "gd",
    "sgd" and "lazy", hidden layers that it changes the run.
    """

    __slots__ = ("_run", "_who")
    _run: Run
    _who: str

    def __init__(self, run: Run, who: str) -> None:
        """Of this run, for the callback of this name."""
        object.__setattr__(self, "_run", run)
        object.__setattr__(self, "_who", who)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refused."""
        raise AttributeError(f"run.{name}: a callback sees the run, it cannot replace parts of it")

    @property
    def network(self) -> Network:
        """The model with its last and wide layers named: `network.model`, `network.last.module`."""
        return self._run.context.network

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The base algorithm's."""
        return self._run.context.optimizer

    @property
    def config(self) -> Config:
        """The settings, resolved."""
        return self._run.context.config

    @property
    def train(self) -> Samples:
        """The training samples."""
        return self._run.context.train

    @property
    def val(self) -> Samples | None:
        """The validation samples."""
        return self._run.context.val

    @property
    def device(self) -> torch.device:
        """Where model and data are."""
        return self._run.context.device

    @property
    def folder(self) -> Path | None:
        """The run's folder, where one is kept and this process writes it."""
        folder = self._run.context.folder
        return None if folder is None else folder.path

    @property
    def epoch(self) -> int:
        """The epoch that is next, or runs: from 0."""
        return self._run.state.epoch

    @property
    def batch(self) -> int:
        """The step that is next within it."""
        return self._run.state.batch

    @property
    def phase(self) -> int:
        """1 before the perturbation, 2 after."""
        return self._run.phase

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the epochs so far, copied."""
        return [dict(row) for row in self._run.state.history]

    @property
    def verdict(self) -> Verdict | None:
        """Of the expressivity condition at w^tau."""
        return self._run.state.verdict

    @property
    def hidden_hash(self) -> str | None:
        """SHA-256 of the hidden layers, from tau on."""
        return self._run.state.hidden_hash

    @property
    def ranks(self) -> Ranks:
        """Of several processes: `ranks.rank` of `ranks.size`."""
        return self._run.context.ranks

    def identity(self) -> dict[str, Any]:
        """The settings and what else a checkpoint must agree in, as plain data."""
        return self._run.context.identity()

    def stop(self, reason: str) -> None:
        """End the run after this epoch, or after the next one where none runs.

        It is then saved and measured as at its end, and claims for the steps made what it would
        claim there; its status is "stopped" and `result.stopped` "Class: reason". Resumed, it goes
        on. The first word counts, of any process. TypeError for a reason that is no text.
        """
        if not isinstance(reason, str):
            raise TypeError(f"reason: expected a text, got {type(reason).__name__}")
        self._run.stop = self._run.stop or f"{self._who}: {reason}"

    def say(self, line: str) -> None:
        """A line in the run's log."""
        self._run.context.progress.say(line)


class Callback:
    """Base of callbacks: override what you need. Any object with methods of these names serves.

    Called in every process, in the order of the Trainer's `callbacks`. An exception ends the run;
    the last checkpoint is from before. A callback's own state is not in checkpoints.
    """

    def on_fit_start(self, run: RunView) -> None:
        """Before the first step of this process, also of a resumed run."""

    def on_perturb(self, run: RunView) -> None:
        """At tau, the noise added and BatchNorm's statistics fixed, before the verification.

        The hidden layers must stay as they are from here on.
        """

    def on_epoch_end(self, run: RunView, record: dict[str, Any]) -> None:
        """After an epoch: its row of the history is `record`; before the checkpoint."""

    def on_fit_end(self, run: RunView) -> None:
        """However the run ends, by an exception too: what was opened can be closed."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def misspelt(callbacks: Iterable[Any]) -> list[str]:
    """Methods on_... that no event calls, "Class.on_name"."""
    return [
        f"{type(callback).__name__}.{name}"
        for callback in callbacks
        for name in dir(type(callback))
        if name.startswith("on_") and name not in EVENTS
    ]


def listeners(callbacks: Iterable[Any], logger: Any) -> tuple[Any, ...]:
    """The run's callbacks, its logger too; a warning of methods that no event calls."""
    found = tuple(callbacks)
    if wrong := misspelt(found):
        warnings.warn(
            f"callbacks: no event calls {', '.join(wrong[:3])}; events are {', '.join(EVENTS)}",
            stacklevel=3,
        )
    return found if logger is None else (*found, make_logger(logger))


def call(run: Run, event: str, *arguments: Any) -> None:
    """Tell the run's callbacks."""
    for callback in run.context.callbacks:
        method = getattr(callback, event, None)
        if method is not None:
            method(RunView(run, type(callback).__name__), *arguments)
    plain_groups(run.context.optimizer)  # a rate that NumPy made
