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
    numbers 0 to N - 1 in the order in which they come first.
    """

    batches: list[Tensor]

    def __post_init__(self) -> None:
        """Compare the inputs, by content."""
        grouping = Grouping()
        for x in self.batches:
            grouping.add(x)
        self.group = grouping.index()
        self.first = firsts(self.group)  # sample of each distinct input, [N]

    @property
    def n(self) -> int:
        """Of all samples."""
        return len(self.group)

    @property
    def distinct(self) -> int:
        """N."""
        return len(self.first)

    @cached_property
    def repeated(self) -> list[list[int]]:
        """The groups of more than one sample."""
        return repeated(self.group)

    @cached_property
    def representatives(self) -> list[Tensor]:
        """Of each group its first sample, in batches."""
        if self.distinct == self.n:
            return self.batches
        kept = torch.zeros(self.n, dtype=torch.bool, device="cpu")
        kept[self.first] = True
        parts = kept.split([len(x) for x in self.batches])
        return [
            x if bool(part.all()) else x[part.to(x.device)]
            for x, part in zip(self.batches, parts, strict=True)
            if bool(part.any())
        ]

    def rows(self, index: Tensor) -> Tensor:
        """The inputs of the samples `index`, as the model is fed."""
        starts = torch.tensor([0, *(len(x) for x in self.batches)], device="cpu").cumsum(0)
        batch = torch.bucketize(index, starts[1:], right=True)
        rows = [self.batches[int(b)][int(i - starts[b])] for b, i in zip(batch, index, strict=True)]
        return torch.stack(rows)

    def disagreeing(self, targets: list[Tensor] | None) -> int | None:
        """Groups whose targets [n, ...] are not all equal; None where there are no targets."""
        if targets is None:
            return None
        y = torch.cat([part.cpu() for part in targets])
        differs = (y != y[self.first[self.group]]).reshape(self.n, -1).any(1)
        return len(self.group[differs].unique())
