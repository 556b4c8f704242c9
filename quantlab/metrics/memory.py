"""Peak memory of a stretch of work, as the operating system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")


def reset_peak() -> bool:
    """Start a new high-water mark of resident memory; False where the system cannot (not Linux)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_rss_bytes(process: int | None = None) -> int:
    """Largest resident set of this (or another) process, bytes: since the last `reset_peak`, or
    since its start where it cannot be reset. 0 for another process that cannot be seen."""
    try:
        status = Path(f"/proc/{'self' if process is None else process}/status")
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if process is not None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
