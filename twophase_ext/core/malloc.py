"""Pages that the C library keeps between the operators of a long pass.

glibc maps every large block anew and gives it back as it is freed: each temporary of an operator
is then paid for once more, page by page, in the kernel (mallopt(3); on virtual machines as much as
the arithmetic). While pages are kept, large blocks come from the heap like small ones.
"""

import ctypes
import os
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
_lock = threading.Lock()
_users = 0


@cache
def _glibc() -> ctypes.CDLL | None:
    """The library; None where it is another one, or somebody has set it up."""
    told = "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    told = told or any(name.startswith("MALLOC_") for name in os.environ)
    if told or not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def _set(options: dict[int, int]) -> None:
    library = _glibc()
    for option, value in options.items():
        if library is not None:
            library.mallopt(option, value)


@contextmanager
def pages_kept() -> Iterator[None]:
    """Within, freed memory stays with the process; at the end of the last use it is given back.

    Nested and from several threads. Nothing changes on other systems, and where the environment
    sets malloc up (GLIBC_TUNABLES, MALLOC_...).
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _set(_KEPT)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _set(_AFTER)
                if (library := _glibc()) is not None:
                    library.malloc_trim(0)
