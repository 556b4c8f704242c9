"""Peak memory: it rises with what is touched, remembers it, and can start anew."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quantlab.metrics.memory import peak_rss_bytes

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
SIZE = 192 * 2**20


def test_the_peak_is_in_bytes() -> None:
    """No Python that runs pytest fits into 16 MB; a count of kilobytes or pages would say so."""
    assert 2**24 < peak_rss_bytes() < 2**40


@linux
def test_the_peak_rises_stays_and_is_forgotten() -> None:
    """In a process of its own: a test worker frees memory of earlier tests at any time."""
    code = f"""
import numpy as np
from quantlab.metrics.memory import peak_rss_bytes, reset_peak
assert reset_peak()
print(peak_rss_bytes())
block = np.ones({SIZE}, dtype=np.uint8)
print(peak_rss_bytes())
del block
print(peak_rss_bytes())
assert reset_peak()
print(peak_rss_bytes())
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    before, touched, remembered, forgotten = map(int, found.stdout.split())
    assert before + 0.9 * SIZE < touched < before + 1.5 * SIZE
    assert remembered > before + 0.9 * SIZE  # the system counts in batches of pages
    assert forgotten < before + 0.5 * SIZE


@linux
def test_other_processes_can_be_asked_for() -> None:
    assert peak_rss_bytes(os.getpid()) == pytest.approx(peak_rss_bytes(), rel=0.05)
    command = [sys.executable, "-c", "print('ready', flush=True); input()"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert 2**18 < peak_rss_bytes(child.pid) < peak_rss_bytes()
        child.communicate(b"end\n")
    assert peak_rss_bytes(2**22 + 1) == 0, "no such process"
