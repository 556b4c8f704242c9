"""The real app as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class App:
    """A running app: its address, its home folder, its process and what it wrote."""

    url: str
    home: Path
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        """End it as Ctrl-C would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def start_app(home: Path, log: Path) -> App:
    """Start app.py on a free port and wait until it serves the page."""
    port = free_port()
    # Without native kernels the tiny model is slow enough for a person, and a test, to see it run.
    environment = os.environ | {
        "QUANTLAB_NATIVE": "off",
        "QUANTLAB_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            # What is started in the background of a script ignores Ctrl-C, and so would the app.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    app = App(f"http://127.0.0.1:{port}/", home, process, log)
    for _ in range(240):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(app.url, timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return app
    app.stop()
    raise AssertionError(f"the app did not start:\n{log.read_text(errors='replace')}")
