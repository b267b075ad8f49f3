"""What a run folder holds, read and not changed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from twophase_ext import Verdict
from twophase_ext.theory.guarantee import Guarantee
from twophase_ext.theory.lazy_guarantee import LazyGuarantee
from twophase_ext.training.persistence.runfolder import RunFolder

T = TypeVar("T")
PNG = b"\x89PNG\r\n\x1a\n"


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
    kept = RunFolder(folder)
    if not kept.begun:
        raise FileNotFoundError(
            f"runs: {folder} is no run folder: it holds no config.json, which every run writes "
            "before its first epoch"
        )
    try:
        config = kept.config()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"runs: {folder / 'config.json'} cannot be read: {error}") from error
    problems: dict[str, str] = {}

    def read(name: str, reader: Callable[[], T]) -> T | None:
        try:
            return reader() if (folder / name).exists() else None
        except Exception as error:  # a damaged file makes yaml and csv raise types of their own
            problems[name] = str(error) or type(error).__name__
            return None

    result = read("result.json", kept.result)
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        config=config,
        options=read("options.yaml", lambda: _yaml(kept.file("options.yaml"))),
        environment=read("environment.json", kept.environment),
        result=None if result is None else result[0],
        guarantee=None if result is None else result[1],
        history=read("metrics.csv", kept.history) or [],
        curve=read("guarantee.csv", kept.curve) or [],
        verdict=read("verdict.json", kept.verdict),
        picture=read("culprits.png", lambda: _png(kept.file("culprits.png"))),
        problems=problems,
    )


def _yaml(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"expected a mapping, got {type(found).__name__}")
    return found


def _png(path: Path) -> bytes:
    data = path.read_bytes()
    if not data.startswith(PNG):
        raise ValueError("expected a PNG file")
    return data
