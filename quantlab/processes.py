"""Processes: telling one from another across pid reuse, and dying together with a parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

_SAME_START_SECONDS = 5.0  # The system clock may be set while a process runs.
_PR_SET_PDEATHSIG = 1


def process_identity(pid: int | None = None) -> str:
    """`pid:start time` of a process (default: this one); '' for one that is gone."""
    try:
        process = psutil.Process(pid)
        return f"{process.pid}:{process.create_time():.2f}"
    except psutil.Error:
        return ""


def process_alive(identity: str) -> bool:
    """Whether the process that `process_identity` named still lives (not another of its pid)."""
    pid, _, started = identity.partition(":")
    now = process_identity(int(pid)) if pid.isdigit() else ""
    if not now:
        return False
    return abs(float(now.partition(":")[2]) - float(started)) < _SAME_START_SECONDS


def die_with(parent: int) -> None:
    """Kill this process as soon as `parent`, which must be its parent, is gone.

    Linux sends the signal itself; a thread watches as well, for other systems and for a parent
    that died before this call.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.25)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def prefer_as_oom_victim() -> None:
    """Ask Linux to end this process before others (the page) when memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
