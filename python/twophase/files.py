"""Inputs and targets from files of the user's: .npy, .npz and .csv."""

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twophase_ext.core.arrays import as_tensor
from twophase_ext.model.labels import Classes, as_targets

SUFFIXES = (".npy", ".npz", ".csv")
UNEVEN = 100.0  # times the deviation of another column: a network would see but the larger one


def read_inputs(x: str, y: str | None = None) -> Tensor:
    """The inputs [n, ...]: an array, the one named "x" or first of an .npz, columns of a .csv.

    y: where it names a column or an array of the same file, that is no input. ValueError, which
    names the argument, for other files, and for a column that holds other than numbers.
    """
    parts = _read(x, "x")
    if Path(x).suffix == ".csv":
        numbers = {name: column for name, column in parts.items() if name != y}
        for name, column in numbers.items():
            if column.dtype.kind != "f":
                row, entry = next((k, e) for k, e in enumerate(column, 1) if not _is_number(e))
                what = f"got {str(entry)!r}" if entry else "it is empty"
                raise ValueError(
                    f"x: expected numbers in column {name} of {x}, in row {row} below the header "
                    f"{what}; --y {name} where it is the target"
                )
        if not numbers:
            raise ValueError(f"x: {x} has no column of inputs")
        _warn_of_sizes(numbers)
        return torch.from_numpy(np.stack(list(numbers.values()), 1)).float()
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
            f"y: expected a file ({', '.join(SUFFIXES)}) or a column or array of {x}, "
            f"{', '.join(parts) or 'which has none'}; got {y!r}"
        )
    if values.dtype.kind == "U":
        return as_targets(values, "y", names)
    found = as_tensor(values, name="y")
    if found.is_floating_point() and bool((found == found.round()).all()):
        found = found.long()
    return (found.float() if found.is_floating_point() else found.long()), None


def _warn_of_sizes(columns: dict[str, Any]) -> None:
    """Columns of very different deviations: what trains on them sees the largest alone."""
    spread = {name: float(column.std()) for name, column in columns.items()}
    spread = {name: size for name, size in spread.items() if size > 0}
    if spread and max(spread.values()) > UNEVEN * min(spread.values()):
        most, least = max(spread, key=spread.__getitem__), min(spread, key=spread.__getitem__)
        warnings.warn(
            f"x: column {most} varies by {spread[most]:.3g}, column {least} by "
            f"{spread[least]:.3g}: subtract each column's mean and divide by its standard "
            "deviation, or the network may learn from the largest alone",
            stacklevel=4,
        )


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
