"""Each epoch's record to TensorBoard, Weights & Biases or a logger of the user's: a callback."""

import os
from collections.abc import Callable
from importlib import import_module  # noqa: TID251  of two names below
from pathlib import Path
from types import ModuleType
from typing import Any


class _Logger:
    """What all have in common: the events that are logged; rank 0 alone logs."""

    def on_fit_start(self, run: Any) -> None:
        """Called by the Trainer."""
        if run.ranks.rank == 0:
            if run.folder is None:
                raise ValueError(
                    "logger: expected a Trainer with a run_dir, or a logger made by its package"
                )
            self._open(run.folder, run)

    def on_perturb(self, run: Any) -> None:
        """Called by the Trainer at tau."""
        if run.ranks.rank == 0:
            self._mark(run.epoch)

    def on_epoch_end(self, run: Any, record: dict[str, Any]) -> None:
        """Called by the Trainer; what was not measured is left out."""
        if run.ranks.rank:
            return
        values = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._log(int(values.pop("epoch")), values)

    def _open(self, folder: Path, run: Any) -> None:
        raise NotImplementedError

    def _mark(self, epoch: int) -> None:
        raise NotImplementedError

    def _log(self, epoch: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def on_fit_end(self, run: Any) -> None:
        """Called by the Trainer: write what is pending; nothing where the run did not start."""


class _Given(_Logger):
    """A logger of the user's, which stays open: `log(epoch, values)` hands on to it."""

    def __init__(self, log: Callable[[int, dict[str, float]], Any]) -> None:
        self.log = log

    def on_fit_start(self, run: Any) -> None:
        """It needs no folder."""

    def _mark(self, epoch: int) -> None:
        self.log(epoch, {"tau": epoch})

    def _log(self, epoch: int, values: dict[str, float]) -> None:
        self.log(epoch, values)


class _TensorBoard(_Logger):
    def __init__(self) -> None:
        self.module = _load("tensorboard", "torch.utils.tensorboard")
        self.writer: Any = None

    def _open(self, folder: Path, run: Any) -> None:
        # a resumed run repeats the epochs after its checkpoint: the old ones are hidden
        self.writer = self.module.SummaryWriter(str(folder), purge_step=run.epoch or None)

    def _mark(self, epoch: int) -> None:
        self.writer.add_text("tau", f"The second phase begins at epoch {epoch}.", epoch)

    def _log(self, epoch: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, epoch)
        self.writer.flush()

    def on_fit_end(self, run: Any) -> None:
        if self.writer is not None:
            self.writer.close()


class _WeightsAndBiases(_Logger):
    def __init__(self) -> None:
        self.module = _load("wandb", "wandb")
        self.run: Any = None

    def _open(self, folder: Path, run: Any) -> None:
        self.run = self.module.init(
            project="twophase",
            dir=str(folder),
            name=folder.name,
            group=folder.name,  # a resumed run is another one of the same group
            config=run.identity(),
            mode=os.environ.get("WANDB_MODE", "offline"),  # offline: no account, no upload
        )

    def _mark(self, epoch: int) -> None:
        self.run.summary["tau"] = epoch
        self.run.log({"tau": epoch}, step=epoch)

    def _log(self, epoch: int, values: dict[str, float]) -> None:
        self.run.log(values, step=epoch)

    def on_fit_end(self, run: Any) -> None:
        if self.run is not None:
            self.run.finish()


LOGGERS: dict[str, type[_Logger]] = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}


def _load(extra: str, module: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"logger: {extra} is not installed ({error}); it is an extra of this package: "
            f'pip install "twophase-ext[{extra}]"'
        ) from error


def make_logger(logger: Any) -> _Logger:
    """A callback that logs each epoch's record; see the Trainer's `logger`.

    Logged by epoch: phase, losses, accuracies, learning rate, seconds, under the names that they
    have in metrics.csv, and "tau" where the second phase begins. By name the files lie in the run's
    folder, wandb's mode is WANDB_MODE, by default offline, which needs no account, and all is
    closed as the run ends; an object stays open.

    Raises ValueError for another name, TypeError for an object without such a method, ImportError
    naming the extra where the package is missing.
    """
    if isinstance(logger, str):
        if logger not in LOGGERS:
            raise ValueError(
                f"logger: expected one of {sorted(LOGGERS)}, got {logger!r} (every run folder has "
                "its metrics.csv)"
            )
        return LOGGERS[logger]()
    if hasattr(logger, "add_scalar"):  # SummaryWriter

        def write(epoch: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                logger.add_scalar(name, value, epoch)

        return _Given(write)
    if hasattr(logger, "log_metrics"):  # Lightning's, MLflow's
        return _Given(lambda epoch, values: logger.log_metrics(values, step=epoch))
    if hasattr(logger, "log"):  # a run of wandb
        return _Given(lambda epoch, values: logger.log(values, step=epoch))
    raise TypeError(
        f"logger: expected one of {sorted(LOGGERS)}, or an object with add_scalar, log_metrics or "
        f"log, got {type(logger).__name__}"
    )
