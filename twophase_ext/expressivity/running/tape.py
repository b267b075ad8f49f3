"""What a pass did, step by step: what need not be computed, and where residual branches end."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .notes import Note


@dataclass(frozen=True)
class Made:
    """A result's geometry, and whose its numbers are."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    note: Note

    @staticmethod
    def of(value: Tensor, note: Note) -> "Made":
        """Of a result and its note."""
        return Made(tuple(value.shape), value.stride(), value.dtype, replace(note, thin=None))

    def blank(self, device: torch.device) -> Tensor:
        """A tensor of this geometry, whatever it holds: its memory is not touched."""
        size = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        flat = torch.empty(max(size, 0), dtype=self.dtype, device=device)
        return flat.as_strided(self.shape, self.stride)


@dataclass
class Step:
    """An operator that made, or wrote, numbers that depend on the samples.

    reads, writes: storages by their numbers (notes.py). weights: names of the parameters of an
    affine map. unread: storages that a factor of zeros makes irrelevant. made: its results, each
    tensor as what was Made; whole: no other way than by these do they matter.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    in_place: bool = True
    weights: tuple[str, ...] = ()
    unread: tuple[int, ...] = ()
    made: Any = None
    whole: bool = True


@dataclass
class Tape:
    """Steps by their place among all operators of the pass.

    decided: storages by which the pass went its way.
    """

    steps: dict[int, Step] = field(default_factory=dict)
    decided: set[int] = field(default_factory=set)

    def dead(self, wanted: int) -> frozenset[int]:
        """Steps without which the storage `wanted` holds the same numbers."""
        live, dead = {wanted, *self.decided}, set()
        for index, step in reversed(self.steps.items()):
            if step.whole and live.isdisjoint(step.writes):
                dead.add(index)
            else:
                live.update(set(step.reads) - set(step.unread))
        return frozenset(dead)

    def branches(self) -> Iterator[tuple[tuple[str, ...], bool]]:
        """(parameters of the last affine map, whether the shortcut has none) of residual branches.

        A residual sum has two operands that both depend on the samples. Its branch is the operand
        with more affine maps of its own, the other one the shortcut. Where operands are put side by
        side, as in dense blocks, each whose affine maps are those of another one and more is a
        branch beside an identity.
        """
        before: dict[int, int] = {}  # storage -> the steps that its numbers hang on, as bits
        weighted = {index: step.weights for index, step in self.steps.items() if step.weights}
        for index, step in self.steps.items():
            behind = [before.get(token, 0) for token in step.reads]
            if step.name in ("add", "sub") and len(behind) == 2:
                first, second = (
                    [k for k in weighted if (a & ~b) >> k & 1] for a, b in (behind, behind[::-1])
                )
                if len(first) != len(second):
                    longer, other = sorted((first, second), key=len, reverse=True)
                    yield weighted[max(longer)], not other
            if step.name == "cat" and behind:
                maps = [frozenset(k for k in weighted if bits >> k & 1) for bits in behind]
                base = min(maps, key=len)
                for own in maps:
                    if own > base:
                        yield weighted[max(own - base)], True
            total = 1 << index
            for bits in behind:
                total |= bits
            for token in step.writes:
                total |= before.get(token, 0) if step.in_place else 0
            for token in step.writes:
                before[token] = total
