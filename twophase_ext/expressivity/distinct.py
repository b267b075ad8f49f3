"""The inputs that a verification is about, and one of each group of equal ones.

Equal inputs have equal rows of h_X, for every w: the condition is about the N distinct ones, X'.
What is bounded and proved is about one row for each of them; the model itself is run on all samples
(agreement.py), and samples go by their own numbers wherever they are named.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..model.groups import Grouping, firsts, repeated


@dataclass
class Inputs:
    """batches: inputs [b, ...] in index order as the model is fed. group [n]: of equal inputs,
    numbers in the order in which they come first.

    each: outputs of a sample, rows of M: 1, or those of its tokens or pixels, of which the numbers
    `kept` (ascending, of n each) count; None for all. Rows of equal inputs are equal.
    """

    batches: list[Tensor]
    each: int = 1
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        """Compare the inputs, by content."""
        grouping = Grouping()
        for x in self.batches:
            grouping.add(x)
        self.group = grouping.index()
        self.first = firsts(self.group)  # sample of each distinct input
        self.places: Tensor | None = None  # of the rows of M, among those of distinct inputs
        if self.kept is not None:
            sample, place = self.kept // self.each, self.kept % self.each
            self.places = (self.group[sample] * self.each + place).unique()

    @property
    def n(self) -> int:
        """Of all samples."""
        return len(self.group)

    @property
    def rows(self) -> int:
        """Of all samples, those that count."""
        return self.n * self.each if self.kept is None else len(self.kept)

    @property
    def distinct(self) -> int:
        """N, the rows of M."""
        return len(self.first) * self.each if self.places is None else len(self.places)

    def rows_of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(numbers in M, places in a batch's output) of the rows of the samples `index`."""
        place = torch.arange(self.each, device="cpu")
        rows = (self.group[index][:, None] * self.each + place).flatten()
        if self.places is None or self.kept is None:
            return rows, torch.arange(len(rows), device="cpu")
        own = (index[:, None] * self.each + place).flatten()
        counts = torch.isin(own, self.kept)
        return torch.searchsorted(self.places, rows[counts]), counts.nonzero()[:, 0]

    @property
    def names(self) -> Tensor:
        """What the rows of M are called: the number of the first sample, or of its output."""
        own = torch.arange(self.distinct, device="cpu") if self.places is None else self.places
        return self.first[own // self.each] * self.each + own % self.each

    @cached_property
    def repeated(self) -> list[list[int]]:
        """The groups of more than one sample."""
        return repeated(self.group)

    @cached_property
    def representatives(self) -> list[Tensor]:
        """Of each group its first sample, in batches."""
        if len(self.first) == self.n:
            return self.batches
        kept = torch.zeros(self.n, dtype=torch.bool, device="cpu")
        kept[self.first] = True
        parts = kept.split([len(x) for x in self.batches])
        return [
            x if bool(part.all()) else x[part.to(x.device)]
            for x, part in zip(self.batches, parts, strict=True)
            if bool(part.any())
        ]

    def inputs_of(self, index: Tensor) -> Tensor:
        """The inputs of the samples `index`, as the model is fed."""
        starts = torch.tensor([0, *(len(x) for x in self.batches)], device="cpu").cumsum(0)
        batch = torch.bucketize(index, starts[1:], right=True)
        rows = [self.batches[int(b)][int(i - starts[b])] for b, i in zip(batch, index, strict=True)]
        return torch.stack(rows)

    def disagreeing(self, targets: list[Tensor] | None) -> int | None:
        """Rows of M whose targets are not all equal; None where there are no targets.

        targets: of all rows of all samples.
        """
        if targets is None:
            return None
        y = torch.cat([part.cpu() for part in targets])
        place = torch.arange(self.each, device="cpu")
        row = (self.group[:, None] * self.each + place).flatten()
        if self.kept is not None:
            y, row = y[self.kept], row[self.kept].unique(return_inverse=True)[1]
        differs = (y != y[firsts(row)[row]]).reshape(len(y), -1).any(1)
        return len(row[differs].unique())
