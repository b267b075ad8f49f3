"""Memory that stands for numbers and holds none: whether anybody looked at it or wrote to it.

A page of fresh anonymous memory is not there before its first read or write, and Linux tells which
pages are (/proc/self/pagemap, bits 63 and 62: present, swapped). So NumPy, other threads and code
that is no operator are seen, whatever they do with a tensor of this kind.
"""

import ctypes
import mmap
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_PAGEMAP = Path("/proc/self/pagemap")
_THERE = np.uint64(3 << 62)


class Untouched:
    """The tensors of one pass."""

    def __init__(self) -> None:
        """None yet."""
        self._kept: dict[int, mmap.mmap] = {}

    def like(self, described: Tensor) -> Tensor:
        """A tensor of this geometry and dtype on the CPU."""
        place = 1 + sum(
            (n - 1) * s for n, s in zip(described.shape, described.stride(), strict=True)
        )
        memory = _fresh(max(place, 1) * described.element_size())
        flat = torch.frombuffer(memory, dtype=described.dtype)
        self._kept[flat.data_ptr()] = memory
        return flat.as_strided(described.shape, described.stride())

    def release(self, tensor: Tensor) -> bool:
        """Whether its memory was left alone until now; from now on it holds numbers."""
        place = tensor.untyped_storage().data_ptr()
        memory = self._kept.pop(place, None)
        return memory is None or not _touched(place, len(memory))

    def all_whole(self) -> bool:
        """Whether all of them were left alone; they are forgotten."""
        kept, self._kept = self._kept, {}
        return not any(_touched(place, len(memory)) for place, memory in kept.items())


def _fresh(size: int) -> mmap.mmap:
    reserved_later = getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserved_later)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # a huge page would come with a neighbour's
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def _touched(place: int, size: int) -> bool:
    """Whether a page of this memory is there."""
    page = mmap.PAGESIZE
    first, last = place // page, (place + size - 1) // page
    with _PAGEMAP.open("rb", buffering=0) as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * (last - first + 1)), dtype=np.uint64)
    return len(entries) != last - first + 1 or bool((entries & _THERE).any())


@cache
def available() -> bool:
    """Whether this system tells: tried on memory that is read, written, and left alone."""
    if not _PAGEMAP.exists():
        return False
    try:
        for touch in (None, "read", "write"):
            memory = _fresh(4 * mmap.PAGESIZE)
            place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            if touch == "read":
                _ = memory[mmap.PAGESIZE]
            elif touch == "write":
                memory[2 * mmap.PAGESIZE] = 1
            if _touched(place, len(memory)) != (touch is not None):
                return False
    except (OSError, ValueError):
        return False
    return True
