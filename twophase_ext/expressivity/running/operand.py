"""Operands of an operator: values, whose they are, and how far off, with norms by sample."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ...linalg.bounds import SLACK, gamma
from ..bounded import refuse

HUGE = 1e100  # beyond it a number is a mask's


class Operand:
    """A tensor with what is known of it.

    value: as it is. dim: along which samples change, None where all is one sample's or a constant.
    ids: whose each index along dim is. error: [b], or [1] of a constant, for the whole storage.
    """

    def __init__(
        self,
        value: Tensor,
        dim: int | None,
        ids: Tensor | None,
        error: Tensor,
        samples: int,
        huge: bool = False,
        sizes: dict[str, Tensor] | None = None,
    ) -> None:
        """ids None: a constant. sizes: of the storage; this tensor's, where it shows all of it."""
        self.value, self.dim, self.ids, self.samples = value, dim, ids, samples
        self.huge = huge
        self.source: tuple[Operand, float] | None = None  # what it repeats, how often for a sample
        # numbers that an expanded view shows several times
        times = math.prod(
            n for n, s in zip(value.shape, value.stride(), strict=True) if s == 0 and n > 1
        )
        if value.numel() and not times > 1 and _overlaps(value):
            times = _overlaps(value)
        self.error = error * math.sqrt(times) * SLACK if times > 1 else error
        storage = value.untyped_storage().nbytes()
        whole = times <= 1 and value.numel() * value.element_size() == storage and not huge
        self.sizes = sizes if sizes is not None and whole else {}

    @property
    def constant(self) -> bool:
        """Whether it is no sample's."""
        return self.ids is None

    @property
    def exact(self) -> bool:
        """Whether it has no error at all."""
        return not bool(self.error.any())

    def by_sample(self, rows: Tensor, how: str) -> Tensor:
        """[b], or [1] of a constant: rows [len(ids)] added up or their largest, or least."""
        if self.ids is None or self.dim is None:
            return rows.reshape(1) if self.ids is None else rows.reshape(1).expand(self.samples)
        if how == "sum":
            return rows.new_zeros(self.samples).index_add_(0, self.ids, rows)
        start = -math.inf if how == "amax" else math.inf
        found = rows.new_full((self.samples,), start)
        return found.scatter_reduce_(0, self.ids, rows, how)

    def rows(self, value: Tensor | None = None) -> Tensor:
        """[len(ids), numbers]: what belongs to each index along dim; [1, numbers] without one."""
        value = self.value if value is None else value
        if self.dim is None:
            return value.reshape(1, -1)
        return value.movedim(self.dim, 0).reshape(value.shape[self.dim], -1)

    def _norms(self, value: Tensor, order: float) -> Tensor:
        """[len(ids)], or 0-d without a dim: norms of what `rows` has, which need not be copied."""
        others = [d for d in range(value.dim()) if d != self.dim]
        if not others and self.dim is not None:
            return value.abs()
        return torch.linalg.vector_norm(value, order, dim=others or None)

    def _known(self, what: str, compute: Callable[[], Tensor]) -> Tensor:
        if what not in self.sizes:
            self.sizes[what] = compute()
        return self.sizes[what]

    @property
    def norm(self) -> Tensor:
        """Upper bounds of the 2-norm, by sample; huge numbers are left out."""
        return self._known("norm", self._norm)

    def _norm(self) -> Tensor:
        if self.source is not None:
            return self.source[0].norm * math.sqrt(self.source[1]) * SLACK
        value = self.value.double()
        if self.huge:
            value = torch.where(value.abs() >= HUGE, 0.0, value)
        norms = self._norms(value, 2)
        size = self.value.numel()
        if self.dim is not None:
            norms = self.by_sample(norms.square(), "sum").sqrt()
        else:
            norms = self.by_sample(norms, "sum")
        # squares below 2^-1022 may vanish
        return (norms * (1 + gamma(size + 8)) + math.sqrt(size) * 2.0**-510) * SLACK

    @property
    def largest(self) -> Tensor:
        """The largest absolute value, by sample."""
        return self._known("largest", self._largest)

    def _largest(self) -> Tensor:
        if self.source is not None:
            return self.source[0].largest
        return self.by_sample(self._norms(self.value.double(), math.inf), "amax")

    @cached_property
    def least(self) -> Tensor:
        """The least value, by sample."""
        rows = self.rows().double()
        return self.by_sample(rows.amin(1) if self.dim is not None else rows.amin(), "amin")

    @cached_property
    def least_size(self) -> Tensor:
        """The least absolute value, by sample."""
        rows = self.rows().double().abs()
        return self.by_sample(rows.amin(1) if self.dim is not None else rows.amin(), "amin")

    def expanded(
        self, shape: Sequence[int], beside: tuple[int | None, Tensor | None] = (None, None)
    ) -> "Operand":
        """As broadcast to `shape`. beside: (dim, ids) of samples' numbers that it meets there.

        Of a constant that is the same along dim a sample meets its own share alone.
        """
        if tuple(shape) == tuple(self.value.shape):
            return self
        times = math.prod(shape) / max(self.value.numel(), 1)
        dim = None if self.dim is None else self.dim + len(shape) - self.value.dim()
        share = 1.0
        place, ids = beside
        if self.ids is None and place is not None and ids is not None:
            own = place - (len(shape) - self.value.dim())
            if own < 0 or self.value.shape[own] == 1:
                share = len(ids) / int(ids.bincount().max())
        value, error, times = self.value.expand(tuple(shape)), self.error, times / share
        found = Operand.__new__(Operand)
        found.value, found.dim, found.ids, found.samples = value, dim, self.ids, self.samples
        found.huge, found.sizes = self.huge, {}
        found.error = error * math.sqrt(times) * SLACK if times > 1 else error
        found.source = self, times
        if self.dim is None and self.ids is not None and self.samples > 1:
            refuse("it takes one sample of a batch")
        return found


def _overlaps(value: Tensor) -> int:
    """At most how often a view shows one number of its storage, where windows overlap; else 1."""
    strides = sorted(
        (s, n) for n, s in zip(value.shape, value.stride(), strict=True) if n > 1 and s > 0
    )
    times, reach = 1, 0
    for stride, size in strides:
        if stride <= reach:  # this dimension's steps fall within what smaller ones span
            times *= min(size, -(-(reach + 1) // stride))
        reach += (size - 1) * stride
    return times


def together(operands: Sequence[Operand], shape: Sequence[int]) -> tuple[int | None, Tensor | None]:
    """(dim, ids) of what operands make, broadcast to `shape`; Unbounded where they do not agree."""
    dim: int | None = None
    ids: Tensor | None = None
    for operand in operands:
        if operand.ids is None:
            continue
        own = None if operand.dim is None else operand.dim + len(shape) - operand.value.dim()
        if ids is None:
            dim, ids = own, operand.ids
        elif own != dim or not torch.equal(ids, operand.ids):
            refuse("it brings different samples together")
    return dim, ids
