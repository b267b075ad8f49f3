"""The folder that a run leaves: configuration, environment, metrics, verdict, checkpoints."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ...core.environment import environment_of_run
from ...core.files import write_csv, write_json
from ...expressivity import Verdict
from ..context import Context
from ..data.samples import BATCH
from ..result import Result
from . import checkpoint

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


def lock(folder: Path) -> FileLock:
    """The folder's lock, held: the file "lock" in it, which stays there empty.

    A process that ends, however it does, holds no lock. Raises ValueError where another run holds
    it, or it cannot be taken.
    """
    held = FileLock(folder / "lock", timeout=0)
    hold(held)
    return held


def hold(lock: FileLock) -> None:
    """Take the lock, or keep it; ValueError as from `lock`."""
    folder = Path(lock.lock_file).parent
    try:
        if not lock.is_locked:
            lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"run_dir: another run is writing into {folder}; wait for its end or take another "
            "folder"
        ) from error
    except OSError as error:
        raise ValueError(f"run_dir: {folder} cannot be written: {error.strerror}") from error


def describe(
    folder: Path, context: Context, verdict: Verdict | None, model: str, *, new: bool
) -> None:
    """What the folder tells about a run before its first epoch; model: its class's name."""
    if new or not (folder / "config.json").exists():
        network = context.network
        resolved = {
            **context.identity(),
            "model": model,
            "last_layer": network.last.name,
            "width": network.width,
            "outputs": network.outputs,
            "optimizer": describe_optimizer(context.optimizer),
            "statistics_batch": BATCH,
            "compile": context.compiled is not None,
        }
        write_json(folder / "config.json", resolved)
        write_json(
            folder / "environment.json", environment_of_run(context.device, context.config.seed)
        )
    if verdict is not None:
        verdict.save(folder / "verdict.json")
    context.progress.say(f"run folder: {folder}")


def withdraw(folder: Path | None) -> None:
    """Take back what `describe` wrote of a run whose first step was refused: there is no run."""
    if folder is not None and not checkpoint.exists(folder):
        for name in ("config.json", "environment.json"):
            (folder / name).unlink(missing_ok=True)


def write_metrics(folder: Path, history: list[dict[str, Any]]) -> None:
    """metrics.csv: one row an epoch, rewritten whole and atomically (empty cell: not measured)."""
    write_csv(folder / "metrics.csv", COLUMNS, history)


def write_curve(folder: Path, curve: list[dict[str, Any]]) -> None:
    """guarantee.csv: steps since tau, measured loss and guaranteed loss; nothing where no bound."""
    if curve:
        write_csv(folder / "guarantee.csv", ("steps", "loss", "bound", "comparator"), curve)


def write_result(folder: Path, result: Result, epochs_done: int) -> None:
    """result.json, and guarantee.csv where there is a bound."""
    write_curve(folder, getattr(result.guarantee, "curve", []))
    found = {
        "status": result.status,
        "divergence": result.divergence,
        "epochs_done": epochs_done,
        "final": result.final,
        "timings": result.timings,
        "hidden_hash": result.hidden_hash,
        "feature_cache": result.feature_cache,
        "guarantee": result.guarantee and result.guarantee.as_dict(),
    }
    write_json(folder / "result.json", found)
