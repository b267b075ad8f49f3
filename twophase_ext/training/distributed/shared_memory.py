"""Sums over the processes of one machine, by memory that they share.

A step of the second phase exchanges a few kilobytes. Messages through sockets wake a sleeping
thread each time, which may take milliseconds, as long as the step itself; here who comes first
looks at a counter until the others have come.
"""

import os
import platform
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOM = 4 << 20  # bytes that a process can give at once
LINE = 8  # counters of 8 bytes in a cache line: each process writes to a line of its own
PATIENT = 200  # looks at the counters before others may run
LOOK = 2000  # and between two looks at the pids


class Lost(RuntimeError):
    """Another process has ended, or has not come in time."""


class SharedMemory:
    """Slots in which each of `size` processes puts a tensor for all; every call is collective.

    Two slots a process in turn: who writes one for the second time has seen that all others are
    past their reading of the first. A tensor is in memory before the counter that tells of it: the
    two stores are calls of their own, which no compiler exchanges, and between them a lock is taken
    and released, a locked instruction of x86, before which every store is finished, those past
    the caches too (Intel SDM 3A, "Memory Ordering"). The same stands between seeing the counters
    and reading the tensors. On other processors there is no such object: messages are sent.
    """

    def __init__(self, path: Path, rank: int, size: int, pids: list[int], timeout: float) -> None:
        """Maps the file, which all have done before anyone gives something; see `shared_memory`."""
        self.rank, self.size, self.pids, self.timeout = rank, size, pids, timeout
        self._turn = 0
        self._views: dict[Any, list[Tensor]] = {}  # of the slots: making them takes longer
        memory = np.memmap(path, np.uint8, "r+", shape=(_length(size),))
        counters = memory[: 8 * LINE * size].view(np.int64)
        self._own, self._counters = counters[LINE * rank :][:1], counters[::LINE]
        slots = torch.from_numpy(memory)[8 * LINE * size :]
        self._slots = slots.view(2, size, ROOM)

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor of this size is exchanged here."""
        return tensor.device.type == "cpu" and tensor.nbytes <= ROOM

    def exchange(self, own: Tensor) -> list[Tensor]:
        """Everyone's tensor, by rank, all of one shape and dtype; views until the next but one."""
        self._turn += 1
        kind = self._turn % 2, own.dtype, own.shape
        views = self._views.get(kind)
        if views is None:
            slots = self._slots[kind[0], :, : own.nbytes].view(own.dtype)
            views = self._views[kind] = [slot.view(own.shape) for slot in slots]
        views[self.rank].copy_(own.detach())
        _fence()
        self._own[0] = self._turn
        self._wait()
        _fence()
        return views

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum in the order of the ranks, in the place of `tensor`: the same bits everywhere."""
        first, *others = self.exchange(tensor)
        with torch.no_grad():
            tensor.copy_(first)
            for part in others:
                tensor += part
        return tensor

    def _wait(self) -> None:
        looks, started = 0, time.monotonic()
        while int(self._counters.min()) < self._turn:
            looks += 1
            if looks > PATIENT:
                os.sched_yield()
            if looks % LOOK == 0:
                self._look(time.monotonic() - started)

    def _look(self, waited: float) -> None:
        for rank in range(self.size):
            if self._counters[rank] < self._turn and not _alive(self.pids[rank]):
                raise Lost(f"the process of rank {rank} has ended")
        if waited > self.timeout:
            raise Lost(f"no answer within {self.timeout:.0f} s")


_LOCK = threading.Lock()  # of this process alone, never waited for


def _fence() -> None:
    """Stores and loads before it are finished before those after it begin."""
    with _LOCK:
        pass


def _length(size: int) -> int:
    return 8 * LINE * size + 2 * size * ROOM


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in "ZX"


def shared_memory(
    rank: int, collect: Callable[[Any], list[Any]], timeout: float
) -> SharedMemory | None:
    """Memory for all processes, None where they are on several machines or it cannot be had.

    Collective; collect: as `Ranks.all_gather_object`. timeout: seconds that a process waits for
    the others.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    able = platform.machine() in ("x86_64", "AMD64") and boot.exists()
    here = (socket.gethostname(), boot.read_text()) if able else None
    found = collect((here, os.getpid()))
    if here is None or any(there != here for there, _ in found):
        return None
    path = None
    if rank == 0:
        try:
            file, name = tempfile.mkstemp(prefix="twophase-ranks-", dir="/dev/shm")
            os.posix_fallocate(file, 0, _length(len(found)))
            os.close(file)
            path = Path(name)
        except OSError:
            path = None
    path = collect(path)[0]
    memory = None
    if path is not None:
        try:
            memory = SharedMemory(path, rank, len(found), [pid for _, pid in found], timeout)
        except OSError:
            memory = None
    all_have_it = all(collect(memory is not None))
    if rank == 0 and path is not None:
        path.unlink()  # it lives as long as it is mapped
    return memory if all_have_it else None
