"""Pages that the C library keeps between the operators of a long pass.

glibc maps every large block anew and gives it back as it is freed: each temporary of an operator
is then paid for once more, page by page, in the kernel (mallopt(3); on virtual machines as much as
the arithmetic). While pages are kept, large blocks come from the heap like small ones. There a
freed one may stay too short for the next of the same size by its alignment (glibc's bug 14581), and
the heap grows block by block: a thread sees it grow, and gives back what is free.
"""

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
# As glibc's own thresholds come to be in a process that frees large blocks; by default they move,
# and after mallopt they do not.
_AFTER = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_SIZES = "/proc/self/statm"
_ROOM, _PERIOD = 2 << 30, 0.05  # bytes that a process may grow by unseen; seconds between looks
_lock = threading.Lock()
_users = 0
_ended = threading.Event()


@cache
def _glibc() -> ctypes.CDLL | None:
    """The library; None where it is another one, or somebody has set it up."""
    told = "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    told = told or any(name.startswith("MALLOC_") for name in os.environ)
    if told or not sys.platform.startswith("linux") or not os.path.exists(_SIZES):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def _set(options: dict[int, int]) -> None:
    library = _glibc()
    for option, value in options.items():
        if library is not None:
            library.mallopt(option, value)


def _trim() -> None:
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _resident() -> int:
    """Bytes of this process in memory."""
    with open(_SIZES, encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _watch(ended: threading.Event) -> None:
    """Give back what is free whenever the process has grown by _ROOM since."""
    level = _resident()
    while not ended.wait(_PERIOD):
        now = _resident()
        level = min(level, now)
        if now > level + _ROOM:
            _trim()
            level = _resident()


@contextmanager
def pages_kept() -> Iterator[None]:
    """Within, freed memory stays with the process, some 2 GiB of it; after the last use it goes.

    Nested and from several threads. Nothing changes on other systems, and where the environment
    sets malloc up (GLIBC_TUNABLES, MALLOC_...).
    """
    global _users, _ended
    with _lock:
        _users += 1
        if _users == 1 and _glibc() is not None:
            _ended = threading.Event()
            threading.Thread(target=_watch, args=(_ended,), daemon=True).start()
            _trim()  # what lies in pieces stays with the process otherwise, beside what comes now
            _set(_KEPT)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _ended.set()
                _set(_AFTER)
                _trim()
