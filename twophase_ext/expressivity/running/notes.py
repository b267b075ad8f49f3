"""What is known of a storage while a model runs: whose its numbers are, and how far off.

A note belongs to a storage, not to a tensor: a view is a part of it, so the errors of its numbers
are part of the storage's, and a write through one view is seen by the others.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..bounded import Refused, refuse

ALL = 1 << 62  # a unit longer than any storage


@dataclass(frozen=True)
class Note:
    """Errors of a storage's numbers, sample by sample.

    error [b] >= ||computed - exact||_2 over the numbers of each sample; [1] for a constant, and 0
    throughout for integers that are exact; inf: it hangs on how numbers were rounded. The number at
    offset o belongs to sample ids[o // unit % len(ids)]; ids None: a constant. huge: numbers beyond
    HUGE may be there (masks), each right to a relative error of 2^-40 and outside of `error`.
    thin: what the storage stands for, where its memory holds nothing (thin.py).
    decided: integers that hang on samples' real numbers, by comparison or place. lost: why nothing
    is known of the numbers; they may be any sample's. made: of Python's numbers and whole numbers
    of the model alone, neither of its weights nor of samples: as the machine has them. sizes: norms
    of the numbers that are there now, by sample, as far as somebody asked for them.
    """

    error: Tensor
    unit: int = ALL
    ids: Tensor | None = None
    huge: bool = False
    decided: bool = False
    lost: str = ""
    made: bool = False
    thin: Any = None
    sizes: dict[str, Tensor] = field(default_factory=dict, init=False, compare=False)


class Notes:
    """The notes of one run, by storage; a storage that is gone is forgotten."""

    def __init__(self) -> None:
        """None yet."""
        # the weak reference keeps the address from being given to another storage
        self._kept: dict[int, tuple[StorageWeakRef, Note, int | None, int]] = {}
        self._count = 0

    def of(self, tensor: Tensor) -> Note | None:
        """The note of the tensor's storage."""
        found = self._kept.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def token(self, tensor: Tensor) -> int:
        """The number of the tensor's storage, among those that have a note; -1 without one."""
        found = self._kept.get(tensor.untyped_storage()._cdata)
        return -1 if found is None else found[3]

    def checked(self, tensor: Tensor) -> Note | None:
        """The same; Unbounded where the numbers are no longer those that it speaks of.

        NumPy, another thread and code that is no operator write unseen.
        """
        found = self._kept.get(tensor.untyped_storage()._cdata)
        if found is None:
            return None
        if found[2] is not None and mark(tensor) != found[2]:
            raise Refused("an operand was written by what is no operator")
        return found[1]

    def write(self, tensor: Tensor, note: Note, *, seen: bool = True) -> None:
        """Replace the note of the tensor's storage. seen: whether its numbers matter to anybody."""
        storage = tensor.untyped_storage()
        kept = self._kept.get(storage._cdata)
        if kept is None:
            self._count += 1
        reference, token = (StorageWeakRef(storage), self._count) if kept is None else kept[::3]
        self._kept[storage._cdata] = reference, note, mark(tensor) if seen else None, token
        if note.thin is not None or len(self._kept) % 512 == 0:  # thin ones hold numbers
            self._kept = {k: v for k, v in self._kept.items() if not v[0].expired()}

    def forget(self) -> None:
        """All of them, when the run is over: what they hold may be large."""
        self._kept = {}


def mark(tensor: Tensor) -> int:
    """The sum of a storage's bytes, eight at a time, modulo 2^64."""
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    whole = len(raw) // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())


def laid_out(tensor: Tensor, dim: int, ids: Tensor, error: Tensor, huge: bool = False) -> Note:
    """The note of a freshly made tensor whose index along `dim` says whose its numbers are."""
    if len(ids) == 1:
        return Note(error, ALL, ids, huge)
    unit, kept = tensor.stride(dim), shortest(ids)
    found, own = sample_dim(tensor, kept, unit)
    if found != dim or not torch.equal(own, ids):
        refuse("its result lies in memory as no rule expects")
    return Note(error, unit, kept, huge)


def shortest(ids: Tensor) -> Tensor:
    """One period of ids."""
    again = ((ids[1:] == ids[0]) & (ids[:-1] != ids[0])).nonzero()[:, 0] + 1
    for period in again[:4].tolist():
        if len(ids) % period == 0 and bool((ids.view(-1, period) == ids[:period]).all()):
            return ids[:period]
    return ids


def sample_dim(tensor: Tensor, ids: Tensor, unit: int) -> tuple[int | None, Tensor]:
    """(the dimension along which samples change, whose each of its indices is) of a tensor whose
    storage has a note with these `ids` and this `unit`.

    None: all of it is one sample's, ids [1]. Unbounded where two dimensions decide together.
    """
    if len(ids) == 1:
        return None, ids
    geometry = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    dim, along = _sample_dim(*geometry, ids.cpu().numpy().tobytes(), unit)
    return dim, along.to(ids.device)


@functools.lru_cache(4096)
def _sample_dim(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int, packed: bytes, unit: int
) -> tuple[int | None, Tensor]:
    ids = torch.frombuffer(bytearray(packed), dtype=torch.int64)
    period = len(ids)
    moves = 0
    chosen: list[tuple[int | None, Tensor, int]] = []
    for place, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        reach = (size - 1) * stride
        if size <= 1 or stride % (unit * period) == 0:
            continue
        if offset % unit + reach >= unit:
            along = ids[(offset + torch.arange(size, device="cpu") * stride) // unit % period]
            if bool((along != along[0]).any()):
                chosen.append((place, along, stride))
                continue
        moves += reach
    if len(chosen) > 1:
        refuse("it mixes the samples")
    own = ids[offset // unit % period][None]
    dim, along, stride = chosen[0] if chosen else (None, own, 0)
    # the other dimensions stay with one sample: no change between the ends of their reach
    changes = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).long()])
    changes[0] = int(ids[0] != ids[-1])
    total = changes.cumsum(0)
    first = (offset + torch.arange(len(along), device="cpu") * stride) // unit
    last = (offset + torch.arange(len(along), device="cpu") * stride + moves) // unit

    def count(k: Tensor) -> Tensor:
        return k // period * total[-1] + total[k % period]

    if bool((count(first) != count(last)).any()):
        refuse("it mixes the samples")
    return dim, along
