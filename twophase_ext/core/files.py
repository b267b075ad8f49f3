"""Files that a kill never leaves half written, and that lie in the folder where they belong."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch


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


def read_numbers(path: Path) -> list[dict[str, float]]:
    """Rows of a CSV file, numbers as floats, every other cell left out. FileNotFoundError."""
    found = []
    for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        numbers = {}
        for key, value in row.items():
            try:
                numbers[key] = float(value)
            except (TypeError, ValueError):  # TypeError: more or fewer cells than columns
                continue
        found.append(numbers)
    return found


def read_tensors(source: Any, device: Any = None) -> Any:
    """What torch.save wrote of tensors and plain data, on `device` or where it was.

    Nothing that the file brings is run: torch.load's weights_only. Raises errors of many types for
    what is damaged.
    """
    return torch.load(source, map_location=device, weights_only=True)  # noqa: TID251  this place
