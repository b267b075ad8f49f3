"""What samples consist of: inputs, targets, weights; told apart, checked, hashed."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.arrays import as_data, sample_weights
from ...core.collated import told_apart
from ...core.hashing import flat
from ...model.calling import Packing, is_several, pack
from ...model.groups import Grouping
from ...model.labels import Classes, as_text
from ...model.losses import ConvexLoss, SoftmaxLoss


class Content:
    """A hash of samples in index order, however they are batched, and groups of equal inputs.

    dtype: inputs are equal that are equal in it. classes: what the targets number, text.
    """

    def __init__(self, dtype: torch.dtype, classes: Classes | None = None) -> None:
        """Of no sample yet."""
        self._parts = [hashlib.sha256() for _ in range(3)]
        if classes is not None:
            self._parts[1].update(repr(classes).encode())
        self._dtype, self.grouping = dtype, Grouping()

    def add(self, x: Tensor, y: Tensor, c: Tensor | None = None) -> None:
        """More samples, with their weights."""
        self.grouping.add(x.to(self._dtype) if x.is_floating_point() else x)
        for part, t in zip(self._parts, (x, y, c), strict=True):
            if t is not None:
                part.update(flat(t).view(torch.uint8).numpy().data)

    def digest(self, *, weighted: bool = False) -> str:
        """Of inputs and targets, and of the weights where they count."""
        return " ".join(part.hexdigest() for part in self._parts[: 3 if weighted else 2])


def parts_of(
    batch: Any, indices: list[int], name: str, dtype: torch.dtype, packing: Packing | None
) -> tuple[Tensor, Tensor, Tensor | None, Packing | None]:
    """x, y, weights (None without) and packing of the collated samples `indices`.

    packing: that of earlier ones. ValueError where the parts cannot be told, or are not those of
    so many samples; TypeError for targets that are text: which classes there are would be known at
    the end alone.
    """
    x, y, c = told_apart(batch, name)
    if as_text(y) is not None:
        raise TypeError(
            f"{name}: labels that are text are taken as one array, (x, y); let the dataset give "
            "numbers"
        )
    if is_several(x):
        x, found = pack(x, name)
        if packing is not None and found != packing:
            raise ValueError(
                f"{name}: expected inputs of the shapes and types of the first ones, "
                f"{packing.shapes} {packing.dtypes}, got {found.shapes} {found.dtypes}; pad all "
                "samples to one length"
            )
        packing = found
    x, y = (as_data(part, name=name) for part in (x, y))
    for part, what in ((x, "inputs"), (y, "targets")):
        if part.dim() == 0 or len(part) != len(indices):
            got = f"of shape {list(part.shape)}" if part.dim() == 0 else f"for {len(part)}"
            raise ValueError(
                f"{name}: expected {what} for {len(indices)} samples from the collate function, "
                f"got {what} {got}: one that adds or drops samples, or lists numbers by column, "
                "has to do so in the dataset (Hugging Face's: with_format('torch'))"
            )
    if c is not None:
        c = own_memory(sample_weights(c, len(indices), name, dtype, indices))
    return x, own_memory(y), c, packing


class Seen:
    """Whether each of n samples is what it was whenever it is fetched again."""

    def __init__(self, n: int) -> None:
        """None has been fetched."""
        self._hashes = np.zeros((n, 2), np.int64)  # of each sample: its form, and a hash of it

    def changed(self, parts: list[Tensor], indices: list[int]) -> int | None:
        """The first of these samples that was another one; forms differ where batches are padded.

        parts: inputs, targets and, if any, weights of the samples `indices`.
        """
        form = hash(tuple((part.shape[1:], part.dtype) for part in parts)) | 1
        rows = [_bytes_of_rows(part) for part in parts]
        for i, *own in zip(indices, *rows, strict=True):
            known, value = self._hashes[i].tolist(), hash(tuple(own))
            if known[0] == form and known[1] != value:
                return i
            self._hashes[i] = form, value
        return None


def product(c: Tensor | None, drawn: Tensor | None, name: str, dtype: torch.dtype) -> Tensor | None:
    """Samples' own weights [n, ...] times those with which they are drawn [n]; None of neither."""
    if c is None or drawn is None:
        return drawn if c is None else c
    both = c * drawn.reshape(-1, *[1] * (c.dim() - 1))
    return sample_weights(both, len(both), name, dtype)


def check_classes(classes: Classes, loss: ConvexLoss, outputs: int, name: str) -> None:
    """ValueError where labels that are text do not fit the loss, or the network's outputs."""
    if not isinstance(loss, SoftmaxLoss):
        raise ValueError(
            f"{name}: the labels are text, {classes[0]!r}, which {loss.name} does not take; "
            "cross-entropy does"
        )
    if len(classes) > outputs:
        shown = ", ".join(map(repr, classes[:5])) + (", ..." if len(classes) > 5 else "")
        raise ValueError(
            f"{name}: {len(classes)} classes, {shown}, where the last layer has {outputs} outputs"
        )


def _bytes_of_rows(x: Tensor) -> list[bytes]:
    """The bytes of each sample."""
    if x[0].numel() == 0:
        return [b""] * len(x)
    rows = x.cpu().contiguous().reshape(len(x), -1).view(torch.uint8).numpy()
    return [row.tobytes() for row in rows]


def own_memory(x: Tensor) -> Tensor:
    """The tensor; a copy where its memory is shared with a worker: an open file for each."""
    return x.clone() if x.is_shared() else x


def check_length(name: str, n: int, n_targets: int) -> None:
    """ValueError for other numbers of inputs and targets, and for no sample."""
    if n != n_targets:
        raise ValueError(f"{name}: expected as many targets as inputs ({n}), got {n_targets}")
    if n == 0:
        raise ValueError(f"{name}: the data set is empty")


def check_range(x: Tensor, name: str, dtype: torch.dtype) -> None:
    """ValueError for finite inputs that are not so in `dtype`."""
    largest, wide = torch.finfo(dtype).max, x.dtype is torch.float64 and x.numel() > 0
    if wide and float(torch.stack(x.aminmax()).abs().max()) > largest:
        raise ValueError(f"{name}: expected inputs within {dtype}'s range, up to {largest:.3g}")


def check_augmented(changed: Any, x: Tensor) -> None:
    """ValueError where `augment` returned no tensor like x."""
    if not isinstance(changed, Tensor) or changed.shape != x.shape or changed.dtype != x.dtype:
        got = changed if isinstance(changed, Tensor) else None
        found = type(changed).__name__ if got is None else f"{list(got.shape)} {got.dtype}"
        raise ValueError(f"augment: expected {list(x.shape)} {x.dtype}, got {found}")
