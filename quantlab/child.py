"""A worker seen from outside: started in its own session, surely ended, its death explained."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from quantlab.worker import REPORT

# With the supervisor's poll well below the two seconds in which a cancel takes effect.
TERM_SECONDS, KILL_SECONDS = 1.0, 0.5


@dataclass(frozen=True)
class Death:
    """How a worker ended: its exit code (negative: the signal), its report, its last words."""

    code: int
    report: dict[str, Any]
    last_line: str

    def explain(self) -> tuple[str, str | None]:
        """The reason for a person, and what to try."""
        if self.code == -signal.SIGKILL:
            return (
                "the worker was killed (signal 9), most likely out of memory",
                "close other programs, or choose a smaller model or fewer calibration tokens, "
                "and run it again; finished variants are not measured again",
            )
        if self.report:
            return f"the worker stopped: {self.report['type']}: {self.report['message']}", None
        words = f": {self.last_line}" if self.last_line else ""
        if self.code < 0:
            name = signal.strsignal(-self.code) or "unknown"
            return f"the worker crashed (signal {-self.code}: {name}){words}", None
        return f"the worker stopped with exit code {self.code}{words}", None


class WorkerProcess:
    """`python -m quantlab.worker` for one run; starts at once.

    It ends with the *thread* that made this object (Linux's PR_SET_PDEATHSIG counts threads), so
    that thread must stay for as long as the worker shall.
    Raises: OSError if no process can be started.
    """

    def __init__(self, root: Path, run_id: str, pipeline: str) -> None:
        package = Path(__file__).resolve().parent.parent
        paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "quantlab.worker", run_id, "--home", str(root)]
        self._process = subprocess.Popen(
            [*command, "--pipeline", pipeline, "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stderr is not None
        self._words = _LastWords(self._process.stderr)

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for its own end; whether that has come."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def end(self) -> None:
        """End it and whatever it started: SIGTERM, then SIGKILL."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            self.wait(TERM_SECONDS)
        self._signal(signal.SIGKILL)
        self.wait(KILL_SECONDS)

    def death(self) -> Death:
        """How it ended; after `end`."""
        lines = self._words.lines()
        report: dict[str, Any] = {}
        for line in lines:
            if line.startswith(REPORT):
                with contextlib.suppress(ValueError):
                    report = json.loads(line.removeprefix(REPORT))
        last = lines[-1][:500] if lines and not lines[-1].startswith(REPORT) else ""
        code = self._process.returncode
        # None: stuck in the kernel, where even SIGKILL waits.
        return Death(-signal.SIGKILL if code is None else code, report, last)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


class _LastWords:
    """Reads a worker's stderr to its end, so that it never blocks, and keeps the last of it."""

    KEPT_BYTES = 1 << 16

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._kept = b""
        self._thread = threading.Thread(target=self._read, name="worker-stderr", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._stream:
            while piece := os.read(self._stream.fileno(), 1 << 16):
                self._kept = (self._kept + piece)[-self.KEPT_BYTES :]

    def lines(self) -> list[str]:
        """The last lines that are not empty, after the worker's end."""
        self._thread.join(1.0)
        lines = [line.strip() for line in self._kept.decode(errors="replace").splitlines()]
        return [line for line in lines if line]
