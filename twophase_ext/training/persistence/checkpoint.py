"""Checkpoints: tensors and plain types only; a kill never loses the last good one."""

import hashlib
import io
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...core.files import inside, read_tensors, write_atomically
from ...core.hashing import flat
from ...core.messages import first_line
from ..optimizer.groups import plain

FORMAT = 5
# of older formats, read as well: names of then -> of now. 3 has the optimizer's state by position
RENAMED: dict[Any, dict[str, str]] = {3: {"descent": "second", "unchanged": "hidden_unchanged"}}
RENAMED[4] = RENAMED[3]
_COLUMNS = 4096  # of the matrices whose sums are kept
CURRENT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
FRESH = CURRENT + ".new"  # complete, and newer than CURRENT: a kill came before its rename


def describe(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> "dtype [shape]": what makes two models interchangeable for a checkpoint."""
    return {name: f"{t.dtype} {list(t.shape)}" for name, t in tensors.items()}


def _sums(tensor: Tensor) -> bytes:
    """Row and column sums, modulo 2^64, of the tensor's bytes as a matrix of 64-bit integers.

    A changed bit changes two of them; they are had at the speed of memory, a cryptographic hash of
    hundreds of megabytes would cost more than writing them.
    """
    raw = flat(tensor)
    if raw.storage_offset() * raw.element_size() % 8:
        raw = raw.clone()
    raw = raw.view(torch.uint8)
    whole = len(raw) // (8 * _COLUMNS) * 8 * _COLUMNS
    matrix = raw[:whole].view(torch.int64).view(-1, _COLUMNS)
    parts = matrix.sum(0), matrix.sum(1), raw[whole:]
    return b"".join(part.contiguous().numpy().tobytes() for part in parts)


def digest(state: Any) -> str:
    """A checksum of tensors and plain data, nested. torch.load does not notice a changed bit."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):  # a subclass
            names, context = value.__tensor_flatten__()
            found.update(f"{type(value).__qualname__} {list(value.shape)}".encode())
            add([context, *(getattr(value, name) for name in names)])
        elif isinstance(value, Tensor):
            found.update(f"{value.dtype} {list(value.shape)}".encode() + _sums(value))
        elif isinstance(value, Mapping):
            for key, part in value.items():
                found.update(f"{{{key!r}".encode())
                add(part)
        elif isinstance(value, list | tuple):
            found.update(f"[{len(value)}".encode())
            for part in value:
                add(part)
        elif type(value).__repr__ is object.__repr__ and hasattr(value, "__dict__"):
            found.update(type(value).__qualname__.encode())  # its address is no content
            add(vars(value))
        else:
            found.update(repr(value).encode())

    add(state)
    return found.hexdigest()


_HELD = (bool, int, float, str, type(None), torch.Size, torch.dtype, torch.device)


def not_held(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, object) of everything in tensors and data, nested, that no checkpoint gives back."""
    kind = type(value)
    if kind in _HELD or kind in (Tensor, torch.nn.Parameter):
        return
    if kind in (dict, OrderedDict):
        for key, part in value.items():
            yield from not_held(key, f"a key of {path}")
            yield from not_held(part, f"{path}[{key!r}]")
    elif kind in (list, tuple):
        for i, part in enumerate(value):
            yield from not_held(part, f"{path}[{i}]")
    elif not _comes_back(value):
        yield path, value


def _comes_back(value: Any) -> bool:
    """Whether read_tensors reads what torch.save wrote of it."""
    written = io.BytesIO()
    try:
        torch.save(value, written)
        written.seek(0)
        return digest(read_tensors(written)) == digest(value)
    except Exception:  # of pickle, torch or the class itself, of many types
        return False


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as the folder's checkpoint; the one before it is kept beside.

    Raises OSError where it cannot be written (a full disk): what was there stays as it was.
    """
    current, previous = folder / CURRENT, folder / PREVIOUS
    fresh = folder / FRESH
    state = plain(state)
    whole = {"format": FORMAT, "checksum": digest(state), **state}

    def write(file: BinaryIO) -> None:
        try:
            torch.save(whole, file)
        except RuntimeError as error:
            # torch ends its archive all the same, and hides the system's error behind its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    _give_back(current)
    write_atomically(fresh, write)
    if current.exists():
        os.replace(current, previous)
    os.replace(fresh, current)


def _give_back(path: Path) -> None:
    """Let the file's pages in memory serve the next one.

    A guest that must be lent each fresh page by its host writes three times slower.
    """
    if path.exists() and hasattr(os, "posix_fadvise"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def exists(folder: Path) -> bool:
    """Whether the run folder holds a checkpoint, readable or not."""
    return any((folder / name).exists() for name in (FRESH, CURRENT, PREVIOUS))


def _read(path: Path) -> dict[str, Any]:
    state = read_tensors(path, "cpu")
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise ValueError("not a checkpoint of twophase_ext")
    if (found := state.pop("format")) not in (FORMAT, *RENAMED):
        raise ValueError(f"format {found}, this version reads {FORMAT}")
    if state.pop("checksum", None) != digest(state):
        raise ValueError("its contents do not match its checksum")
    names = RENAMED.get(found, {})
    return {str(names.get(name, name)): value for name, value in state.items()}


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
            failures.append(f"{candidate.name}: {first_line(error)}")
            continue
        if failures:
            warnings.warn(
                f"resume: {'; '.join(failures)}. Using {candidate.name}, "
                f"{state['epoch']} epochs done.",
                stacklevel=3,
            )
        return state, candidate
    raise ValueError(f"resume: no readable checkpoint in {path} ({'; '.join(failures)})")


def find(resume: Any, run_dir: Any) -> tuple[dict[str, Any] | None, Path | None]:
    """The checkpoint that `Trainer.fit(resume=...)` means and its file; (None, None) for none.

    Raises as `load`, and ValueError where resume is True or "auto" and run_dir names no folder.
    """
    if not resume:
        return None, None
    by_folder = resume is True or resume == "auto"
    if by_folder and not isinstance(run_dir, str | Path):
        raise ValueError(f"resume: {resume} needs run_dir, the folder of the run to continue")
    path = Path(run_dir if by_folder else str(resume))
    if resume == "auto" and not exists(path):
        return None, None
    return load(path)


def difference(state: dict[str, Any], model: dict[str, str]) -> str:
    """How a checkpoint's tensors differ from a model's, as of `describe`; "" where they do not."""
    theirs = describe(state["model"])
    differing = [name for name in {**theirs, **model} if theirs.get(name) != model.get(name)]
    if not differing:
        return ""
    name = differing[0]
    return (
        f"the checkpoint is of another model: {len(differing)} entries differ, first {name}: "
        f"expected {model.get(name, 'nothing')}, got {theirs.get(name, 'nothing')}"
    )


def check_matches(state: dict[str, Any], model: dict[str, str], config: dict[str, Any]) -> None:
    """Raise ValueError where a checkpoint belongs to another model or another configuration.

    Only the number of epochs may be another one: a run goes on beyond its old end, or ends sooner.
    """
    if differing := difference(state, model):
        raise ValueError(f"resume: {differing}")
    theirs = state["config"]
    for key, value in config.items():
        if key == "epochs":
            _check_epochs(state, value)
        elif theirs.get(key) != value:
            more = theirs.get("epochs") != config.get("epochs") and key == "tau_epoch"
            raise ValueError(
                f"resume: the checkpoint was made with {key}={theirs.get(key)!r}, "
                f"this Trainer has {value!r}"
                + (f"; for other epochs after the same tau pass tau={theirs[key]}" if more else "")
            )


def _check_epochs(state: dict[str, Any], epochs: int) -> None:
    done, old = state["epoch"], state["config"].get("epochs")
    if epochs < done:
        raise ValueError(f"epochs: {done} are done, expected {done} or more, got {epochs}")
    best = state["second"].get("best")
    if old is not None and done == old < epochs and best is not None and best["epoch"] != done - 1:
        raise ValueError(
            f"resume: the run is finished and kept the weights of epoch {best['epoch']} "
            f"(early_stopping); there is nothing to go on from to {epochs} epochs"
        )
