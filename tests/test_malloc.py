"""Pages that are kept: fewer faults of large temporaries, and all of it given back."""

import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from twophase_ext.core import malloc
from twophase_ext.core.malloc import pages_kept

LARGE = 12 << 20  # float32 numbers, 48 MB: beyond what glibc's own thresholds come to


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def used_up() -> int:
    """Page faults of ten temporaries, one after the other."""
    before = faults()
    for _ in range(10):
        torch.zeros(LARGE)
    return faults() - before


def temporaries_are_paid_for_once() -> None:
    used_up()
    outside = used_up()
    with pages_kept():
        used_up()
        with pages_kept():  # nested
            inside = used_up()
        assert used_up() < outside / 4
    assert inside < outside / 4
    assert used_up() > outside / 20  # they are made anew, once at least


def memory_is_given_back() -> None:
    before = malloc._resident()
    with pages_kept():
        parts = [torch.ones(LARGE) for _ in range(4)]
        del parts
        assert malloc._resident() > before + 3 * 4 * LARGE
    assert malloc._resident() < before + 4 * LARGE


def what_lay_in_pieces_is_given_back_before() -> None:
    parts = [(torch.ones(20_000), torch.ones(50)) for _ in range(2500)]  # 200 MB of the heap
    kept = [small for _, small in parts]
    del parts
    before = malloc._resident()
    with pages_kept():
        assert malloc._resident() < before - 100e6
    assert len(kept) == 2500


def a_heap_in_pieces_does_not_grow() -> None:
    """Small results that stay, each behind a large temporary that glibc does not use again."""
    malloc._ROOM, malloc._PERIOD = 4 * 4 * LARGE, 0.01
    before, largest, kept = malloc._resident(), 0, []
    with pages_kept():
        for _ in range(25):
            large = torch.ones(LARGE)
            kept.append([torch.ones(5000) for _ in range(3)])
            del large
            time.sleep(0.03)
            largest = max(largest, malloc._resident() - before)
    assert largest < 8 * 4 * LARGE, largest


@pytest.mark.skipif(malloc._glibc() is None, reason="not glibc's malloc, or it is set up")
@pytest.mark.parametrize(
    "what",
    [
        temporaries_are_paid_for_once,
        memory_is_given_back,
        what_lay_in_pieces_is_given_back_before,
        a_heap_in_pieces_does_not_grow,
    ],
)
def test_pages_are_kept_and_given_back(what):
    """In a process of its own: the heap of one that ran other tests has room already."""
    command = f"import test_malloc; test_malloc.{what.__name__}()"
    found = subprocess.run(
        [sys.executable, "-c", command], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


def test_an_error_and_several_threads_leave_no_user(monkeypatch):
    monkeypatch.setattr(malloc, "_set", lambda _: None)
    with pytest.raises(ZeroDivisionError), pages_kept():
        1 // 0  # noqa: B018

    def work():
        for _ in range(200):
            with pages_kept():
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert malloc._users == 0


def test_who_sets_malloc_up_keeps_it(monkeypatch):
    malloc._glibc.cache_clear()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    try:
        assert malloc._glibc() is None
    finally:
        malloc._glibc.cache_clear()
