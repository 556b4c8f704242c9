"""Freed memory stays with the process while that is asked for, and no longer."""

from __future__ import annotations

import ctypes
import re
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_packing_leaves_no_large_pages_in_the_heap() -> None:
    """A byte of the heap in a large page fills 2 MB: memory would grow with chance."""
    code = "from tests.test_heap import check_pages_in_a_fresh_process as check; check()"
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=120)


def check_pages_in_a_fresh_process() -> None:
    import torch

    from kernels import build, native

    def large() -> list[str]:
        """The parts of the heap that ask for large pages (`hg`, proc(5))."""
        parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        flags = [(part, part.split("VmFlags:")[1].split()) for part in parts if "[heap]" in part]
        return [part for part, found in flags if "hg" in found]

    with heap.kept_memory():
        try:
            matrix = native.Matrix.plain(torch.ones(2048, 2048))
            codes = torch.ones(4096, 2048, dtype=torch.uint8)
            packed = native.Matrix.affine(codes, torch.ones(4096, 1), torch.ones(4096, 1), 8, 2048)
            packed.linear(torch.ones(64, 2048), native.How(native.EXACT))
        except build.BuildError:
            return  # No kernels, no packing.
        assert matrix.tensors["codes"].data_ptr() % native.HUGE_PAGE == 0
        assert large() == []


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    monkeypatch.setattr(heap.ctypes, "CDLL", None)  # would fail if it were called
    with heap.kept_memory():
        heap.hand_back()
