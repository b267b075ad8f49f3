"""Groups of equal inputs: samples that no model can tell apart, found by content."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from ..core.arrays import as_data, require_finite
from .calling import is_several, pack

CHUNK = 4096  # samples at a time


class Grouping:
    """Numbers of groups of equal inputs, for samples that come batch by batch.

    Two inputs are equal where they are the same real numbers in the same places: of one shape and
    dtype, -0.0 equal to 0.0, as the theorem speaks of functions of real numbers. An input with a
    NaN is equal to nothing, itself included, and no theorem speaks of it: ValueError, as for an
    infinity. What is compared is what is given; a cast (float64 data that a float32 model is fed)
    comes before. Equal is equal in SHA-256 of the bytes, which processors have instructions for.
    """

    def __init__(self) -> None:
        """No samples yet."""
        self._numbers: dict[bytes, int] = {}
        self._index: list[int] = []

    def add(self, x: Tensor) -> None:
        """More samples, [b, ...]; ValueError where one has a NaN or an infinity."""
        require_finite(x, "x", "input", list(range(len(self._index), len(self._index) + len(x))))
        form = hashlib.sha256(f"{x.dtype} {tuple(x.shape[1:])}".encode())
        for part in x.detach().split(CHUNK) if len(x) else ():
            part = part.cpu().reshape(len(part), -1)
            if part.is_floating_point() or part.is_complex():
                part = part + 0.0  # -0.0 becomes 0.0
            for row in part.contiguous().view(torch.uint8).numpy():
                content = form.copy()
                content.update(row)
                number = self._numbers.setdefault(content.digest(), len(self._numbers))
                self._index.append(number)

    def index(self) -> Tensor:
        """The number of each sample's group, int64 [n]: 0 to N - 1 in order of first appearance."""
        return torch.tensor(self._index, dtype=torch.int64, device="cpu")


def groups_of(inputs: Any) -> Tensor:
    """The number of each sample's group of equal inputs; see `Grouping` for what equal means.

    inputs: a tensor or array [n, ...], or a dict or tuple of them for a model of several inputs
    (equal where all of them are). Returns int64 [n] on the CPU, 0 to N - 1 in order of first
    appearance: N distinct inputs. Raises ValueError for NaN or infinity and for inputs of several
    lengths, TypeError for what is no array.
    """
    x = pack(inputs, "x")[0] if is_several(inputs) else as_data(inputs, name="x")
    if x.dim() == 0:
        raise ValueError("x: expected inputs with a sample dimension, got a scalar")
    grouping = Grouping()
    grouping.add(x)
    return grouping.index()


def firsts(groups: Tensor) -> Tensor:
    """Of `groups_of`'s numbers the first sample of each group: int64 [N], increasing."""
    count = int(groups.max()) + 1 if len(groups) else 0
    last = torch.full((count,), len(groups), device="cpu")  # whatever the default device
    return last.scatter_reduce_(0, groups, torch.arange(len(groups), device="cpu"), "amin")


def repeated(groups: Tensor) -> list[list[int]]:
    """Of `groups_of`'s numbers the groups of two samples or more, as lists of their indices."""
    order = groups.argsort(stable=True)
    parts = order.split(groups.bincount().tolist())
    return [part.tolist() for part in parts if len(part) > 1]
