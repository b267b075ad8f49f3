"""Checkpoints: tensors and plain types only; a kill never loses the last good one."""

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..files import write_atomically
from .freeze import tensors_hash

FORMAT = 3
CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FRESH = CURRENT + ".new"  # complete, and newer than CURRENT: a kill came before its rename


def describe(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> "dtype [shape]": what makes two models interchangeable for a checkpoint."""
    return {name: f"{t.dtype} {list(t.shape)}" for name, t in tensors.items()}


def _digest(state: Any) -> str:
    """SHA-256 of tensors and plain data, nested. torch.load does not notice a changed bit."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[f"{len(tensors):08}"] = value
            return f"tensor {len(tensors)}"
        if isinstance(value, Mapping):
            return [(repr(key), plain(part)) for key, part in value.items()]
        return [plain(part) for part in value] if isinstance(value, list | tuple) else repr(value)

    text = repr(plain(state))
    return hashlib.sha256((text + tensors_hash(tensors)).encode()).hexdigest()


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as the folder's checkpoint; the one before it is kept beside.

    Raises OSError where it cannot be written (a full disk): what was there stays as it was.
    """
    current, previous = folder / CURRENT, folder / PREVIOUS
    fresh = folder / FRESH
    whole = {"format": FORMAT, "sha256": _digest(state), **state}

    def write(file: BinaryIO) -> None:
        try:
            torch.save(whole, file)
        except RuntimeError as error:
            # torch ends its archive all the same, and hides the system's error behind its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(fresh, write)
    if current.exists():
        os.replace(current, previous)
    os.replace(fresh, current)


def exists(folder: Path) -> bool:
    """Whether the run folder holds a checkpoint, readable or not."""
    return any((folder / name).exists() for name in (FRESH, CURRENT, PREVIOUS))


def _read(path: Path) -> dict[str, Any]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise ValueError("not a checkpoint of twophase_ext")
    if (found := state.pop("format")) != FORMAT:
        raise ValueError(f"format {found}, this version reads {FORMAT}")
    if state.pop("sha256", None) != _digest(state):
        raise ValueError("its contents do not match its checksum")
    return state


def load(path: Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint at `path` (a file, or a run folder), and the file it came from.

    A damaged newest checkpoint is passed over with a warning and the one before it is used.
    Raises FileNotFoundError where there is none, ValueError where none can be read.
    """
    folder = path.parent if path.name == CURRENT and not path.is_dir() else path
    candidates = [folder / name for name in (FRESH, CURRENT, PREVIOUS)]
    if not path.is_dir() and path.name != CURRENT:
        candidates = [path]
    existing = [candidate for candidate in candidates if candidate.exists()]
    if not existing:
        raise FileNotFoundError(f"resume: no checkpoint in {path}")
    failures = []
    for candidate in existing:
        try:
            state = _read(candidate)
        except Exception as error:  # torch raises many types for a damaged file
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            failures.append(f"{candidate.name}: {first_line}")
            continue
        if failures:
            warnings.warn(
                f"resume: {'; '.join(failures)}. Using {candidate.name}, "
                f"{state['epoch']} epochs done.",
                stacklevel=3,
            )
        return state, candidate
    raise ValueError(f"resume: no readable checkpoint in {path} ({'; '.join(failures)})")


def check_matches(state: dict[str, Any], model: dict[str, str], config: dict[str, Any]) -> None:
    """Raise ValueError where a checkpoint belongs to another model or another configuration."""
    theirs = describe(state["model"])
    differing = [name for name in {**theirs, **model} if theirs.get(name) != model.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"resume: the checkpoint is of another model: {len(differing)} entries differ, first "
            f"{name}: expected {model.get(name, 'nothing')}, got {theirs.get(name, 'nothing')}"
        )
    for key, value in config.items():
        if state["config"].get(key) != value:
            raise ValueError(
                f"resume: the checkpoint was made with {key}={state['config'].get(key)!r}, "
                f"this Trainer has {value!r}"
            )
