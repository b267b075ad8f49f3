"""Files that a kill never leaves half written, and that lie in the folder where they belong."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call write(file) on a temporary file beside `path`, flush it to disk, and rename it.

    A symbolic link of either name is replaced, not followed. Raises OSError where writing fails (a
    full disk): `path` is as it was, the temporary file is gone.
    """
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def inside(folder: Path, name: str) -> Path:
    """folder / name; ValueError where ".." or a symbolic link leads out of the folder.

    `folder` itself may be a link.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path}: leads out of {folder}, to {path.resolve()}")
    return path


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write these columns of the rows as CSV, atomically (empty cell: None)."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda file: file.write(out.getvalue().encode()))


def write_json(path: Path, value: Any) -> None:
    """Write plain data as JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


class FolderLock:
    """One process at a time writes into a folder; a process that ends, however, holds no lock.

    The lock is on the file "lock" in the folder, which stays there empty. Systems without flock are
    not protected.
    """

    def __init__(self, folder: Path) -> None:
        """Not held yet."""
        self._path = folder / "lock"
        self._file: BinaryIO | None = None

    def acquire(self) -> bool:
        """Take the lock, or keep it; False where another run has it."""
        if fcntl is None or self._file is not None:
            return True
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # no link leads out of the folder
        file = os.fdopen(os.open(self._path, flags, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        self._file = file
        return True

    def release(self) -> None:
        """Give the lock up, where it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None
