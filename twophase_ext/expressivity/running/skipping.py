"""Steps that need not be computed: what stands in the place of their numbers."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .call import Call, Pass
from .notes import Note
from .products import bias_of
from .tape import Made, Step
from .writes import written_by


def skip(owner: Pass, step: Step, func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
    """Anything in place of numbers that nothing reads; of a map with zero weights, its bias."""
    lost = torch.full((owner.samples,), torch.inf, dtype=torch.float64)
    if step.in_place:
        for tensor in written_by(func, args, kwargs):
            note = owner.notes.of(tensor)
            if note is not None:
                owner.notes.write(tensor, replace(note, error=lost), seen=False)
        return written_by(func, args, kwargs)[0] if func._schema.returns else None

    def blank(made: Any) -> Any:
        if not isinstance(made, Made):
            return made
        value, note = made.blank(device), made.note
        if not step.unread:
            owner.notes.write(value, replace(note, error=lost), seen=False)
            return value
        value.zero_()
        value += bias_of(Call(owner, func, args, kwargs, [value]))
        note = Note(note.error.new_zeros(1)) if note.lost else note
        owner.notes.write(value, replace(note, error=torch.zeros_like(note.error)))
        return value

    return tree_map(blank, step.made)


def geometry(owner: Pass, value: Tensor | Any) -> Any:
    """A tensor with a note as what was Made; anything else as it is."""
    note = owner.notes.of(value) if isinstance(value, Tensor) else None
    return value if note is None else Made.of(value, note)
