"""What a run folder holds, read and not changed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from twophase_ext import Verdict
from twophase_ext.core.files import inside
from twophase_ext.theory.guarantee import Guarantee
from twophase_ext.training.phases.lazy import LazyGuarantee

from ..figures import read_rows

T = TypeVar("T")
PNG = b"\x89PNG\r\n\x1a\n"
REQUIRED = ("model", "n", "width", "loss", "epochs", "tau_epoch", "second_phase")


@dataclass(frozen=True)
class RunRecord:
    """A run folder's files; None, or empty, where a file is missing or cannot be read.

    name: the folder's. config: config.json. options: options.yaml, which the command line writes.
    history: rows of metrics.csv. curve: rows of guarantee.csv. guarantee: the audit in result.json.
    picture: culprits.png. problems: name of a file -> why it cannot be read.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    options: dict[str, Any] | None
    environment: dict[str, Any] | None
    result: dict[str, Any] | None
    guarantee: Guarantee | LazyGuarantee | None
    history: list[dict[str, float]]
    curve: list[dict[str, float]]
    verdict: Verdict | None
    picture: bytes | None
    problems: dict[str, str]

    @property
    def epochs_done(self) -> int:
        """Epochs in metrics.csv."""
        return len(self.history)

    @property
    def held_out(self) -> str:
        """What the validation data are called: the command line gives a data set's test part."""
        return "validation" if self.options is None else "test"


def read_folder(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises FileNotFoundError where there is no such folder or no config.json in it, ValueError where
    config.json cannot be read or is not of a run. Any other unreadable file is named in `problems`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"runs: {folder} is no folder")
    config_path = folder / "config.json"
    if not config_path.exists():
        raise FileNotFoundError(
            f"runs: {folder} is no run folder: it holds no config.json, which every run writes "
            "before its first epoch"
        )
    try:
        config = _json(inside(folder, config_path.name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"runs: {config_path} cannot be read: {error}") from error
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise ValueError(f"runs: {config_path} is not of a run: it lacks {', '.join(missing)}")
    problems: dict[str, str] = {}

    def read(name: str, reader: Callable[[Path], T]) -> T | None:
        path = folder / name
        if not path.exists():
            return None
        try:
            return reader(inside(folder, name))
        except Exception as error:  # a damaged file makes yaml and csv raise types of their own
            problems[name] = str(error) or type(error).__name__
            return None

    result = read("result.json", _result)
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        options=read("options.yaml", _yaml),
        environment=read("environment.json", _json),
        result=None if result is None else result[0],
        guarantee=None if result is None else result[1],
        history=read("metrics.csv", _history) or [],
        curve=read("guarantee.csv", _curve) or [],
        verdict=read("verdict.json", Verdict.load),
        picture=read("culprits.png", _png),
        problems=problems,
    )


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, got {type(value).__name__}")
    return value


def _json(path: Path) -> dict[str, Any]:
    return _mapping(json.loads(path.read_text(encoding="utf-8")))


def _yaml(path: Path) -> dict[str, Any]:
    return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")))


def _result(path: Path) -> tuple[dict[str, Any], Guarantee | LazyGuarantee | None]:
    result = _json(path)
    if not isinstance(result.get("status"), str):
        raise ValueError("expected a status")
    found = result.get("guarantee")
    if found is None:
        return result, None
    return result, (LazyGuarantee if "checks" in _mapping(found) else Guarantee)(**found)


def _rows(path: Path, *columns: str) -> list[dict[str, float]]:
    rows = read_rows(path)
    if not all(column in row for row in rows for column in columns):
        raise ValueError(f"expected numbers in the columns {', '.join(columns)} of every row")
    return rows


def _history(path: Path) -> list[dict[str, float]]:
    return _rows(path, "epoch", "phase", "train_loss", "seconds")


def _curve(path: Path) -> list[dict[str, float]]:
    return _rows(path, "steps", "bound")


def _png(path: Path) -> bytes:
    data = path.read_bytes()
    if not data.startswith(PNG):
        raise ValueError("expected a PNG file")
    return data
