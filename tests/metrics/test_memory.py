"""Peak memory: it rises with what is touched, remembers it, and can start anew."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from quantlab.metrics.memory import peak_rss_bytes, reset_peak

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
SIZE = 192 * 2**20


def test_the_peak_is_that_of_a_process_with_torch() -> None:
    assert 2**26 < peak_rss_bytes() < 2**40


@linux
def test_the_peak_rises_stays_and_is_forgotten() -> None:
    if not reset_peak():
        pytest.skip("this system does not let a process forget its peak")
    before = peak_rss_bytes()
    block = np.ones(SIZE, dtype=np.uint8)
    assert peak_rss_bytes() > before + 0.9 * SIZE
    del block
    assert peak_rss_bytes() > before + 0.9 * SIZE, "the peak is remembered"
    assert reset_peak()
    assert peak_rss_bytes() < before + 0.5 * SIZE


@linux
def test_other_processes_can_be_asked_for() -> None:
    assert peak_rss_bytes(os.getpid()) == pytest.approx(peak_rss_bytes(), rel=0.05)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert 2**18 < peak_rss_bytes(child.pid) < peak_rss_bytes()
        child.communicate(b"end\n")
    assert peak_rss_bytes(2**22 + 1) == 0, "no such process"
