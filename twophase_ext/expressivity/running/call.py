"""One application of an operator, as a rule sees it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...linalg.bounds import SLACK
from ..bounded import refuse
from .notes import Notes
from .operand import HUGE, Operand, together


class Pass(Protocol):
    """What a rule may ask of the pass that it is in."""

    samples: int
    norms: dict[Any, Any]
    assumed: set[str]
    notes: Notes
    fresh: set[int]

    def depends(self, tensor: Tensor) -> bool:
        """Whether its storage holds samples' numbers."""
        ...

    def is_made(self, tensor: Tensor) -> bool:
        """Whether its numbers are made of neither weights nor samples."""
        ...

    def note_made(self, tensors: list[Tensor], *, exact: bool) -> None:
        """Constants of neither weights nor samples."""
        ...

    def decides(self, tensor: Tensor) -> bool:
        """Whether its numbers are samples' real numbers, or integers that hang on such."""
        ...

    def operand(self, tensor: Tensor) -> Operand:
        """A tensor with what is known of it."""
        ...


@dataclass
class Result:
    """What an operator made: whose its numbers are (as of Operand), and how far off, by sample."""

    value: Tensor
    dim: int | None
    ids: Tensor | None
    error: Tensor
    huge: bool = False
    norm: Tensor | None = None  # of the value, where it is known


class Call:
    """The operator's arguments by name, its results, and the unit roundoff of its arithmetic."""

    def __init__(
        self,
        owner: Pass,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        outs: list[Tensor],
    ) -> None:
        """outs: the tensors that it made or wrote."""
        self.owner, self.outs, self.out = owner, outs, outs[0]
        self.func, self.name = func, func._schema.name
        self.given: dict[str, Any] = {}
        for k, argument in enumerate(func._schema.arguments):
            default = argument.default_value if argument.has_default_value() else None
            self.given[argument.name] = (
                args[k] if k < len(args) else kwargs.get(argument.name, default)
            )
        floating = self.out.dtype in (torch.float64, torch.float32)
        self.u = torch.finfo(self.out.dtype).eps / 2 if floating else 0.0

    def swap(self, old: dict[int, Tensor]) -> None:
        """What was written, by what it was before: id -> that."""
        for name, value in self.given.items():
            if isinstance(value, Tensor):
                self.given[name] = old.get(id(value), value)
            elif isinstance(value, list | tuple):
                self.given[name] = [old.get(id(v), v) for v in value]

    def __getitem__(self, name: str) -> Any:
        """The argument of this name, its default where it was not given; None without one."""
        return self.given.get(name)

    def operand(self, name: str, *, masks: bool = False) -> Operand:
        """A tensor argument with what is known of it. masks: whether huge numbers are welcome."""
        return self.known(self.given[name], masks=masks)

    def known(self, tensor: Tensor, *, masks: bool = False) -> Operand:
        """The same of any tensor among the arguments."""
        found = self.owner.operand(tensor)
        if not tensor.is_floating_point() and not found.exact:
            refuse("it decides by numbers that are rounded")
        if not masks and tensor.is_floating_point():
            if not found.huge and found.constant and tensor.numel():
                found.huge = bool(torch.linalg.vector_norm(tensor, math.inf) >= HUGE)
            if found.huge:
                refuse("an operand may hold masks")
        return found

    def gamma(self, terms: float) -> float:
        """k u / (1 - k u), rounded up."""
        return terms * self.u / (1 - terms * self.u) * SLACK

    def made(self, dim: int | None, ids: Tensor | None, out: Tensor | None = None) -> Operand:
        """The result as an operand, for its norms."""
        zero = torch.zeros(1, dtype=torch.float64)
        return Operand(self.out if out is None else out, dim, ids, zero, self.owner.samples)

    def broadcast(self, *operands: Operand) -> list[Operand]:
        """As they meet in the result."""
        beside = together(operands, self.out.shape)
        return [operand.expanded(self.out.shape, beside) for operand in operands]

    def elementwise(
        self, operands: Sequence[Operand], error: Tensor, rounding: float = 0.0, huge: bool = False
    ) -> list[Result]:
        """The result of operands that are broadcast: error, and `rounding` u of |result|."""
        dim, ids = together(operands, self.out.shape)
        if not (rounding and self.u):
            return [Result(self.out, dim, ids, error, huge)]
        made = self.made(dim, ids)
        made.huge = huge
        error = error + rounding * self.u * made.norm
        return [Result(self.out, dim, ids, error, huge, None if huge else made.norm)]

    def zeros(self, *operands: Operand) -> Tensor:
        """No error, [b] or [1]."""
        constant = all(operand.constant for operand in operands)
        return torch.zeros(1 if constant else self.owner.samples, dtype=torch.float64)
