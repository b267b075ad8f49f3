"""What samples hold: a hash of them all, groups of equal ones, the bytes of each."""

import hashlib

import torch
from torch import Tensor

from ...core.hashing import flat
from ...model.groups import Grouping


class Content:
    """A hash of samples in index order, however they are batched, and groups of equal inputs.

    dtype: inputs are equal that are equal in it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """Of no samples yet."""
        self._parts = hashlib.sha256(), hashlib.sha256()
        self._dtype, self.grouping = dtype, Grouping()

    def add(self, x: Tensor, y: Tensor) -> None:
        """The next samples."""
        self.grouping.add(x.to(self._dtype) if x.is_floating_point() else x)
        for part, t in zip(self._parts, (x, y), strict=True):
            part.update(flat(t).view(torch.uint8).numpy().data)

    def digest(self) -> str:
        """Of the inputs and of the targets."""
        return " ".join(part.hexdigest() for part in self._parts)


def bytes_of_rows(x: Tensor) -> list[bytes]:
    """The bytes of each sample."""
    if x[0].numel() == 0:
        return [b""] * len(x)
    flat = x.cpu().contiguous().reshape(len(x), -1).view(torch.uint8).numpy()
    return [row.tobytes() for row in flat]


def own_memory(x: Tensor) -> Tensor:
    """The tensor; a copy where its memory is shared with a worker: an open file for each."""
    return x.clone() if x.is_shared() else x
