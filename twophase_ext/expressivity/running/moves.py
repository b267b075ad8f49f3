"""Operators that only move numbers about, and those that make constants.

Where each number of the result comes from is asked of the operator itself: it moves the positions,
and whose they are, as it moves the numbers. (Views need no rule: the note is their storage's.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...linalg.bounds import SLACK
from ..bounded import refuse
from .call import Call, Result
from .operand import HUGE, Operand

Rule = Callable[[Call], list[Result]]
# what makes constants that are no function of rounding
EXACT = {
    *("zeros", "ones", "empty", "full", "eye", "scalar_tensor", "lift_fresh_copy"),
    *("empty_strided", "tensor", "_to_copy", "clone", "arange", "expand", "triu", "tril"),
}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for part in value for t in _tensors(part)]
    return []


def _replaced(value: Any, new: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    if isinstance(value, list | tuple):
        return type(value)(_replaced(part, new) for part in value)
    return value


def owner_of(operand: Operand) -> Tensor:
    """Whose each number of an operand is: -1 for a constant's."""
    shape = operand.value.shape
    if operand.ids is None:
        return torch.full(shape, -1)
    if operand.dim is None:
        return operand.ids.expand(shape).clone()
    view = [1] * len(shape)
    view[operand.dim] = -1
    return operand.ids.view(view).expand(shape).clone()


def dim_of(owners: Tensor, samples: int) -> tuple[int | None, Tensor | None]:
    """(dim, ids) of a tensor whose numbers' owners are these."""
    if samples == 1:
        return (
            (None, torch.zeros(1, dtype=torch.long)) if bool((owners >= 0).any()) else (None, None)
        )
    if not bool((owners >= 0).any()):
        return None, None
    low = torch.where(owners < 0, samples, owners)
    for dim in range(owners.dim()):
        rows_low = low.movedim(dim, 0).reshape(owners.shape[dim], -1).amin(1)
        rows_high = owners.movedim(dim, 0).reshape(owners.shape[dim], -1).amax(1)
        if torch.equal(rows_low, rows_high):
            return dim, rows_high
    return refuse("it mixes the samples")


def moved(*names: str, fills: str | None = None, repeats: bool = True) -> Rule:
    """Moves of the tensors of these arguments; fills: the argument that stands in new places."""

    def rule(call: Call) -> list[Result]:
        sources = [t for name in names for t in _tensors(call[name])]
        for value in call.given.values():
            for t in _tensors(value):
                if not any(t is s for s in sources) and not call.known(t).constant:
                    refuse("no rule for places that depend on the samples")
        known = [call.known(t, masks=True) for t in sources]
        owners: dict[int, Tensor] = {}
        places: dict[int, Tensor] = {}
        start = 0
        for t, operand in zip(sources, known, strict=True):
            # as float64, which every operator moves; exact to 2^53
            owners[id(t)] = owner_of(operand).double()
            places[id(t)] = torch.arange(start, start + t.numel()).view(t.shape).double()
            start += t.numel()

        def through(new: dict[int, Tensor]) -> Tensor:
            given = {k: _replaced(v, new) for k, v in call.given.items()}
            if fills is not None:
                given[fills] = -1
            return call.func(**given).long()

        dim, ids = dim_of(through(owners), call.owner.samples)
        error = call.zeros(*known)
        times = 1
        if repeats and start and any(not operand.exact for operand in known):
            found = through(places).flatten()
            found = found[found >= 0]
            times = int(found.bincount().max()) if len(found) else 1
        for operand in known:
            error = error + times * operand.error.square()
        huge = any(operand.huge for operand in known)
        if fills is not None and isinstance(call[fills], int | float):
            huge = huge or abs(float(call[fills])) >= HUGE
        return [Result(call.out, dim, ids, error.sqrt() * SLACK, huge)]

    return rule


def _clone(call: Call) -> list[Result]:
    x = call.operand("self", masks=True)
    return [Result(call.out, x.dim, x.ids, x.error, x.huge)]


def _copy(call: Call) -> list[Result]:
    """self <- src, broadcast and converted."""
    x = call.operand("src", masks=True).expanded(call.out.shape)
    error = x.error
    if call.out.is_floating_point() and call.out.dtype != x.value.dtype:
        error = error + call.u * x.norm
    return [Result(call.out, x.dim, x.ids, error, x.huge)]


def _constant(call: Call) -> list[Result]:
    """A constant, whatever the operand is."""
    results = []
    for out in call.outs:
        huge = False
        if out.is_floating_point() and out.numel():
            huge = bool((out.abs() >= HUGE).any())
        results.append(Result(out, None, None, torch.zeros(1, dtype=torch.float64), huge))
    return results


MOVES: dict[str, Rule] = {
    "clone": _clone,
    "copy": _copy,
    **dict.fromkeys(("fill", "zero"), _constant),
    **dict.fromkeys(
        (
            *("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones"),
            *("new_full", "new_empty", "new_empty_strided"),
        ),
        _constant,
    ),
    **dict.fromkeys(("cat", "stack"), moved("tensors", repeats=False)),
    "constant_pad_nd": moved("self", fills="value", repeats=False),
    **dict.fromkeys(("roll", "flip"), moved("self", repeats=False)),
    **dict.fromkeys(
        (
            *("repeat", "upsample_nearest1d", "upsample_nearest2d"),
            *("im2col", "reflection_pad1d", "reflection_pad2d", "replication_pad1d"),
            *("replication_pad2d", "unfold_copy", "pixel_shuffle", "pixel_unshuffle"),
            *("channel_shuffle", "native_channel_shuffle", "diag_embed", "upsample_nearest3d"),
        ),
        moved("self"),
    ),
}
