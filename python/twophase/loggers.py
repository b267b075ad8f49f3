"""Each epoch's record to TensorBoard or Weights & Biases, as a callback of the Trainer."""

import os
from importlib import import_module  # noqa: TID251  of two names below
from pathlib import Path
from types import ModuleType
from typing import Any


class _Logger:
    """What both have in common: the events that are logged, and where."""

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)

    def on_fit_start(self, run: Any) -> None:
        """Called by the Trainer."""
        folder = run.folder if self.folder is None else self.folder
        if folder is None:
            raise ValueError("folder: expected one, or a Trainer with a run_dir; got neither")
        self._open(folder, run)

    def on_perturb(self, run: Any) -> None:
        """Called by the Trainer at tau."""
        self._mark(run.epoch)

    def on_epoch_end(self, run: Any, record: dict[str, Any]) -> None:
        """Called by the Trainer; what was not measured is left out."""
        values = {name: value for name, value in record.items() if isinstance(value, int | float)}
        self._log(values.pop("epoch"), values)

    def _open(self, folder: Path, run: Any) -> None:
        raise NotImplementedError

    def _mark(self, epoch: int) -> None:
        raise NotImplementedError

    def _log(self, epoch: int, values: dict[str, float]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Write what is pending; nothing where the run did not start."""
        raise NotImplementedError


class _TensorBoard(_Logger):
    def __init__(self, folder: str | Path | None) -> None:
        super().__init__(folder)
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

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _WeightsAndBiases(_Logger):
    def __init__(self, folder: str | Path | None) -> None:
        super().__init__(folder)
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

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


LOGGERS = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}


def _load(extra: str, module: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"logger: {extra} is not installed ({error}); it is an extra of this package: "
            f'pip install "twophase-ext[{extra}]"'
        ) from error


def make_logger(name: str, folder: str | Path | None = None) -> _Logger:
    """A Trainer callback that logs each epoch's record; call its `close()` after `fit`.

    name: "tensorboard" (an event file) or "wandb" (mode WANDB_MODE, by default offline, which needs
    no account). folder: where its files go; by default the run's folder. Logged by epoch: phase,
    losses, accuracies, learning rate, seconds, under the names that they have in metrics.csv, and a
    marker "tau" where the second phase begins.

    Raises ValueError for another name, ImportError naming the extra where the package is missing.
    """
    if name not in LOGGERS:
        raise ValueError(f"logger: expected one of {sorted(LOGGERS)}, got {name!r}")
    return LOGGERS[name](folder)
