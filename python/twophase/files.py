"""Inputs and targets from files of the user's: .npy, .npz and .csv."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twophase_ext.core.arrays import as_tensor
from twophase_ext.model.labels import Classes, as_targets

SUFFIXES = (".npy", ".npz", ".csv")


def read_inputs(x: str, y: str | None = None) -> Tensor:
    """The inputs [n, ...]: an array, the one named "x" or first of an .npz, columns of a .csv.

    y: where it names a column or an array of the same file, that is no input. ValueError, which
    names the argument, for other files, and for a column that holds other than numbers.
    """
    parts = _read(x, "x")
    if Path(x).suffix == ".csv":
        numbers = []
        for name, column in parts.items():
            if name == y:
                continue
            if column.dtype.kind != "f":
                raise ValueError(
                    f"x: expected numbers in column {name} of {x}, got {str(column[0])!r}; --y "
                    f"{name} where it is the target"
                )
            numbers.append(column)
        if not numbers:
            raise ValueError(f"x: {x} has no column of inputs")
        return torch.from_numpy(np.stack(numbers, 1)).float()
    return as_tensor(parts["x"] if "x" in parts else next(iter(parts.values())), name="x")


def read_targets(
    y: str | None, x: str, names: Classes | None = None
) -> tuple[Tensor, Classes | None]:
    """(targets, names of the labels where they are words): int64 [n], or float32 [n, ...].

    y: a file, or the name of a column (a number where the file has no header) or an array of `x`;
    by default the array "y" of an .npz. Whole numbers are labels. names: those that there are, by
    default the words in their order. ValueError, which names the argument.
    """
    file = y is not None and Path(y).suffix in SUFFIXES
    parts = _read(str(y), "y") if file else _read(x, "x")
    name = "y" if y is None or file else y
    if name in parts:
        values = parts[name]
    elif file and len(parts) == 1:
        values = next(iter(parts.values()))
    else:
        raise ValueError(
            f"y: expected a file ({', '.join(SUFFIXES)}) or a part of {x}, "
            f"{', '.join(parts) or 'which has none'}; got {y!r}"
        )
    if values.dtype.kind == "U":
        return as_targets(values, "y", names)
    found = as_tensor(values, name="y")
    if found.is_floating_point() and bool((found == found.round()).all()):
        found = found.long()
    return (found.float() if found.is_floating_point() else found.long()), None


def _read(path: str, name: str) -> dict[str, Any]:
    """The file's arrays, or columns, by name; those of a .csv are float64 or words."""
    try:
        if Path(path).suffix == ".csv":
            return _columns(path)
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                return {key: loaded[key] for key in loaded.files}
        return {"": loaded}
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: there is no file {path}") from None
    except Exception as error:  # NumPy, zipfile and zlib each raise their own types
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name}: {path} cannot be read as one of {SUFFIXES}: {reason}") from None


def _columns(path: str) -> dict[str, Any]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [[entry.strip() for entry in row] for row in csv.reader(file) if row]
    if not rows:
        raise ValueError("it is empty")
    widths = {len(row) for row in rows}
    if len(widths) > 1:
        raise ValueError(f"rows of {min(widths)} and of {max(widths)} entries")
    header = not any(_is_number(entry) for entry in rows[0])
    names = rows.pop(0) if header else [str(k) for k in range(len(rows[0]))]
    if len(set(names)) < len(names) or not rows:
        raise ValueError("a header of equal names" if rows else "a header and no row")
    columns = [list(column) for column in zip(*rows, strict=True)]
    return {
        name: np.array(column, dtype=float if all(map(_is_number, column)) else str)
        for name, column in zip(names, columns, strict=True)
    }


def _is_number(entry: str) -> bool:
    try:
        float(entry)
    except ValueError:
        return False
    return True
