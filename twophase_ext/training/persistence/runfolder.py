"""The folder that a run leaves: configuration, environment, metrics, verdict, result.

One home of these files' names and forms: what writes them and what reads them. Checkpoints are
checkpoint.py's.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ...core.files import inside, read_numbers, write_csv, write_json
from ...expressivity import Verdict
from ...theory.guarantee import Guarantee
from ...theory.lazy_guarantee import LazyGuarantee
from ..result import Result
from . import checkpoint

FORMAT = 1  # of the files together, in config.json; before there was a number: 0, read as well
COLUMNS = (
    "epoch",
    "phase",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "learning_rate",
    "seconds",
)
MEASURED = ("epoch", "phase", "train_loss", "seconds")  # in every row of metrics.csv
CURVE = ("steps", "loss", "bound", "comparator")
REQUIRED = ("model", "n", "width", "loss", "epochs", "tau_epoch", "second_phase")  # of config.json


def is_metric(column: str) -> bool:
    """Whether a column of metrics.csv is one of the user's own metrics."""
    return column.startswith(("train_", "val_")) and column not in COLUMNS


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's class and its groups' hyper-parameters, as plain data."""
    plain = (bool, int, float, str, type(None))
    groups = [
        {
            **{k: v if isinstance(v, plain) else str(v) for k, v in g.items() if k != "params"},
            "parameters": len(g["params"]),
        }
        for g in optimizer.param_groups
    ]
    return {"class": f"{type(optimizer).__module__}.{type(optimizer).__name__}", "groups": groups}


def create(run_dir: str | Path | None, *, resuming: bool) -> Path:
    """Make or reopen the run folder; None names a new one under runs/ by the time.

    Raises ValueError where the folder holds a run already and it is not resumed, and where it
    cannot be made or written.
    """
    if run_dir is None:
        stem = time.strftime("%Y%m%d-%H%M%S")
        for attempt in range(1000):
            folder = Path("runs") / (stem if attempt == 0 else f"{stem}-{attempt}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
    folder = Path(run_dir or ".")
    if not resuming and (folder / "config.json").exists():
        raise ValueError(
            f"run_dir: {folder} holds a run already; pass resume=True to continue it, or another "
            "folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir: {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"run_dir: {folder} cannot be written")
    return folder


class RunFolder:
    """The files of one run: each is written whole, or not at all, and read as it was written.

    Readers raise FileNotFoundError for a file that is not there, ValueError for one that is not
    what is written, or that leads out of the folder.
    """

    def __init__(self, path: Path) -> None:
        """Of the folder at `path`, which nothing is done to."""
        self.path = path
        # the file stays there empty; a process that ends, however it does, holds no lock
        self._lock = FileLock(path / "lock", timeout=0)

    def hold(self) -> None:
        """Lock the folder, or keep it locked, for one process at a time to write into it.

        Raises ValueError where another run holds it, or the lock cannot be taken.
        """
        try:
            if not self._lock.is_locked:
                self._lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"run_dir: another run is writing into {self.path}; wait for its end or take "
                "another folder"
            ) from error
        except OSError as error:
            raise ValueError(f"run_dir: {self.path} cannot be written: {error.strerror}") from error

    def release(self) -> None:
        """Give the lock up, where it is held."""
        self._lock.release(force=True)

    # --- writing

    def begin(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """config.json and environment.json: what there is before the first epoch."""
        write_json(self.path / "config.json", {"format": FORMAT, **config})
        write_json(self.path / "environment.json", dict(environment))

    def withdraw(self) -> None:
        """Take back what `begin` wrote of a run whose first step was refused: there is no run."""
        if not checkpoint.exists(self.path):
            for name in ("config.json", "environment.json"):
                (self.path / name).unlink(missing_ok=True)

    @property
    def begun(self) -> bool:
        """Whether a run has left its configuration here."""
        return (self.path / "config.json").exists()

    def write_verdict(self, verdict: Verdict) -> None:
        """verdict.json."""
        verdict.save(self.path / "verdict.json")

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """metrics.csv: a row an epoch, rewritten whole (empty cell: not measured)."""
        own = [key for row in history for key in row if is_metric(key)]
        write_csv(self.path / "metrics.csv", (*COLUMNS, *dict.fromkeys(own)), history)

    def write_result(self, result: Result, epochs_done: int) -> None:
        """result.json and, where there is a bound, guarantee.csv: measured and guaranteed loss."""
        curve = getattr(result.guarantee, "curve", [])
        if curve:
            write_csv(self.path / "guarantee.csv", CURVE, curve)
        found = {
            "sentence": None if result.minimum is None else str(result.minimum),
            "status": result.status,
            "stopped": result.stopped,
            "divergence": result.divergence,
            "epochs_done": epochs_done,
            "final": result.final,
            "timings": result.timings,
            "hidden_hash": result.hidden_hash,
            "feature_cache": result.feature_cache,
            "minimum": result.minimum and result.minimum.as_dict(),
            "guarantee": result.guarantee and result.guarantee.as_dict(),
        }
        write_json(self.path / "result.json", found)

    # --- reading

    def file(self, name: str) -> Path:
        """The file of this name; FileNotFoundError, or ValueError where it leads out of here."""
        path = inside(self.path, name)
        if not path.exists():
            raise FileNotFoundError(f"{path}: there is no such file")
        return path

    def config(self) -> dict[str, Any]:
        """config.json: the run's settings and what they were resolved to."""
        found = self._json("config.json")
        if found.get("format", 0) not in range(FORMAT + 1):
            raise ValueError(f"format {found['format']}, this version reads up to {FORMAT}")
        missing = [key for key in REQUIRED if key not in found]
        if missing:
            raise ValueError(f"is not of a run: it lacks {', '.join(missing)}")
        return found

    def environment(self) -> dict[str, Any]:
        """environment.json."""
        return self._json("environment.json")

    def history(self) -> list[dict[str, float]]:
        """Rows of metrics.csv; what was not measured is left out."""
        return self._rows("metrics.csv", MEASURED)

    def curve(self) -> list[dict[str, float]]:
        """Rows of guarantee.csv."""
        return self._rows("guarantee.csv", ("steps", "bound"))

    def verdict(self) -> Verdict:
        """verdict.json."""
        return Verdict.load(self.file("verdict.json"))

    def result(self) -> tuple[dict[str, Any], Guarantee | LazyGuarantee | None]:
        """result.json, and its guarantee."""
        found = self._json("result.json")
        if not isinstance(found.get("status"), str):
            raise ValueError("expected a status")
        guarantee = found.get("guarantee")
        if guarantee is None:
            return found, None
        kind = LazyGuarantee if "checks" in _mapping(guarantee) else Guarantee
        return found, kind(**guarantee)

    def _json(self, name: str) -> dict[str, Any]:
        return _mapping(json.loads(self.file(name).read_text(encoding="utf-8")))

    def _rows(self, name: str, columns: tuple[str, ...]) -> list[dict[str, float]]:
        rows = read_numbers(self.file(name))
        if not all(column in row for row in rows for column in columns):
            raise ValueError(f"expected numbers in the columns {', '.join(columns)} of every row")
        return rows


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, got {type(value).__name__}")
    return value
