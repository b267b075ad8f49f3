"""Checkpoints: tensors and plain types only; a kill never loses the last good one."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import inside, write_atomically

FORMAT = 2
CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FRESH = CURRENT + ".new"  # complete, and newer than CURRENT: a kill came before its rename


def describe(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> "dtype [shape]": what makes two models interchangeable for a checkpoint."""
    return {name: f"{t.dtype} {list(t.shape)}" for name, t in tensors.items()}


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as the folder's checkpoint; the one before it is kept beside."""
    current, previous = folder / CURRENT, folder / PREVIOUS
    fresh = folder / FRESH
    write_atomically(fresh, lambda file: torch.save({"format": FORMAT, **state}, file))
    if current.exists():
        os.replace(current, previous)
    os.replace(fresh, current)


def _read(path: Path) -> dict[str, Any]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise ValueError("not a checkpoint of twophase_ext")
    if state["format"] != FORMAT:
        raise ValueError(f"format {state['format']}, this version reads {FORMAT}")
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
            state = _read(path if candidate == path else inside(folder, candidate.name))
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
