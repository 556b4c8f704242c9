"""Freed memory stays with the process while that is asked for, and no longer."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from quantlab import heap

SIZE = 64 * 2**20


def resident_after_freeing() -> int:
    """Bytes of memory the process holds once a block of `SIZE` was written to and freed."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    block = libc.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    libc.free(block)
    resident: int = psutil.Process().memory_info().rss
    return resident


@pytest.mark.skipif(heap._gnu_libc() is None, reason="only the GNU C library has mallopt")
def test_memory_is_kept_inside_and_handed_back_after() -> None:
    """In a process of its own: what other tests freed before would serve the block as well."""
    code = "from tests.test_heap import check_in_a_fresh_process as check; check()"
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)


def check_in_a_fresh_process() -> None:
    before = resident_after_freeing()
    with heap.kept_memory():
        inside = resident_after_freeing()
    after = psutil.Process().memory_info().rss
    assert inside - before > 0.9 * SIZE
    assert after - before < 0.1 * SIZE
    with heap.kept_memory():
        resident_after_freeing()
        heap.hand_back()
        assert psutil.Process().memory_info().rss - before < 0.1 * SIZE


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    monkeypatch.setattr(heap.ctypes, "CDLL", None)  # would fail if it were called
    with heap.kept_memory():
        heap.hand_back()
