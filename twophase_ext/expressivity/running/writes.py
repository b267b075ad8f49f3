"""Writes in place: as the operator that makes a new tensor, then written through the view."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...core.messages import type_and_line
from ...linalg.bounds import SLACK, UNDERFLOW
from ..bounded import Refused, Unbounded, refuse
from .call import Call, Pass, Result
from .notes import ALL, Note, laid_out, sample_dim, shortest
from .operand import HUGE
from .rules import RULES


def write_through(
    owner: Pass, func: Any, args: Any, kwargs: Any, written: list[Tensor], tensors: list[Tensor]
) -> Any:
    """As the operator that makes a new tensor, then written through the view."""
    if len(written) > 1:
        raise Refused("no rule for what it writes")
    target = written[0]
    known = owner.notes.checked(target)
    rule = RULES.get(func._schema.name.removeprefix("aten::").removesuffix("_"))
    others = [t for t in tensors if t is not target]
    # what lies in the same storage is read by the rule as it was
    own = target.untyped_storage()._cdata
    old = {id(t): t for t in tensors if t.untyped_storage()._cdata == own}
    if any(_partly_same(t, target) for t in old.values()):
        raise Refused("it writes over numbers that it reads in another place")
    if own in owner.fresh and all(map(owner.is_made, tensors)):
        out = func(*args, **kwargs)
        owner.note_made(written, exact=False)
        return out
    unknown: Unbounded | None = None
    if rule is None:
        unknown = Unbounded("no rule for its error")
    elif known is not None:
        try:
            old = {key: _kept(owner, t, known) for key, t in old.items()}
        except Unbounded as error:
            unknown = error
    out = func(*args, **kwargs)
    if known is None and not any(owner.depends(t) or owner.notes.of(t) for t in others):
        if own not in owner.fresh:
            raise Refused("it writes into a tensor that was there before")
        return out
    if rule is None or unknown is not None:
        raise unknown or Unbounded("no rule for its error")
    call = Call(owner, func, args, kwargs, [target])
    call.swap(old)
    (result,) = ruled(rule, call)
    decided = not target.is_floating_point() and any(owner.decides(t) for t in tensors)
    _merge(owner, target, result, known, decided)
    return out


def _kept(owner: Pass, tensor: Tensor, known: Note) -> Tensor:
    """A copy of a tensor, of whose storage this is known, with a note of its own."""
    copy = tensor.clone()
    operand = owner.operand(tensor)
    if operand.dim is not None and operand.ids is not None:
        note = laid_out(copy, operand.dim, operand.ids, operand.error, known.huge)
    else:
        note = Note(operand.error, ALL, operand.ids, known.huge)
    owner.notes.write(copy, note)
    return copy


def _merge(owner: Pass, target: Tensor, result: Result, known: Note | None, decided: bool) -> None:
    """Of the storage of which `target`, a part or all, was written."""
    error, huge = with_underflow(result.error, target), result.huge
    storage = target.untyped_storage()
    whole = target.numel() * target.element_size() >= storage.nbytes()
    huge = huge and (not whole or holds_huge(target))
    if result.ids is None:
        if known is not None and known.ids is not None:
            error = error.expand(owner.samples)
            note = Note(error, known.unit, known.ids, huge)
        else:
            note = Note(error, huge=huge)
    elif result.dim is None:
        note = Note(error, ALL, result.ids, huge)
    else:
        stride = target.stride(result.dim)
        kept = shortest(result.ids)
        note = Note(error, stride, kept, huge)
        dim, ids = sample_dim(target, kept, stride)
        if dim != result.dim or not torch.equal(ids, result.ids):
            refuse("it writes the samples as no rule expects")
        if known is not None and known.ids is not None:
            same = sample_dim(target, known.ids, known.unit)
            if same[0] != dim or not torch.equal(same[1], ids):
                refuse("it writes one sample over another")
            note = Note(error, known.unit, known.ids, huge)
        elif not whole and not _regular(target, result.dim):
            refuse("it writes the samples as no rule expects")
    if not whole and known is not None:
        rest = known.error
        note = Note(
            (note.error.square() + rest.square()).sqrt() * SLACK,
            note.unit,
            note.ids,
            note.huge or known.huge,
        )
    if not target.is_floating_point() and bool(note.error.any()):
        note = Note(torch.full_like(note.error, torch.inf), note.unit, note.ids)
    owner.notes.write(target, replace(note, decided=decided))


def ruled(rule: Callable[[Call], list[Result]], call: Call) -> list[Result]:
    """What the rule says; Unbounded where it fails."""
    try:
        return rule(call)
    except Unbounded:
        raise
    except Exception as error:  # whatever a shape that no rule foresees raises
        raise Unbounded(f"its rule fails ({type_and_line(error)})") from error


def holds_huge(value: Tensor) -> bool:
    """Whether a number that may be a mask's is there."""
    return bool((value.abs() >= HUGE / 4).any())


def with_underflow(error: Tensor, value: Tensor) -> Tensor:
    """With what may vanish below the type's range, where anything was rounded."""
    if not bool(error.any()):
        return error
    lost = UNDERFLOW
    if value.dtype == torch.float32:
        lost += 2.0**-120 * math.sqrt(value.numel())
    return error * SLACK + lost


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that the operator writes."""
    found = []
    for k, argument in enumerate(func._schema.arguments):
        info = argument.alias_info
        value = args[k] if k < len(args) else kwargs.get(argument.name)
        if info is not None and info.is_write and value is not None:
            found += [value] if isinstance(value, Tensor) else list(value)
    return found


def _partly_same(a: Tensor, b: Tensor) -> bool:
    """Whether two views of one storage show a number in common, and not all in the same places."""
    place = [(t.dtype, t.shape, t.stride(), t.storage_offset()) for t in (a, b)]
    if place[0] == place[1]:
        return False
    if a.dtype != b.dtype:
        return True
    numbers = torch.arange(a.untyped_storage().nbytes() // a.element_size())
    shown = [numbers.as_strided(t.shape, t.stride(), t.storage_offset()).flatten() for t in (a, b)]
    return bool(torch.isin(shown[0], shown[1]).any())


def _regular(target: Tensor, dim: int) -> bool:
    """Whether samples, along dim of this part of a storage, are the whole storage's as well."""
    storage = target.untyped_storage().nbytes() // target.element_size()
    stride, size = target.stride(dim), target.shape[dim]
    return stride > 0 and storage % (stride * size) == 0
