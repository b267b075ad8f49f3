"""Labels that are text: each one's number in the sorted classes, and back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.arrays import as_data

Classes = tuple[str, ...]


def encode(
    y: Any, name: str, classes: Sequence[Any] | NDArray[Any] | None = None
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """(numbers of the labels y, of its shape; the classes, sorted, of its dtype).

    classes: known ones, sorted; ValueError that names the first label that is none of them.
    """
    labels = np.asarray(y)
    if classes is None:
        known, numbers = np.unique(labels, return_inverse=True)
        return numbers.reshape(labels.shape), known
    known = np.asarray(classes, dtype=labels.dtype if labels.dtype.kind == "O" else None)
    numbers = np.searchsorted(known, labels).clip(max=len(known) - 1)
    wrong = known[numbers] != labels
    if wrong.any():
        place = tuple(int(part[0]) for part in wrong.nonzero())
        shown = ", ".join(repr(part) for part in known[:5].tolist())
        raise ValueError(
            f"{name}: {labels[place].item() if labels.dtype.kind != 'O' else labels[place]!r} at "
            f"sample {place[0]} is no class of the training data, {shown}"
            f"{', ...' if len(known) > 5 else ''}"
        )
    return numbers, known


def decode(numbers: Tensor, classes: Sequence[Any] | NDArray[Any]) -> NDArray[Any]:
    """The labels of these numbers, an array of their shape."""
    return np.asarray(classes)[numbers.cpu().numpy()]


def as_text(y: Any) -> NDArray[Any] | None:
    """y as an array of text, None where it is none: arrays, lists, columns of a table.

    A look at its type, or at its first entry, where it is no array.
    """
    other = isinstance(y, Tensor | str | bytes | np.ma.MaskedArray)
    if other or (hasattr(y, "__dlpack__") and not isinstance(y, np.ndarray)):
        return None
    if not hasattr(y, "__array__"):
        first = y
        while isinstance(first, Sequence) and not isinstance(first, str | bytes) and len(first):
            first = first[0]
        if first is y or not (isinstance(first, str) or first is None):
            return None
        y = list(y)
    try:
        labels = np.asarray(y)
    except (ValueError, TypeError):  # ragged, or an array's own refusal
        return None
    if labels.dtype.kind == "T":
        labels = labels.astype(object)
    text = labels.dtype.kind == "U" or (
        labels.dtype.kind == "O" and any(isinstance(label, str) for label in labels.flat)
    )
    return labels if text else None


def as_targets(y: Any, name: str, classes: Classes | None = None) -> tuple[Tensor, Classes | None]:
    """Targets as a tensor; text as its numbers in the sorted classes, which come with it.

    classes: known ones. Raises as `as_data` and `encode`; TypeError where some labels are no text.
    """
    labels = as_text(y)
    if labels is None:
        return as_data(y, name=name), None
    for place, label in enumerate(labels.reshape(len(labels), -1) if labels.ndim else ()):
        if bad := [part for part in label if not isinstance(part, str)]:
            raise TypeError(f"{name}: expected text labels alone, got {bad[0]!r} at sample {place}")
    numbers, known = encode(labels.astype(str), name, classes)
    return torch.from_numpy(np.ascontiguousarray(numbers)), tuple(known.tolist())
