"""Samples of several outputs: which of them count, and their targets."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...model.losses import (
    IGNORED,
    ConvexLoss,
    SoftmaxLoss,
    WeightedLoss,
    counting,
    prepare_targets,
)
from ...model.weighted import packed


class Rows:
    """n samples of `each` outputs, rows: one, or a token's or pixel's each.

    kept: numbers of the rows whose label counts, None where all do. form: the dimension of the
    model's outputs (`calling.serve`).
    """

    def __init__(self, name: str, n: int) -> None:
        """One row a sample, until the model is known. name: for errors."""
        self.name, self.n = name, n
        self.each, self.outputs = 1, 0
        self.form: int | None = None
        self.kept: Tensor | None = None
        self.weighted = False  # whether targets carry the weights of their samples
        self._counts: Tensor | None = None  # of each sample, its rows that count

    def keep(self, counts: Tensor) -> None:
        """counts: which rows do, bool [n each]; ValueError where none does."""
        if not bool(counts.any()):
            also = " or of weight 0" if self.weighted else ""
            raise ValueError(f"{self.name}: expected a label that counts, all are {IGNORED}{also}")
        if not bool(counts.all()):
            self.kept, self._counts = counts.nonzero()[:, 0], counts.view(-1, self.each).sum(1)

    @property
    def rows(self) -> int:
        """Outputs that count, n where a sample has one."""
        return self.n * self.each if self.kept is None else len(self.kept)

    def count(self, index: Tensor) -> int:
        """Rows that count of the samples `index`."""
        if self._counts is None:
            return len(index) * self.each
        return int(self._counts[index].sum())

    def counted(self, y: Tensor) -> Tensor | slice:
        """Which rows of targets as they are fetched count; all of them without looking."""
        if self.kept is None:
            return slice(None)
        return y[:, -1] > 0 if self.weighted else y != IGNORED

    def samples_of(self, rows: Tensor) -> Tensor:
        """Whose the rows are, by their numbers among those that count."""
        numbers = rows if self.kept is None else self.kept[rows]
        return numbers // self.each

    def of_rows(self, groups: Tensor) -> Tensor:
        """Groups of equal rows that count, from those of equal samples [n]."""
        rows = (groups[:, None] * self.each + torch.arange(self.each, device="cpu")).flatten()
        return rows if self.kept is None else rows[self.kept].unique(return_inverse=True)[1]

    def targets_of(self, loss: ConvexLoss, y: Tensor, indices: list[int] | None = None) -> Tensor:
        """Targets of some samples for `loss`: [b, ...], or [b, each, ...]."""
        if y.is_complex():
            raise TypeError(f"{self.name}: expected real targets, got {y.dtype}")
        if self.form is not None and y.dim() > 1 + (self.form > 0):
            y = y.movedim(self.form, -1) if self.form and y.numel() > len(y) * self.each else y
            y = y.reshape(len(y), -1) if self.form == 0 else y
        if self.each == 1:
            return _marked(loss, prepare_targets(loss, y, self.outputs, self.name, indices))
        b, shape = len(y), list(y.shape)
        if y.numel() not in (b * self.each, b * self.each * self.outputs):
            raise ValueError(
                f"{self.name}: expected a target for each of the {self.each} outputs of a sample, "
                f"[n, {self.each}], got {shape}"
            )
        y = y.reshape(b * self.each, *([] if y.numel() == b * self.each else [self.outputs]))
        y = prepare_targets(loss, y, self.outputs, self.name, _Owners(indices, self.each))
        return _marked(loss, y).unflatten(0, (b, self.each))

    def with_weights(self, y: Tensor, c: Tensor | None) -> Tensor:
        """Targets as of `targets_of` with the weights of their samples (`model/weighted.py`).

        c: [b], or [b, ...] of each of a sample's outputs. ValueError for another shape.
        """
        if not self.weighted or c is None:
            return y
        if c.numel() not in (len(y), len(y) * self.each):
            raise ValueError(
                f"{self.name}: expected a weight for each sample, or each of its {self.each} "
                f"outputs, got weights of shape {list(c.shape)}"
            )
        rows = self.by_row(y)
        own = c.reshape(len(y), -1).expand(len(y), self.each).flatten().to(y.device)
        found = packed(rows, own)
        return found if self.each == 1 else found.unflatten(0, (len(y), self.each))

    def unweighted(self, y: Tensor) -> Tensor:
        """Rows of targets alone."""
        return y[:, :-1] if self.weighted else y

    def by_row(self, y: Tensor) -> Tensor:
        """Targets of samples, [b, ...] or [b, each, ...], row by row."""
        return y if self.each == 1 else y.flatten(0, 1)


class _Owners(Sequence[int]):
    """Whose the rows of some samples are; indices: the samples' numbers, None for all."""

    def __init__(self, indices: Sequence[int] | None, each: int) -> None:
        self.indices, self.each = indices, each

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: Any) -> Any:
        sample = row // self.each
        return sample if self.indices is None else self.indices[sample]


def _marked(loss: ConvexLoss, y: Tensor) -> Tensor:
    """Labels that the loss ignores as IGNORED, whatever its own is."""
    return y if bool(counting(loss, y).all()) else torch.where(counting(loss, y), y, IGNORED)


def rows_that_count(loss: ConvexLoss, y: Tensor) -> Tensor:
    """Of targets in rows, bool [n]: those whose label is not IGNORED, and whose weight is not 0."""
    if isinstance(loss, WeightedLoss):
        return counting(loss, y)
    labels = isinstance(loss, SoftmaxLoss) and not y.is_floating_point()
    return y != IGNORED if labels else torch.ones(len(y), dtype=torch.bool, device=y.device)
