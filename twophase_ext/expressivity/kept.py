"""What a verification keeps in a folder, so that a run that is killed goes on where it was.

Features of some thousand samples a file, and the sweep of kinks.py as it stands, a file a minute.
A file is named by what its numbers follow from, carries a checksum, and part of it is computed
again before it counts.
"""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import inside, read_tensors, write_atomically
from ..core.hashing import hash_tensors
from ..core.messages import first_line
from .bounded import BoundedFeatures

SAVE_SECONDS = 60.0  # between two states of a sweep


Progress = Callable[[int], object]  # called with the number of samples done
Compute = Callable[[list[Tensor], Progress], BoundedFeatures]


@dataclass
class FeatureFiles:
    """Features with their bounds, a file for some batches of samples.

    content: of all that features follow from, but the samples. each: rows of a sample. compute:
    of batches; what it gives is kept.
    """

    folder: Path
    content: str
    each: int
    compute: Compute

    def __call__(self, batches: list[Tensor], progress: Progress) -> BoundedFeatures:
        """From the file that is named by what the features follow from, or computed and kept."""
        key = hashlib.sha256(f"{hash_tensors(batches)} {self.content}".encode()).hexdigest()
        path = inside(self.folder, f"features-{key[:24]}.pt")
        if path.exists():
            found = read_features(path, key, batches[0].device)
            if self._as_before(batches, found, int(key[:8], 16)):
                progress(len(found.z))
                return found
        found = self.compute(batches, progress)
        write_state(path, key, vars(found))
        return found

    def _as_before(self, batches: list[Tensor], found: BoundedFeatures, draw: int) -> bool:
        """Whether one batch has the features and bounds of the file, but for another rounding.

        What a forward computes hangs on more than can be hashed: globals, objects in attributes.
        (The values are compared with the model on every sample before a proof: agreement.py.)
        """
        k = draw % len(batches)
        start = self.each * sum(map(len, batches[:k]))
        rows = slice(start, start + self.each * len(batches[k]))
        now = self.compute([batches[k]], int)
        z, error = found.z[rows], found.error[rows]
        return (
            now.z.shape == z.shape
            and now.assumptions == found.assumptions
            and torch.allclose(now.error, error, rtol=1e-6, atol=0.0)
            and bool(((now.z - z).norm(dim=1) <= now.error + error).all())
        )


def read_features(path: Path, key: str, device: torch.device) -> BoundedFeatures:
    """A file of `FeatureFiles`; ValueError where it is damaged or of another problem."""
    return BoundedFeatures(**_read(path, key, device))


@dataclass
class SweepFile:
    """The state of a sweep over neurons, in order: what is done of it, and their weights.

    content: of all that the sweep follows from. arrays: [n, ...] float64, of which the first `done`
    rows are final; their rows are added to one file as they come, and their digest to the state.
    """

    folder: Path
    content: str
    arrays: dict[str, Tensor]
    done: int = 0
    _saved: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Name the files."""
        self.key = hashlib.sha256(self.content.encode()).hexdigest()
        self._state = inside(self.folder, f"sweep-{self.key[:24]}.pt")
        self._rows = {
            name: inside(self.folder, f"sweep-{self.key[:24]}-{name}.bin") for name in self.arrays
        }
        self._digests = {name: hashlib.sha256() for name in self.arrays}

    def resume(self) -> dict[str, Any] | None:
        """Fill the arrays and return the rest of the state; None where nothing is kept.

        ValueError where a file is damaged or of another problem.
        """
        if not self._state.exists():
            return None
        device = next(iter(self.arrays.values())).device
        state = _read(self._state, self.key, device)
        done, digests = state.pop("done"), state.pop("digests")
        for name, array in self.arrays.items():
            numbers = torch.empty(array[:done].shape, dtype=array.dtype, device="cpu")
            with open(self._rows[name], "rb") as file:
                read = file.readinto(_bytes(numbers))
            self._digests[name].update(_bytes(numbers))
            if read != numbers.nbytes or self._digests[name].hexdigest() != digests[name]:
                raise ValueError(f"folder: {self._rows[name]} has been changed (checksum)")
            array[:done] = numbers.to(device)
        self.done = done
        return state

    def save(self, done: int, state: Callable[[], dict[str, Any]], *, last: bool = False) -> None:
        """Keep what is done, where a minute has passed or where it is the last time."""
        if done <= self.done or not (last or time.monotonic() - self._saved > SAVE_SECONDS):
            return
        for name, array in self.arrays.items():
            rows = array[self.done : done].cpu().contiguous()
            with open(self._rows[name], "r+b" if self.done else "wb") as file:
                file.seek(self.done * (rows.nbytes // len(rows)))
                file.write(_bytes(rows))
                file.flush()
                os.fsync(file.fileno())
            self._digests[name].update(_bytes(rows))
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        write_state(self._state, self.key, {**state(), "done": done, "digests": digests})
        self.done, self._saved = done, time.monotonic()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.numpy().reshape(-1).view("u1").data


def _checksum(state: dict[str, Any]) -> str:
    """Of everything that a proof is made from."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    rest = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return "".join(hash_tensors([t]) for t in tensors) + repr(sorted(rest.items()))


def write_state(path: Path, key: str, state: dict[str, Any]) -> None:
    """Tensors and plain data under a key, with a checksum."""
    kept = {"key": key, "checksum": _checksum(state), **state}
    write_atomically(path, lambda file: torch.save(kept, file))


def _read(path: Path, key: str, device: torch.device) -> dict[str, Any]:
    try:
        state: dict[str, Any] = read_tensors(path, device)
        theirs, checksum = state.pop("key"), state.pop("checksum")
        intact = checksum == _checksum(state)
    except Exception as error:  # torch raises many types for a damaged file
        raise ValueError(f"folder: {path} cannot be read: {first_line(error)}") from error
    if theirs != key:
        raise ValueError(f"folder: {path} belongs to another problem; use another folder")
    if not intact:
        raise ValueError(f"folder: {path} has been changed since it was written (checksum)")
    return state
